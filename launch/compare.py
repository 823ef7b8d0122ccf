"""Compare two evaluations: print a table of both with the differences, paired over common samples.

python launch/compare.py runs/evaluation/base runs/evaluation/ttt
python launch/compare.py runs/evaluation/ruler:base "runs/evaluation/ruler:ttt (fast weights off)" --output compared/

A and B are output folders of launch/evaluate.py, or FOLDER:MODEL if a folder contains several models.
"""

import argparse
import sys

from rich.console import Console

from inplace_ttt.command import run_command
from inplace_ttt.config import UserError
from inplace_ttt.files import user_path, write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--output", metavar="FOLDER", help="folder for the scores (JSON) and figures")
    arguments = parser.parse_args()
    return run_command(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    from inplace_ttt.evaluation.compare import compare, record
    from inplace_ttt.evaluation.kinds import KINDS

    task, scores, notes = compare(arguments.first, arguments.second)
    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 160)
    scores.show(console)
    for note in notes:
        print(f"note: {note}")
    if arguments.output:
        folder = user_path(arguments.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {folder} cannot be created ({error.strerror}): use another folder") from error
        write_json(folder / "compare.json", record(task, scores))
        pictures = KINDS[task].draw(scores, folder)
        print("written:", ", ".join(str(path) for path in (folder / "compare.json", *pictures)))


if __name__ == "__main__":
    sys.exit(main())
