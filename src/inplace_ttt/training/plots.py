"""Plots: the shared style and helpers, and loss.png of a run."""

import itertools
import os
from pathlib import Path

from inplace_ttt.training.records import read_metrics

WITHOUT, WITHOUT_LABEL = "loss_without_fast_weights", "held out, fast weights off"
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


def plot_loss(metrics: Path, picture: Path, name: str) -> None:
    """Plot training loss, its running mean and held-out loss over tokens, and beside it the last held-out loss by
    position. Draw nothing if ``metrics`` (metrics.jsonl) has no steps."""
    records = read_metrics(metrics)
    steps = [r for r in records if not r.get("eval")]
    if not steps:
        return
    unit, unit_name = (1e3, "thousands") if steps[-1].get("tokens", 0) < 1e6 else (1e6, "millions")
    at = {r["step"]: r.get("tokens", 0) / unit for r in steps}
    x, loss = list(at.values()), [r["loss"] for r in steps]
    evaluations = [r for r in records if r.get("eval") and r["step"] in at]
    by_position = _ranges(evaluations[-1]) if evaluations else []
    figure, (ax, *rest) = panels(1 + bool(by_position))
    style(ax, name, f"tokens ({unit_name})", "loss (nats per token)")
    mean, window = running_mean(loss, window_of(loss)), window_of(loss)
    if window > 1:
        ax.plot(x, loss, color=COLORS[0], alpha=0.3, linewidth=1, label="training, each step")
    name = f"training, mean of the last {window} steps" if window > 1 else "training, each step"
    ax.plot(x, mean, color=COLORS[0], linewidth=2, label=name)
    label_last(ax, x, mean, COLORS[0])
    held_out = [(at[r["step"]], r["loss"]) for r in evaluations]
    if held_out:
        without = [
            (at[r["step"]], r[WITHOUT]) for r in evaluations if WITHOUT in r
        ]  # drawn first, below the other curve
        if without:
            ax.plot(
                *zip(*without, strict=True), "o:", color=COLORS[4], linewidth=1.5, markersize=4, label=WITHOUT_LABEL
            )
        ax.plot(*zip(*held_out, strict=True), "o-", color=COLORS[1], linewidth=1.5, markersize=5, label="held out")
        label_last(ax, *map(list, zip(*held_out, strict=True)), COLORS[1], above=held_out[-1][1] > mean[-1])
    ax.margins(x=0.08)
    ax.legend(frameon=False)
    for panel in rest:
        style(
            panel,
            f"after step {evaluations[-1]['step']}",
            "position in the document (tokens)",
            "held-out loss (nats per token)",
        )
        draw_positions(panel, by_position, "loss", "held out", COLORS[1], "-")
        if any(WITHOUT in one for one in by_position):
            draw_positions(panel, by_position, WITHOUT, WITHOUT_LABEL, COLORS[4], ":")
        panel.legend(frameon=False)
    save(figure, picture)


def _ranges(record: dict) -> list[dict]:
    """Return the position ranges of an evaluation record, or [] if it has no valid ones."""
    found = record.get("position")
    whole = isinstance(found, list) and all(
        isinstance(one, dict) and {"from", "to", "loss"} <= set(one) for one in found
    )
    return found if whole else []


def draw_positions(ax, ranges: list[dict], key: str, label: str, color: str, line: str) -> None:
    """Plot a loss by position: one horizontal line for each range of ``PositionRanges.records``."""
    for number, one in enumerate(ranges):
        ax.plot(
            [one["from"], one["to"]], [one[key]] * 2, line, color=color, linewidth=2, label=None if number else label
        )
