"""Scores of an evaluation: a mean with its interval for each row and model, and the differences to the first model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from inplace_ttt.evaluation.statistics import Interval

Row = tuple[str, ...]  # such as ("4096", "niah_single_1")


@dataclass(frozen=True)
class Scores:
    """A table: of each row and model (by its label) an interval, of each further model the difference to the first."""

    title: str
    names: tuple[str, ...]  # of the parts of a row
    unit: str  # of the numbers
    cells: dict[Row, dict[str, Interval]]
    differences: dict[Row, dict[str, Interval]]

    @classmethod
    def of(
        cls,
        title: str,
        names: tuple[str, ...],
        unit: str,
        rows: Sequence[Row],
        labels: Sequence[str],
        interval: Callable[[Row, str], Interval],
        difference: Callable[[Row, str, str], Interval | None],
    ) -> "Scores":
        """Compute all cells.

        Args:
            interval: of a row and a label.
            difference: of a row and two labels, the second less the first; None where there is none to be had.
        """
        cells = {row: {label: interval(row, label) for label in labels} for row in rows}
        others: dict[Row, dict[str, Interval]] = {row: {} for row in rows}
        for row in rows:
            for label in labels[1:]:
                found = difference(row, labels[0], label)
                if found is not None:
                    others[row][label] = found
        return cls(title, names, unit, cells, others)

    def records(self) -> list[dict]:
        """Return the cells for results.json."""
        found = []
        for row, cells in self.cells.items():
            for label, interval in cells.items():
                record = dict(zip(self.names, row, strict=True)) | {"model": label} | asdict(interval)
                other = self.differences[row].get(label)
                if other is not None:
                    record["difference_to_first"] = asdict(other) | {"excludes_zero": other.excludes_zero}
                found.append(record)
        return found

    def show(self, console: Console, digits: int) -> None:
        """Print the table: 95% intervals in brackets, the number of samples beside."""
        labels = list(next(iter(self.cells.values())))
        table = Table(title=f"{self.title} ({self.unit}, 95% intervals)", title_justify="left")
        for name in self.names:
            table.add_column(name, justify="right")
        table.add_column("samples", justify="right")
        for label in labels:
            table.add_column(label, justify="right", overflow="fold")
        for label in labels[1:]:
            table.add_column(f"{label} - {labels[0]}" if len(labels) > 2 else "difference", justify="right")
        for row, cells in self.cells.items():
            counts = sorted({interval.samples for interval in cells.values()})
            words = [*row, "/".join(map(str, counts)), *(shown(cells[label], digits) for label in labels)]
            for label in labels[1:]:
                other = self.differences[row].get(label)
                words.append("" if other is None else shown(other, digits, sign=True) + " *" * other.excludes_zero)
            table.add_row(*words)
        if any(one.excludes_zero for others in self.differences.values() for one in others.values()):
            table.caption, table.caption_justify = "* the interval of the difference leaves out zero", "left"
        console.print(table)


def shown(interval: Interval, digits: int, sign: bool = False) -> str:
    """Return 77.1 [74.0, 80.2]."""
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
