"""Convert a model in Hugging Face format (Qwen3, Qwen2.5, Llama) to a checkpoint for training.

python launch/import_hf.py Qwen/Qwen3-4B-Base checkpoints/qwen3_4b
torchrun ... launch/train.py ... checkpoint.load=checkpoints/qwen3_4b

OUTPUT/model.yaml contains the model's keys: copy it to recipes/model/ if there is no recipe for this model.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from inplace_ttt.command import run_command
from inplace_ttt.config import UserError, one_line
from inplace_ttt.files import user_path

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, .gguf file, or name of a model on the hub")
    parser.add_argument("output", type=Path, help="folder to create")
    arguments = parser.parse_args()
    return run_command(lambda: convert(arguments))


def convert(arguments: argparse.Namespace) -> None:
    from inplace_ttt.hf.convert import import_checkpoint
    from inplace_ttt.hf.progress import bytes_bar

    console, output = Console(stderr=True), user_path(arguments.output)
    with tempfile.TemporaryDirectory() as unpacked:
        source = local_folder(arguments.source, Path(unpacked))
        with bytes_bar(console, "importing") as advance:
            model = import_checkpoint(source, output, advance)
    console.print(
        f"'{output}': {model.num_layers} layers, hidden size {model.hidden_size}, vocabulary {model.vocab_size:,}; "
        f"train from it with checkpoint.load={output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def local_folder(name: str, unpacked: Path) -> Path:
    """Return a local folder with the model: ``name`` itself, an unpacked GGUF file, or a download from the hub.

    Raises UserError if the model does not exist or cannot be downloaded.
    """
    if name.endswith(".gguf"):
        from inplace_ttt.hf.gguf import unpack

        unpack(user_path(name), unpacked)
        return unpacked
    folder = user_path(name)
    if folder.is_dir():
        return folder
    from inplace_ttt.hub import hub_is_reached, is_hub_name

    if not name or not is_hub_name(name):
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"'{name}' {what}: name a folder with config.json and safetensors, or a model on the hub")
    from huggingface_hub import snapshot_download

    reached = hub_is_reached()
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=not reached))
    except Exception as error:
        why = one_line(error) if reached else "the hub cannot be reached"
        raise UserError(f"'{name}' is not a folder and cannot be downloaded from the hub ({why})") from error


if __name__ == "__main__":
    sys.exit(main())
