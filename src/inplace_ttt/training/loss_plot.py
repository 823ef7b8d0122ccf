"""Draw loss.png of a run: training and held-out loss, and the last held-out loss by position."""

from pathlib import Path

from inplace_ttt.plots import COLORS, label_last, panels, running_mean, save, style, window_of
from inplace_ttt.training.records import read_metrics

WITHOUT, WITHOUT_LABEL = "loss_without_fast_weights", "held out, fast weights off"


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
