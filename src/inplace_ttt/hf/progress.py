"""How far a conversion is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bytes_bar(console: Console, doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over ``total`` bytes; what it gives is called with the bytes that were done."""
    with Progress(TextColumn(doing), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda size: bar.advance(task, size)
        bar.update(task, completed=total)
