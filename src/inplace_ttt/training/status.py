"""How a run stands, read from its folder alone: what a terminal shows, and a picture of it."""

import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from inplace_ttt.config import UserError
from inplace_ttt.files import read_yaml
from inplace_ttt.training.plots import COLORS, INK, running_mean, save, style
from inplace_ttt.training.records import duration, read_metrics
from inplace_ttt.training.timeline import Lost, read_timeline

BARS = "▁▂▃▄▅▆▇█"
RECENT = 20  # steps that speed is the median of


@dataclass
class Status:
    folder: Path
    config: dict
    steps: list[dict]
    evals: list[dict]
    timeline: list[dict]
    age: float | None  # seconds since the last record

    @classmethod
    def read(cls, folder: Path) -> "Status":
        """Raises UserError where the folder is not a run's."""
        record, metrics = folder / "config.yaml", folder / "metrics.jsonl"
        if not record.is_file():
            raise UserError(f"'{folder}' is no run: there is no '{record}'; name the run.dir of one")
        records = read_metrics(metrics)
        steps = [one for one in records if not one.get("eval")]
        evals = [one for one in records if one.get("eval")]
        age = max(0.0, time.time() - metrics.stat().st_mtime) if metrics.is_file() else None
        return cls(folder, read_yaml(record), steps, evals, read_timeline(folder), age)

    @property
    def total(self) -> int:
        return self.config["train"]["steps"]

    @property
    def last(self) -> dict:
        return self.steps[-1] if self.steps else {}

    @property
    def step_seconds(self) -> float:
        """Median of the last steps; 0 before the first."""
        return statistics.median([one["step_seconds"] for one in self.steps[-RECENT:]] or [0.0])

    @property
    def ratios(self) -> dict[str, list[float]]:
        """|sum of updates| / |W_down| at each step, by TTT layer."""
        keys = [key for key in self.last if key.startswith("update_ratio/")]
        return {key.removeprefix("update_ratio/"): [one.get(key, 0.0) for one in self.steps] for key in keys}

    @property
    def lost(self) -> Lost:
        return Lost.of(self.timeline)

    @property
    def slow(self) -> list[dict]:
        """Ranks that held up the others when they were last compared, in the present start."""
        seen = []
        for event in self.timeline:
            if event["event"] in ("start", "ranks"):
                seen = event.get("slow", [])
        return seen

    def state(self) -> tuple[str, str]:
        """(what the run does, a colour for it)"""
        if not self.timeline:
            return "not started", "yellow"
        event = self.timeline[-1]
        if event["event"] == "end":
            return event["why"], "green" if event["why"] == "done" else "yellow"
        if not self.steps or self.age is None:
            return "starting", "yellow"
        patience = max(60.0, 5 * self.step_seconds)
        if self.age > patience:
            return f"silent for {duration(self.age)}: hanging, evaluating, or killed", "red"
        return "running", "green"

    def eta(self) -> str:
        left = self.total - self.last.get("step", 0)
        return duration(left * self.step_seconds) if self.steps and left else "-"


def screen(status: Status, width: int) -> Group:
    """The whole status for a terminal."""
    says, color = status.state()
    last, lost = status.last, status.lost
    head = Text()
    head.append(f"{status.config['run']['name']}  ", style="bold")
    head.append(says, style=color)
    numbers = Table.grid(padding=(0, 3))
    step = last.get("step", 0)
    numbers.add_row("step", f"{step:,} of {status.total:,} ({step / status.total:.1%})", "time left", status.eta())
    if last:
        peak, loss = last["peak_memory_gib"], f"{last['loss']:.4f}"
        if status.evals:
            loss += f", held out {status.evals[-1]['loss']:.4f} (step {status.evals[-1]['step']})"
        numbers.add_row("loss", loss, "gradient norm", f"{last['grad_norm']:.3f}")
        speed = statistics.median([one["tokens_per_second"] for one in status.steps[-RECENT:]])
        numbers.add_row(
            "speed", f"{speed:,.0f} tokens/s, {status.step_seconds:.2f} s a step", "memory", f"{peak:.1f} GiB"
        )
    parts = [Panel(Group(head, numbers), title=str(status.folder), title_align="left")]
    if last:
        room = max(20, min(80, width - 40))
        curves = Table.grid(padding=(0, 2))
        curves.add_row("loss", sparkline([one["loss"] for one in status.steps], room), _range(status.steps, "loss"))
        curves.add_row("tokens/s", sparkline([one["tokens_per_second"] for one in status.steps], room), "")
        for name, values in status.ratios.items():
            curves.add_row(f"update norm, {name.replace('_', ' ')}", sparkline(values, room), f"{values[-1]:.4f}")
        parts.append(Panel(curves, title="from the first step to the last", title_align="left"))
    parts.append(Panel(_events(status, lost), title="restarts and ranks", title_align="left"))
    return Group(*parts)


def sparkline(values: list[float], width: int) -> str:
    """Means of as many equal parts as there is room for, as bars."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _range(steps: list[dict], key: str) -> str:
    return f"{steps[0][key]:.4g} → {steps[-1][key]:.4g}"


def _events(status: Status, lost: Lost) -> Text:
    text = Text()
    starts = [event for event in status.timeline if event["event"] == "start"]
    if starts:
        last = starts[-1]
        text.append(f"{last['ranks']} ranks on {', '.join(last['hosts'])}\n")
    if lost.restarts:
        share = lost.seconds / (lost.seconds + sum(one["step_seconds"] for one in status.steps) or 1.0)
        text.append(
            f"{lost.restarts} restart{'s' if lost.restarts > 1 else ''} cost {duration(lost.seconds)} "
            f"({share:.1%} of the time): {duration(lost.down_seconds)} without a step, "
            f"{duration(lost.redone_seconds)} in {lost.redone_steps} steps that were done twice\n"
        )
        for event in starts[-3:]:
            when = time.strftime("%F %T", time.localtime(event["time"]))
            text.append(f"  {when}  started after step {event['step']}\n", style="dim")
    else:
        text.append("no restarts\n")
    if status.slow:
        for one in status.slow[:4]:
            text.append(f"{one['says']}\n", style="red")
    elif len(starts) and starts[-1]["ranks"] > 1:
        text.append("no rank holds up the others\n")
    text.rstrip()
    return text


def picture(status: Status, path: Path) -> None:
    """Loss, speed, update norms and the time that went to restarts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(2, 2, figsize=(12, 7), dpi=130)
    (loss, speed), (ratios, spent) = places
    x = [one["step"] for one in status.steps]
    style(loss, "Loss", "step", "nats per token")
    values = [one["loss"] for one in status.steps]
    loss.plot(x, values, color=COLORS[0], alpha=0.3, linewidth=1)
    loss.plot(x, running_mean(values), color=COLORS[0], linewidth=2, label="training, running mean")
    if status.evals:
        at = [one["step"] for one in status.evals]
        loss.plot(at, [one["loss"] for one in status.evals], "o-", color=COLORS[1], markersize=4, label="held out")
    if values:
        loss.legend(frameon=False)
    style(speed, "Speed", "step", "tokens per second")
    speed.plot(x, [one["tokens_per_second"] for one in status.steps], color=COLORS[2], linewidth=1.2)
    speed.set_ylim(bottom=0)
    style(ratios, "Fast weights", "step", "|updates of a document| / |W_down|")
    for (name, series), color in zip(status.ratios.items(), COLORS * 8, strict=False):
        ratios.plot(x, series, linewidth=1.2, color=color, label=name.replace("_", " "))
    if status.ratios:
        ratios.legend(frameon=False, ncols=2, fontsize=8)
    lost, trained = status.lost, sum(one["step_seconds"] for one in status.steps)
    everything = trained + lost.seconds
    unit, name = (3600, "hours") if everything > 7200 else (60, "minutes") if everything > 120 else (1, "seconds")
    style(spent, "Time", name, "")
    spans = {
        "steps": trained / unit,
        "steps done twice": lost.redone_seconds / unit,
        "between starts": lost.down_seconds / unit,
    }
    bars = spent.barh(list(spans), list(spans.values()), color=[COLORS[2], COLORS[4], COLORS[1]])
    spent.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    spent.invert_yaxis()
    spent.margins(x=0.15)
    for start in (event for event in status.timeline if event["event"] == "start" and event["step"]):
        for ax in (loss, speed, ratios):
            ax.axvline(start["step"], color="#999999", linestyle=":", linewidth=1)
    says, _ = status.state()
    slow = "; ".join(one["says"] for one in status.slow[:2])
    title = f"{status.config['run']['name']}: step {status.last.get('step', 0):,} of {status.total:,}, {says[:90]}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
    if slow:
        figure.text(0.01, 0.005, slow[:180], color=COLORS[1], fontsize=8)
    save(figure, path)
