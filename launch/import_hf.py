"""Make a checkpoint to train from out of a model in Hugging Face's format (Qwen3, Llama and their like).

python launch/import_hf.py Qwen/Qwen3-4B-Base checkpoints/qwen3_4b
torchrun ... launch/train.py ... checkpoint.load=checkpoints/qwen3_4b

OUTPUT/model.yaml has the model's keys: copy it to recipes/model/ for sizes that have none.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from inplace_ttt.config import UserError, one_line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, .gguf file, or name of a model on the hub")
    parser.add_argument("output", type=Path, help="folder to make")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    try:
        from inplace_ttt.hf.convert import import_checkpoint
        from inplace_ttt.hf.progress import bytes_bar

        with tempfile.TemporaryDirectory() as unpacked:
            source = local_folder(arguments.source, Path(unpacked))
            with bytes_bar(console, "importing") as advance:
                model = import_checkpoint(source, arguments.output, advance)
    except (UserError, OSError) as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    console.print(
        f"'{arguments.output}': {model.num_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size:,}; "
        f"train from it with checkpoint.load={arguments.output}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def local_folder(name: str, unpacked: Path) -> Path:
    """The folder itself, what a GGUF file holds, or what the hub has under the name."""
    if name.endswith(".gguf"):
        from inplace_ttt.hf.gguf import unpack

        unpack(Path(name), unpacked)
        return unpacked
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"folder '{name}' does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:
        raise UserError(f"'{name}' is no folder, and the hub does not give it ({one_line(error)})") from error


if __name__ == "__main__":
    sys.exit(main())
