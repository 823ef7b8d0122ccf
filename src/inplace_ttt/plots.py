"""Share the style and helpers of all plots."""

import itertools
import os
from pathlib import Path

INK, GRID = "#333333", "#dddddd"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")  # Okabe and Ito


def pyplot():
    """Return matplotlib's pyplot with the Agg backend, which draws to files."""
    os.environ["MPLBACKEND"] = "Agg"  # an unknown backend in the environment would fail the import
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names of runs and models are text, also those with a $
    import matplotlib.pyplot

    return matplotlib.pyplot


def axes(title: str, xlabel: str, ylabel: str, subtitle: str = ""):
    """Return an empty figure and its axes in the project's style."""
    figure, (ax,) = panels(1)
    style(ax, title, xlabel, ylabel, subtitle)
    return figure, ax


def panels(count: int):
    """Return a figure and ``count`` axes side by side."""
    figure, found = pyplot().subplots(1, count, figsize=(8 if count == 1 else 5.5 * count, 4.8), dpi=150, squeeze=False)
    return figure, list(found[0])


def style(ax, title: str, xlabel: str, ylabel: str, subtitle: str = "") -> None:
    """Set the titles, labels, grid and frame of axes."""
    ax.set_title(title, loc="left", fontweight="bold", color=INK, pad=22 if subtitle else None)
    ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=9, color="#666666")
    ax.set_xlabel(xlabel, color=INK)
    ax.set_ylabel(ylabel, color=INK)
    ax.grid(color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def save(figure, path: Path, tight: bool = True) -> None:
    """Write a figure to a PNG file atomically. ``tight``: False for figures with their own layout."""
    plt = pyplot()
    if tight:
        figure.tight_layout()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)  # replaces a link of that name, not its target
    finally:
        partial.unlink(missing_ok=True)
        plt.close(figure)


def window_of(values: list[float]) -> int:
    """Return the number of steps that curves are averaged over: a twentieth of the run, at most 50."""
    return max(1, min(50, len(values) // 20))


def running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of the last ``window`` values (fewer at the start) at each position."""
    sums = list(itertools.accumulate(values, initial=0.0))
    return [(sums[end] - sums[max(0, end - window)]) / min(end, window) for end in range(1, len(sums))]


def label_last(ax, x: list[float], y: list[float], color: str, above: bool = True) -> None:
    """Annotate the end of a curve with its last value."""
    if x:
        place = (6, 6 if above else -12)
        ax.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), textcoords="offset points", xytext=place, color=color, fontsize=9)
