"""Progress of a conversion."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bytes_bar(console: Console, doing: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; what it gives is called with the bytes that were done, and with those of all."""
    with Progress(TextColumn(doing), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=None, visible=False)  # an error before the first tensor stands alone
        yield lambda size, total: bar.update(task, advance=size, total=total, visible=True)
