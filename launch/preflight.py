"""Say what this machine has for training, what each part gives and what its lack costs; exits 1 if none can run."""

import sys
import warnings

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inplace_ttt.preflight import State, examine

COLORS = {State.THERE: "green", State.LACKING: "yellow", State.BROKEN: "red"}


def main() -> int:
    warnings.simplefilter("ignore")
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.status("looking"):
        findings = examine()
    table = Table(title="preflight", title_justify="left")
    for name in ("part", "", "found", "what it gives, or what its lack costs"):
        table.add_column(name)
    for finding in findings:
        state = f"[{COLORS[finding.state]}]{finding.state.value}[/]"
        table.add_row(finding.part, state, escape(finding.found), escape(finding.meaning))
    console.print(table)
    broken = [finding.part for finding in findings if finding.state is State.BROKEN]
    console.print(f"training cannot run here: {', '.join(broken)}" if broken else "training can run here")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
