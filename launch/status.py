"""Show the status of a run: loss, speed, update ratios, restarts, stragglers.

python launch/status.py runs/tiny_ttt                  # live view in a terminal; Ctrl-C to quit
python launch/status.py runs/tiny_ttt --png            # picture, runs/tiny_ttt/status.png

Reads only the run folder, so it can run on any machine with access to the folder.
"""

import argparse
import math
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from inplace_ttt.config import UserError
from inplace_ttt.training.status import Status, picture, screen


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run")
    parser.add_argument("--once", action="store_true", help="print once and exit (default without a terminal)")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="seconds between two updates (2)"
    )
    parser.add_argument(
        "--png", nargs="?", const="", metavar="FILE", help="write a picture and exit (RUN_DIR/status.png)"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    live = console.is_terminal and not arguments.once and arguments.png is None
    try:
        if not (math.isfinite(arguments.interval) and arguments.interval > 0):
            raise UserError(f"--interval {arguments.interval}: use a number of seconds above 0")
        if live:
            watch(arguments.run_dir, arguments.interval, console)
            return 0
        status = Status.read(arguments.run_dir)
        if arguments.png is not None:
            path = Path(arguments.png) if arguments.png else arguments.run_dir / "status.png"
            if path.suffix.lower() != ".png" or path.is_dir():
                raise UserError(f"--png {path} is not a PNG file name: use one that ends in .png")
            picture(status, path)
            print(f"written: {path}")
        else:
            console.print(screen(status, console.width))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def watch(folder: Path, interval: float, console: Console) -> None:
    """Show the status live, updated every ``interval`` seconds, until Ctrl-C."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                try:
                    shown = screen(Status.read(folder), console.width)
                except UserError:  # no run yet
                    shown = Text(f"waiting for a run to start in '{folder}' (Ctrl-C to quit)")
                live.update(shown, refresh=True)
                time.sleep(interval)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    sys.exit(main())
