"""Check if training can run on this node, or on all nodes of a job together.

python launch/preflight.py                                          # this node; exit code 1 if training cannot run
torchrun ... launch/preflight.py [--folder RUN_DIR] [--minutes 3]   # all nodes of a job; exit code 2 if a check fails,
                                                                    # 4 if a node does not respond
"""

import argparse
import math
import os
import sys
import warnings
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inplace_ttt.config import UserError
from inplace_ttt.environment import World
from inplace_ttt.resilience.exits import fail, leave
from inplace_ttt.resilience.preflight.node import Finding, State, examine

COLORS = {State.THERE: "green", State.LACKING: "yellow", State.BROKEN: "red"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="folder that all nodes must be able to read and write (runs)"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="time limit for a node to respond (3)")
    parser.add_argument(
        "--light", action="store_true", help="check this node without using its GPUs, for health checks"
    )
    arguments = parser.parse_args()
    if not (math.isfinite(arguments.minutes) and arguments.minutes > 0):
        parser.error(f"--minutes {arguments.minutes}: use a number above 0")
    try:
        return look(arguments)
    except UserError as error:
        return fail(f"error: {error}", 2)


def look(arguments: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")
    together = "TORCHELASTIC_RUN_ID" in os.environ
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not together:
        with console.status("checking"):
            findings = examine(arguments.light)
    else:
        findings = look_together(arguments.folder, arguments.minutes)
        if World.from_environment().rank:
            return 0  # only rank 0 prints
    table = Table(title="preflight", title_justify="left")
    for name in ("part", "", "found", "effect"):
        table.add_column(name)
    for finding in findings:
        state = f"[{COLORS[finding.state]}]{finding.state.value}[/]"
        table.add_row(finding.part, state, escape(finding.found), escape(finding.meaning))
    console.print(table)
    broken = [finding for finding in findings if finding.state is State.BROKEN]
    if together and broken:
        return fail("; ".join(f"{one.part}: {one.found}" for one in broken), 2)
    parts = ", ".join(one.part for one in broken)
    console.print(f"training cannot run here: {parts}" if broken else "training can run here")
    return 1 if broken else 0


def look_together(folder: Path, minutes: float) -> list[Finding]:
    from inplace_ttt.resilience.preflight.ranks import reports_of_all
    from inplace_ttt.resilience.preflight.verdict import judge

    return judge(reports_of_all(folder, minutes, lambda why: leave(fail(why, 4))))


if __name__ == "__main__":
    sys.exit(main())
