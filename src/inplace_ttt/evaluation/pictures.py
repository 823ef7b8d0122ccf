"""Pictures of an evaluation, for papers: losses by position, scores by length, heat maps."""

from pathlib import Path

from inplace_ttt.evaluation.scores import Scores
from inplace_ttt.training.plots import COLORS, INK, panels, pyplot, save, style

MARKS = "osD^v"


def draw(task: str, scores: Scores, folder: Path) -> list[Path]:
    """Draw what a task has measured, and return the files."""
    if task == "position":
        return [draw_positions(scores, folder / "position.png")]
    if task == "final-block":
        return [draw_contexts(scores, folder / "final-block.png")]
    if task == "harness":
        return []
    if task == "needle":
        return [draw_depths(scores, folder / "needle.png")]
    return [draw_lengths(scores, folder / "ruler.png"), draw_tasks(scores, folder / "ruler_tasks.png")]


def draw_positions(scores: Scores, picture: Path) -> Path:
    """Draw the loss of each range as a step with its interval, and beside it the differences to the first model."""
    labels = labels_of(scores)
    figure, (ax, *rest) = panels(1 + (len(labels) > 1))
    style(ax, "Loss by position", "position in the document (tokens)", "loss (nats per token)")
    ranges = {row: tuple(map(int, row[0].split("-"))) for row in scores.cells}
    for number, label in enumerate(labels):
        color = COLORS[number % len(COLORS)]
        for first, (row, cells) in enumerate(scores.cells.items()):
            one, (start, stop) = cells[label], ranges[row]
            ax.plot([start, stop], [one.mean] * 2, color=color, linewidth=2, label=None if first else label)
            ax.fill_between([start, stop], one.low, one.high, color=color, alpha=0.15, linewidth=0)
    ax.legend(frameon=False)
    for panel in rest:
        style(
            panel, f"less the loss of {labels[0]}", "position in the document (tokens)", "difference (nats per token)"
        )
        panel.axhline(0, color=INK, linewidth=0.8)
        for number, label in enumerate(labels[1:], 1):
            color = COLORS[number % len(COLORS)]
            for first, (row, cells) in enumerate(scores.differences.items()):
                if label in cells:
                    one, (start, stop) = cells[label], ranges[row]
                    panel.plot([start, stop], [one.mean] * 2, color=color, linewidth=2, label=None if first else label)
                    panel.fill_between([start, stop], one.low, one.high, color=color, alpha=0.15, linewidth=0)
        panel.legend(frameon=False)
    save(figure, picture)
    return picture


def draw_contexts(scores: Scores, picture: Path) -> Path:
    """Draw the loss of the final block against the context before it."""
    figure, (ax,) = panels(1)
    style(ax, "Loss on the final block", "tokens before the block", "loss (nats per token)")
    _draw_curves(ax, scores, {row: int(row[0]) for row in scores.cells})
    save(figure, picture)
    return picture


def draw_lengths(scores: Scores, picture: Path) -> Path:
    """Draw the mean score against the length."""
    figure, (ax,) = panels(1)
    means = {row: int(row[0]) for row in scores.cells if row[1] == "mean"}
    count = len({row[1] for row in scores.cells}) - 1
    samples = next(iter(scores.cells[next(iter(means))].values())).samples // count
    style(ax, "RULER", "length (tokens)", "score", f"mean of {count} tasks, {samples} samples each, 95% intervals")
    _draw_curves(ax, scores, means)
    ax.set_ylim(-3, 103)
    save(figure, picture)
    return picture


def draw_tasks(scores: Scores, picture: Path) -> Path:
    """Draw a heat map of the score of each task at each length, a panel for each model."""
    tasks = [task for task in dict.fromkeys(row[1] for row in scores.cells) if task != "mean"]
    lengths = list(dict.fromkeys(row[0] for row in scores.cells))
    return _draw_maps(scores, tasks, lengths, lambda task, length: (length, task), "task", picture)


def draw_depths(scores: Scores, picture: Path) -> Path:
    """Draw the heat map of a needle: depth by length, a panel for each model."""
    depths = sorted({row[1] for row in scores.cells if row[1] != "mean"}, key=float)
    lengths = list(dict.fromkeys(row[0] for row in scores.cells))
    return _draw_maps(
        scores, depths, lengths, lambda depth, length: (length, depth), "depth of the needle (%)", picture
    )


def labels_of(scores: Scores) -> list[str]:
    """Return the models of a table."""
    return list(next(iter(scores.cells.values())))


def _draw_curves(ax, scores: Scores, places: dict) -> None:
    labels = labels_of(scores)
    for number, label in enumerate(labels):
        cells = [scores.cells[row][label] for row in places]
        x = list(places.values())
        ax.errorbar(
            x, [one.mean for one in cells],
            yerr=[[one.mean - one.low for one in cells], [one.high - one.mean for one in cells]],
            marker=MARKS[number % len(MARKS)], color=COLORS[number % len(COLORS)], linewidth=2, capsize=3, label=label,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(places.values()), [short(place) for place in places.values()])
    ax.minorticks_off()
    ax.legend(frameon=False)


def _draw_maps(scores: Scores, rows: list[str], lengths: list[str], key, ylabel: str, picture: Path) -> Path:
    labels, plt = labels_of(scores), pyplot()
    width, height = 1.6 + 0.75 * max(len(lengths), 3), 1.6 + 0.36 * max(len(rows), 5)
    figure, axs = plt.subplots(
        1, len(labels), figsize=(width * len(labels) + 0.9, height), dpi=150, squeeze=False, layout="constrained"
    )
    counts = {
        interval.samples for row, cells in scores.cells.items() if row[1] != "mean" for interval in cells.values()
    }
    for ax, label in zip(axs[0], labels, strict=True):
        values = [[scores.cells[key(row, length)][label].mean for length in lengths] for row in rows]
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                ax.text(
                    x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=INK if value > 60 else "white"
                )
        ax.set_title(label, loc="left", fontweight="bold", color=INK, fontsize=10)
        ax.set_xticks(range(len(lengths)), [short(int(length)) for length in lengths])
        ax.set_yticks(range(len(rows)), rows)
        ax.set_xlabel("length (tokens)", color=INK)
        for side in ax.spines.values():
            side.set_visible(False)
    axs[0][0].set_ylabel(ylabel, color=INK)
    samples = "/".join(map(str, sorted(counts)))
    figure.colorbar(image, ax=list(axs[0]), label=f"score, {samples} samples a cell", fraction=0.05, pad=0.02)
    save(figure, picture, tight=False)
    return picture


def short(tokens: int) -> str:
    """Return 4k for 4096, 1000 for 1000."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
