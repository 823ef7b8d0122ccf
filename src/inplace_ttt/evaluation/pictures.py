"""Draw the figures of an evaluation, for papers: losses by position, scores by length, heat maps."""

from pathlib import Path

from inplace_ttt.evaluation.scores import Scores
from inplace_ttt.evaluation.statistics import Interval
from inplace_ttt.plots import COLORS, INK, panels, pyplot, save, style

MARKS = "osD^vP*X"
MEAN = "mean"
LONGEST = 32  # characters of a model's name in a figure


def draw_positions(scores: Scores, picture: Path) -> Path:
    """Draw the loss of each range as a step, and in a second panel the differences to the first model.

    Bands are 95% intervals. With several models only the differences have bands, because those of the losses overlap.
    """
    figure, (ax, *rest) = panels(1 + (len(scores.labels) > 1))
    where = "position in the document (tokens)"
    style(ax, "Loss by position", where, "loss (nats per token)", _about(scores))
    ranges = {row: tuple(map(int, row[0].split("-"))) for row in scores.cells}
    for number, label in enumerate(scores.labels):
        cells = {row: cells[label] for row, cells in scores.cells.items()}
        _draw_steps(ax, ranges, cells, number, label, bands=not rest)
    _legend(ax)
    for panel in rest:
        title = f"Difference to {shortened(scores.labels[0])}"
        style(panel, title, where, "difference in loss (nats per token)", "above 0: worse; 95% intervals")
        panel.axhline(0, color=INK, linewidth=0.8)
        for number, label in enumerate(scores.labels[1:], 1):
            cells = {row: cells[label] for row, cells in scores.differences.items() if label in cells}
            _draw_steps(panel, ranges, cells, number, label, bands=True)
        _legend(panel)
    save(figure, picture)
    return picture


def draw_contexts(scores: Scores, picture: Path) -> Path:
    """Draw the loss of the final block over the context length, and the differences to the first model."""
    figure, (ax, *rest) = panels(1 + (len(scores.labels) > 1))
    places = {row: int(row[0]) for row in scores.cells}
    style(ax, "Loss on the final block", "tokens before the block", "loss (nats per token)", _about(scores))
    _draw_curves(ax, scores.cells, scores.labels, places, 0)
    for panel in rest:
        title = f"Difference to {shortened(scores.labels[0])}"
        subtitle = "above 0: worse; 95% intervals"
        style(panel, title, "tokens before the block", "difference in loss (nats per token)", subtitle)
        panel.axhline(0, color=INK, linewidth=0.8)
        _draw_curves(panel, scores.differences, scores.labels[1:], places, 1)
    save(figure, picture)
    return picture


def draw_lengths(scores: Scores, picture: Path) -> Path:
    """Draw the mean score over the length."""
    figure, (ax,) = panels(1)
    means = {row: int(row[0]) for row in scores.cells if row[1] == MEAN}
    tasks = list(dict.fromkeys(row[1] for row in scores.cells if row[1] != MEAN))
    samples = sorted({cells[label].samples for row, cells in scores.cells.items() if row[1] != MEAN for label in cells})
    what = f"the mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
    subtitle = f"{what}, {'/'.join(map(str, samples))} samples per task, {scores.about}, 95% intervals"
    style(ax, "RULER", "length (tokens)", "score (of 100)", subtitle)
    _draw_curves(ax, scores.cells, scores.labels, means, 0)
    ax.set_ylim(-3, 103)
    save(figure, picture)
    return picture


def draw_tasks(scores: Scores, picture: Path) -> Path:
    """Draw a heat map of the scores, task by length, with one panel per model."""
    tasks = list(dict.fromkeys(row[1] for row in scores.cells))
    return _draw_maps(scores, tasks, "task", "RULER by task", picture)


def draw_depths(scores: Scores, picture: Path) -> Path:
    """Draw a heat map of the needle scores, depth by length, with one panel per model."""
    depths = sorted({row[1] for row in scores.cells if row[1] != MEAN}, key=float)
    return _draw_maps(scores, [*depths, MEAN], "depth of the needle (%)", "A needle in a haystack", picture)


def _about(scores: Scores) -> str:
    """Return the subtitle of a figure: number and source of its samples."""
    counts = {interval.samples for cells in scores.cells.values() for interval in cells.values()}
    few = "/".join(map(str, sorted(counts))) if len(counts) < 4 else f"{min(counts)} to {max(counts)}"
    intervals = ", 95% intervals" if len(scores.labels) == 1 else ""
    return f"{few} {scores.about}{intervals}"


def _legend(ax) -> None:
    """Draw the legend below the panel, where it covers no data."""
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2, fontsize=9)


def _draw_steps(ax, ranges: dict, cells: dict[tuple, Interval], number: int, label: str, bands: bool) -> None:
    color = COLORS[number % len(COLORS)]
    for first, (row, one) in enumerate(cells.items()):
        start, stop = ranges[row]
        ax.plot([start, stop], [one.mean] * 2, color=color, linewidth=2, label=None if first else shortened(label))
        if bands and one.low is not None:
            ax.fill_between([start, stop], one.low, one.high, color=color, alpha=0.15, linewidth=0)


def _draw_curves(ax, rows: dict, labels: list[str], places: dict, first: int) -> None:
    """Draw one curve per model, slightly shifted horizontally so that equal curves stay visible."""
    for number, label in enumerate(labels, first):
        cells = {row: rows[row][label] for row in places if label in rows[row]}
        shift = 1 + 0.015 * (number - first - (len(labels) - 1) / 2)
        known = [(one.mean - one.low, one.high - one.mean) if one.low is not None else (0, 0) for one in cells.values()]
        ax.errorbar(
            [places[row] * shift for row in cells], [one.mean for one in cells.values()],
            yerr=list(zip(*known, strict=True)) if known else None,
            marker=MARKS[number % len(MARKS)], color=COLORS[number % len(COLORS)], capsize=3, label=shortened(label),
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(places.values()), [short(place) for place in places.values()])
    ax.minorticks_off()
    _legend(ax)


def _draw_maps(scores: Scores, rows: list[str], ylabel: str, title: str, picture: Path) -> Path:
    labels, plt = scores.labels, pyplot()
    lengths = list(dict.fromkeys(row[0] for row in scores.cells))
    width, height = 2.2 + 0.7 * max(len(lengths), 2), 1.9 + 0.34 * max(len(rows), 5)
    figure, axs = plt.subplots(
        1, len(labels), figsize=(width * len(labels) + 0.9, height), dpi=150, squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    counts = {one.samples for row, cells in scores.cells.items() if row[1] != MEAN for one in cells.values()}
    for ax, label in zip(axs[0], labels, strict=True):
        values = [[scores.cells[length, row][label].mean for length in lengths] for row in rows]
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                color = INK if value > 60 else "white"
                ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        ax.set_title(_folded(shortened(label)), loc="left", color=INK, fontsize=9)
        ax.set_xticks(range(len(lengths)), [short(int(length)) for length in lengths])
        ax.set_yticks(range(len(rows)), rows)
        ax.set_xlabel("length (tokens)", color=INK)
        # white lines between cells, and a wider line above the mean
        ax.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
        ax.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
        ax.grid(which="minor", color="white", linewidth=1.5)
        ax.tick_params(which="minor", length=0)
        if rows[-1] == MEAN:
            ax.axhline(len(rows) - 1.5, color="white", linewidth=5)
        for side in ax.spines.values():
            side.set_visible(False)
    axs[0][0].set_ylabel(ylabel, color=INK)
    samples = "/".join(map(str, sorted(counts)))
    word = "sample" if samples == "1" else "samples"
    figure.colorbar(image, ax=list(axs[0]), label="score (of 100)", fraction=0.05, pad=0.02)
    figure.suptitle(f"{title}\n{samples} {word} per cell, {scores.about}", x=0.01, ha="left", fontsize=10, color=INK)
    save(figure, picture, tight=False)
    return picture


def _folded(label: str) -> str:
    """Return a label with a line break before its mode, to fit above a panel."""
    return label.replace(" (", "\n(")


def shortened(label: str) -> str:
    """Return a label that fits in a figure: a long name is shortened in the middle, the mode is kept."""
    name, mode = (label, "") if " (" not in label else (label[: label.rindex(" (")], label[label.rindex(" (") :])
    return label if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 1 :]}{mode}"


def short(tokens: int) -> str:
    """Return a token count in short form: 4k for 4096, 1000 for 1000."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
