"""Show the progress of a conversion."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bytes_bar(console: Console, doing: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; yield a function to call with (bytes done since the last call, total bytes)."""
    with Progress(TextColumn(doing), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=None, visible=False)  # hidden, so that an early error is printed without a bar
        yield lambda size, total: bar.update(task, advance=size, total=total, visible=True)
