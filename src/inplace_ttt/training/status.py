"""Show the status of a run, read only from its folder: as text for a terminal, and as a picture."""

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
from inplace_ttt.plots import COLORS, INK, label_last, pyplot, running_mean, save, style, window_of
from inplace_ttt.training.records import duration, read_metrics
from inplace_ttt.training.timeline import RestartCost, read_timeline

BARS = "▁▂▃▄▅▆▇█"
RECENT = 20  # number of last steps that speeds are medians of


@dataclass
class Status:
    """Hold the records of a run."""

    folder: Path
    config: dict
    steps: list[dict]
    evals: list[dict]
    timeline: list[dict]
    age: float | None  # seconds since the last record
    fault: str | None = None  # error in config.yaml

    @classmethod
    def read(cls, folder: Path) -> "Status":
        """Read the files of a run folder and skip damaged parts. Raises UserError if it is not a run folder."""
        record, metrics = folder / "config.yaml", folder / "metrics.jsonl"
        if not record.is_file():
            raise UserError(f"'{folder}' is not a run folder ('{record}' does not exist): name the run.dir of a run")
        try:
            config, fault = read_yaml(record), None
        except UserError as error:
            config, fault = {}, str(error)
        records = read_metrics(metrics)
        steps = [one for one in records if not one.get("eval")]
        evals = [one for one in records if one.get("eval")]
        age = max(0.0, time.time() - metrics.stat().st_mtime) if metrics.is_file() else None
        return cls(folder, config, steps, evals, read_timeline(folder), age, fault)

    @property
    def total(self) -> int:
        """Return train.steps, or the last step if the configuration lacks that."""
        steps = self.key("train", "steps")
        return steps if type(steps) is int and steps > 0 else max(1, self.last.get("step", 1))

    @property
    def name(self) -> str:
        """Return run.name, or the name of the folder."""
        return str(self.key("run", "name") or self.folder.name)

    def key(self, section: str, name: str):
        """Return the value of the key ``section.name``, or None if config.yaml lacks it."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    @property
    def last(self) -> dict:
        """Return the record of the last step, or {} before the first step."""
        return self.steps[-1] if self.steps else {}

    @property
    def step_seconds(self) -> float:
        """Return the median seconds per step of the last steps, or 0 before the first step."""
        return statistics.median([one["step_seconds"] for one in self.steps[-RECENT:]] or [0.0])

    @property
    def ratios(self) -> dict[str, list[float]]:
        """Return |sum of updates| / |W_down| at each step, by TTT layer."""
        keys = [key for key in self.last if key.startswith("update_ratio/")]
        return {key.removeprefix("update_ratio/"): [one.get(key, 0.0) for one in self.steps] for key in keys}

    @property
    def lost(self) -> RestartCost:
        """Return the cost of restarts after crashes."""
        return RestartCost.of(self.timeline)

    @property
    def slow(self) -> list[dict]:
        """Return the stragglers of the last comparison of ranks since the last start."""
        seen = []
        for event in self.timeline:
            if event["event"] in ("start", "ranks"):
                seen = event.get("slow", [])
        return seen

    def state(self) -> tuple[str, str]:
        """Return (description of the state, colour)."""
        if not self.timeline:
            return "not started", "yellow"
        event = self.timeline[-1]
        if event["event"] == "end":
            return event["why"], "green" if event["why"] == "done" else "yellow"
        if not self.steps or self.age is None:
            return "starting", "yellow"
        patience = max(60.0, 5 * self.step_seconds)
        if self.age > patience:
            return f"no record for {duration(self.age)}: hanging, evaluating, or killed", "red"
        return "running", "green"

    def eta(self) -> str:
        """Return the time left as text, or "-" if it is unknown or the run is done."""
        left = self.total - self.last.get("step", 0)
        return duration(left * self.step_seconds) if self.steps and left else "-"


def screen(status: Status, width: int) -> Group:
    """Return the status as text for a terminal of ``width`` columns."""
    says, color = status.state()
    last, lost = status.last, status.lost
    head = Text()
    head.append(f"{status.name}  ", style="bold")
    head.append(says, style=color)
    if status.fault:
        head.append(f"\n{status.fault}", style="red")
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
            "speed", f"{speed:,.0f} tokens/s, {status.step_seconds:.2f} s per step", "memory", f"{peak:.1f} GiB"
        )
    parts = [Panel(Group(head, numbers), title=str(status.folder), title_align="left")]
    if last:
        room = max(20, min(80, width - 40))
        curves = Table.grid(padding=(0, 2))
        curves.add_row("loss", sparkline([one["loss"] for one in status.steps], room), _range(status.steps, "loss"))
        curves.add_row("tokens/s", sparkline([one["tokens_per_second"] for one in status.steps], room), "")
        for name, values in status.ratios.items():
            curves.add_row(f"update ratio, {name.replace('_', ' ')}", sparkline(values, room), f"{values[-1]:.4f}")
        parts.append(Panel(curves, title="from the first step to the last", title_align="left"))
    parts.append(Panel(_events(status, lost), title="restarts and ranks", title_align="left"))
    return Group(*parts)


def sparkline(values: list[float], width: int) -> str:
    """Return ``values`` as at most ``width`` bars; longer lists are averaged in equal parts."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _range(steps: list[dict], key: str) -> str:
    return f"{steps[0][key]:.4g} → {steps[-1][key]:.4g}"


def _events(status: Status, lost: RestartCost) -> Text:
    text = Text()
    starts = [event for event in status.timeline if event["event"] == "start"]
    if starts:
        last = starts[-1]
        text.append(f"{last['ranks']} rank{'s' if last['ranks'] > 1 else ''} on {', '.join(last['hosts'])}\n")
    if lost.restarts:
        share = lost.seconds / (lost.seconds + sum(one["step_seconds"] for one in status.steps) or 1.0)
        text.append(
            f"{lost.restarts} restart{'s' if lost.restarts > 1 else ''} cost {duration(lost.seconds)} "
            f"({share:.1%} of the time): {duration(lost.down_seconds)} without a step, "
            f"{duration(lost.redone_seconds)} for {lost.redone_steps} repeated steps\n"
        )
        for event in starts[-3:]:
            when = time.strftime("%F %T", time.localtime(event["time"]))
            text.append(f"  {when}  started after step {event['step']}\n", style="dim")
    else:
        text.append("no restarts after crashes\n")
    if status.slow:
        for one in status.slow[:4]:
            text.append(f"{one.get('says', '') if isinstance(one, dict) else one}\n", style="red")
    elif len(starts) and starts[-1]["ranks"] > 1:
        text.append("no stragglers\n")
    text.rstrip()
    return text


def picture(status: Status, path: Path) -> None:
    """Plot loss, speed, update ratios with ttt.max_update_ratio, gradient norm and learning rate, memory, and the time
    lost by restarts, to the PNG file ``path``."""
    figure, places = pyplot().subplots(2, 3, figsize=(16, 8), dpi=120)
    (loss, speed, ratios), (gradient, memory, spent) = places
    x, steps = [one["step"] for one in status.steps], status.steps
    style(loss, "Loss", "step", "nats per token")
    values = [one["loss"] for one in steps]
    mean = running_mean(values, window_of(values))
    loss.plot(x, values, color=COLORS[0], alpha=0.3 if window_of(values) > 1 else 1, label="training, each step")
    if window_of(values) > 1:
        loss.plot(x, mean, color=COLORS[0], linewidth=2, label=f"mean of the last {window_of(values)}")
    label_last(loss, x, mean, COLORS[0])
    if status.evals:
        at, held_out = [one["step"] for one in status.evals], [one["loss"] for one in status.evals]
        loss.plot(at, held_out, "o-", color=COLORS[1], markersize=4, label="held out")
        label_last(loss, at, held_out, COLORS[1], above=not mean or held_out[-1] > mean[-1])
    style(speed, "Speed", "step", "tokens per second")
    speed.plot(
        x, [one["tokens_per_second"] for one in steps], color=COLORS[2], linewidth=1.2, label="tokens per second"
    )
    speed.set_ylim(bottom=0)
    style(ratios, "Fast weights", "step", "|updates of a document| / |W_down|")
    for (name, series), color in zip(status.ratios.items(), COLORS * 8, strict=False):
        ratios.plot(x, series, linewidth=1.2, color=color, label=name.replace("_", " "))
    limit = status.key("ttt", "max_update_ratio")
    if status.ratios and isinstance(limit, int | float):
        ratios.axhline(limit, color=INK, linestyle="--", linewidth=1, label="max_update_ratio")
        ratios.set_yscale("symlog", linthresh=1e-3)
        ratios.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the scale's own writes mathtext
        ratios.set_ylim(bottom=0)
    style(gradient, "Gradient norm and learning rate", "step", "gradient norm")
    gradient.plot(x, [one["grad_norm"] for one in steps], color=COLORS[3], linewidth=1.2, label="gradient norm")
    rate = gradient.twinx()
    rate.plot(x, [one.get("lr", 0.0) for one in steps], color=COLORS[4], linewidth=1.5, label="learning rate (right)")
    rate.set_ylabel("learning rate", color=INK)
    rate.spines["top"].set_visible(False)
    style(memory, "Memory", "step", "GiB on the first rank")
    memory.plot(x, [one["peak_memory_gib"] for one in steps], color=COLORS[0], linewidth=1.5, label="peak")
    for ax in (gradient, rate, memory):
        ax.margins(y=0.3)  # room for the legend
        ax.set_ylim(bottom=0)
    _time(spent, status)
    restarts = [event for event in status.timeline if event["event"] == "start" and event["step"]]
    for start in restarts:
        for ax in (loss, speed, ratios, gradient, memory):
            label = "restart" if start is restarts[0] else None
            ax.axvline(start["step"], color="#999999", linestyle=":", linewidth=1, label=label)
    for ax in (loss, speed, ratios, gradient, memory):
        lines = [line for axes in ([ax, rate] if ax is gradient else [ax]) for line in axes.get_lines()]
        named = [line for line in lines if not line.get_label().startswith("_")]
        if x and named:
            ax.legend(handles=named, frameon=False, fontsize=8, ncols=2 if len(named) > 4 else 1)
    says, _ = status.state()
    title = f"{status.name}: step {status.last.get('step', 0):,} of {status.total:,}, {says[:90]}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
    slow = "; ".join(str(one.get("says", "")) for one in status.slow[:2] if isinstance(one, dict))
    if slow:
        figure.text(0.01, 0.005, slow[:180], color=COLORS[1], fontsize=8)
    save(figure, path)


def _time(ax, status: Status) -> None:
    """Plot the time spent in steps, in repeated steps, and down after crashes."""
    lost, trained = status.lost, sum(one["step_seconds"] for one in status.steps)
    everything = trained + lost.seconds
    unit, name = (3600, "hours") if everything > 7200 else (60, "minutes") if everything > 120 else (1, "seconds")
    style(ax, "Time", name, "")
    spans = {
        "steps": trained / unit,
        "repeated steps": lost.redone_seconds / unit,
        "down after crashes": lost.down_seconds / unit,
    }
    bars = ax.barh(list(spans), list(spans.values()), color=[COLORS[2], COLORS[4], COLORS[1]])
    ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.15)
