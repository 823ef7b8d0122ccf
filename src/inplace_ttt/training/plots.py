"""The picture of a run: loss against tokens."""

from pathlib import Path

from inplace_ttt.training.records import read_metrics

INK, GRID = "#333333", "#dddddd"
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700")


def axes(title: str, xlabel: str, ylabel: str, subtitle: str = ""):
    """An empty figure in the project's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 4.8), dpi=150)
    style(ax, title, xlabel, ylabel, subtitle)
    return figure, ax


def style(ax, title: str, xlabel: str, ylabel: str, subtitle: str = "") -> None:
    ax.set_title(title, loc="left", fontweight="bold", color=INK, pad=22 if subtitle else None)
    ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=9, color="#666666")
    ax.set_xlabel(xlabel, color=INK)
    ax.set_ylabel(ylabel, color=INK)
    ax.grid(color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def running_mean(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential, without a pull towards the start."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return smooth


def plot_loss(metrics: Path, picture: Path, name: str) -> None:
    """Training loss of each step with its running mean, and held-out loss, against millions of tokens."""
    records = read_metrics(metrics)
    steps = [r for r in records if not r.get("eval")]
    if not steps:
        return
    at = {r["step"]: r.get("tokens", 0) / 1e6 for r in steps}
    x, loss = list(at.values()), [r["loss"] for r in steps]
    figure, ax = axes(name, "tokens (millions)", "loss (nats per token)")
    ax.plot(x, loss, color=COLORS[0], alpha=0.3, linewidth=1, label="training, each step")
    ax.plot(x, running_mean(loss), color=COLORS[0], linewidth=2, label="training, running mean")
    held_out = [(at[r["step"]], r["loss"]) for r in records if r.get("eval") and r["step"] in at]
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "o-", color=COLORS[1], linewidth=1.5, markersize=5, label="held out")
        ax.annotate(
            f"{held_out[-1][1]:.3f}",
            held_out[-1],
            textcoords="offset points",
            xytext=(-4, 8),
            ha="right",
            color=COLORS[1],
        )
    ax.legend(frameon=False)
    save(figure, picture)
