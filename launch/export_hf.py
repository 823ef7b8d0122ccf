"""Export a run, a checkpoint or an imported model to a folder in Hugging Face format.

python launch/export_hf.py runs/my_run exported/
python launch/export_hf.py runs/my_run/checkpoints/step_00001000 exported/ --base checkpoints/qwen3_4b/hf
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from inplace_ttt.command import run_command
from inplace_ttt.files import user_path
from inplace_ttt.hf.calibration import READING_BOUND, READING_CLIP


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, help="folder of a run (its last complete checkpoint is used) or of a checkpoint"
    )
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--base", type=Path, help="folder with config, tokenizer and generation config to copy")
    parser.add_argument(
        "--clip",
        default=READING_CLIP,
        metavar="WORD",
        help=f"clip of updates at inference: trained, none, p50, p95, p99 (quantiles of update norms in training, "
        f"per layer) or a number ({READING_CLIP})",
    )
    parser.add_argument(
        "--bound",
        metavar="WORD",
        help=f"bound of the sum of updates beyond the training length: none, or a fraction of its norm at that length, "
        f"such as 0.5 ({READING_BOUND})",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="do not copy a tokenizer")
    arguments = parser.parse_args()
    return run_command(lambda: export(arguments))


def export(arguments: argparse.Namespace) -> None:
    from inplace_ttt.hf.auxiliary_files import TOKENIZER
    from inplace_ttt.hf.convert import export_checkpoint
    from inplace_ttt.hf.progress import bytes_bar

    console, output = Console(stderr=True), user_path(arguments.output)
    with bytes_bar(console, "exporting") as advance:
        export_checkpoint(
            user_path(arguments.checkpoint),
            output,
            arguments.base,
            advance,
            tokenizer=not arguments.no_tokenizer,
            clip=arguments.clip,
            bound=arguments.bound,
        )
    has_tokenizer = any((output / name).is_file() for name in TOKENIZER)
    console.print(
        f"'{output}' is written" + ("" if has_tokenizer else ", without a tokenizer (none was found or requested)"),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
