"""Make a folder in Hugging Face's format out of a run, a checkpoint or an imported model.

python launch/export_hf.py runs/my_run exported/
python launch/export_hf.py runs/my_run/checkpoints/step_00001000 exported/ --base checkpoints/qwen3_4b/hf
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from inplace_ttt.config import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run's folder (its last whole checkpoint), or a checkpoint's")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--base", type=Path, help="folder whose tokenizer and generation config come along")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    try:
        from inplace_ttt.hf.convert import export_checkpoint
        from inplace_ttt.hf.progress import bytes_bar

        with bytes_bar(console, "exporting") as advance:
            export_checkpoint(arguments.checkpoint, arguments.output, arguments.base, advance)
    except (UserError, OSError) as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    console.print(f"'{arguments.output}' is written", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
