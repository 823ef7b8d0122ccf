"""Run sweeps: one run for each combination of values, in folders below one folder, and a table of their results."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from inplace_ttt.config import UserError
from inplace_ttt.plots import COLORS, axes, save
from inplace_ttt.training.records import read_metrics

MAX_RUNS = 1000
OWN_KEYS = ("run.dir", "run.name")  # the sweep sets them
_OPENS, _CLOSES, _QUOTES = "([{", ")]}", "\"'"


@dataclass(frozen=True)
class Point:
    """Hold one combination of values."""

    name: str  # folder of the run, such as chunk_size=256_eta=0.3
    values: dict[str, str]  # the swept keys
    overrides: list[str]  # the whole command line of the run, without run.dir and run.name


@dataclass(frozen=True)
class Result:
    """Hold the results of a run; None where there is no record yet."""

    name: str
    values: dict[str, str]
    step: int
    steps: int | None  # train.steps
    loss: float | None  # held-out loss of the last evaluation
    loss_without: float | None  # the same, fast weights off
    last_range: float | None  # held-out loss of the last range of positions
    update_ratio: float | None  # largest |sum of updates| / |W_down| of a layer in a step of the run
    tokens_per_second: float | None
    state: str  # done, unfinished, failed, waiting


def split_values(text: str) -> list[str]:
    """Return the values of an override, separated by commas that are outside of brackets and quotes.

    Example::

        >>> split_values("[0,6],every 6th")
        ['[0,6]', 'every 6th']
    """
    values, depth, quote, current = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPENS:
            depth += 1
        elif letter in _CLOSES:
            depth -= 1
        if letter == "," and not depth and not quote:
            values.append(current)
            current = ""
        else:
            current += letter
    return [value.strip() for value in (*values, current)]


def points(overrides: Sequence[str]) -> list[Point]:
    """Return all combinations of the values of a command line, the last key changing fastest.

    Raises UserError if no key has several values, a value occurs twice or is empty, a key occurs twice, or a key is the
    sweep's own.
    """
    keys = [override.partition("=")[0] for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if keys.count(key) > 1:
            raise UserError(f"{override}: {key} is given twice: write its values as {key}=A,B")
        if key in OWN_KEYS:
            raise UserError(f"{override}: a sweep sets {key} for each of its runs: use --folder for the whole sweep")
    choices = {key: split_values(value) for key, _, value in (one.partition("=") for one in overrides)}
    swept = {key: values for key, values in choices.items() if len(values) > 1}
    if not swept:
        raise UserError("no key has several values: separate them by commas, such as ttt.chunk_size=256,512,1024")
    for key, values in swept.items():
        if "" in values or len(set(values)) < len(values):
            raise UserError(f"{key}={','.join(values)}: a value is empty or occurs twice: name each value once")
    count = 1
    for values in swept.values():
        count *= len(values)
    if count > MAX_RUNS:
        raise UserError(f"these values make {count:,} runs: sweep at most {MAX_RUNS:,}")
    found = []
    for combination in itertools.product(*swept.values()):
        chosen = dict(zip(swept, combination, strict=True))
        rest = [override for override in overrides if override.partition("=")[0] not in swept]
        name = "_".join(f"{_short(key, swept)}={_plain(value)}" for key, value in chosen.items())
        found.append(Point(name, chosen, [*rest, *(f"{key}={value}" for key, value in chosen.items())]))
    names = [point.name.lower() for point in found]  # some file systems ignore case
    if len(set(names)) < len(names) or max(map(len, names)) > 200:
        found = [Point(f"run_{number}", point.values, point.overrides) for number, point in enumerate(found)]
    return found


def _short(key: str, swept: dict) -> str:
    """Return the last part of a key, or the whole key if another swept key has the same last part."""
    last = key.rpartition(".")[2]
    return key if [other.rpartition(".")[2] for other in swept].count(last) > 1 else last


def _plain(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", value).strip("-") or "value"


def read_result(point: Point, folder: Path, steps: int | None, failed: bool = False) -> Result:
    """Read the result of a run from its folder."""
    records = read_metrics(folder / "metrics.jsonl")
    trained = [one for one in records if not one.get("eval")]
    evaluated = [one for one in records if one.get("eval") and isinstance(one.get("loss"), int | float)]
    step = trained[-1]["step"] if trained else 0
    last = evaluated[-1] if evaluated else {}
    ranges = last.get("position") or [{}]
    speeds = sorted(one["tokens_per_second"] for one in trained if "tokens_per_second" in one)
    ratios = [value for one in trained for key, value in one.items() if key.startswith("update_ratio/")]
    done = steps is not None and step >= steps
    return Result(
        point.name,
        point.values,
        step,
        steps,
        last.get("loss"),
        last.get("loss_without_fast_weights"),
        ranges[-1].get("loss"),
        max(ratios, default=None),
        speeds[len(speeds) // 2] if speeds else None,
        "done" if done else "failed" if failed else "unfinished" if step else "waiting",
    )


def table(results: Sequence[Result]) -> Table:
    """Return a table of results, in which the lowest held-out loss of finished runs is bold."""
    best = min((one.loss for one in results if one.state == "done" and one.loss is not None), default=None)
    shown = Table(title="held-out loss", title_justify="left")
    for key in results[0].values:
        shown.add_column(key)
    for title in ("held out", "fast weights off", "last range", "update ratio", "tokens/s", "step", "state"):
        shown.add_column(title, justify="right")
    for one in results:
        cells = [
            _number(one.loss, ".4f"),
            _number(one.loss_without, ".4f"),
            _number(one.last_range, ".4f"),
            _number(one.update_ratio, ".3g"),
            _number(one.tokens_per_second, ",.0f"),
            f"{one.step}/{one.steps}" if one.steps else str(one.step),
            one.state,
        ]
        style = "bold" if one.loss is not None and one.loss == best and one.state == "done" else None
        shown.add_row(*one.values.values(), *cells, style=style)
    return shown


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    keys = list(results[0].values)
    lines = [[*keys, "held out", "fast weights off", "last range", "update ratio", "steps"], ["---"] * (len(keys) + 5)]
    for one in results:
        values = (one.loss, one.loss_without, one.last_range)
        lines.append(
            [*one.values.values(), *(_number(value, ".4f") for value in values), _number(one.update_ratio, ".3g"),
             f"{one.step}" if one.state == "done" else f"{one.step} of {one.steps}"]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write(folder: Path, command: str, results: Sequence[Result]) -> None:
    """Write sweep.json, sweep.md and sweep.png (held-out loss by step) to the folder of a sweep."""
    content = dict(command=command, runs=[asdict(one) for one in results])
    (folder / "sweep.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "sweep.md").write_text(markdown(results), encoding="utf-8")
    figure, ax = axes(f"Held-out loss: {', '.join(results[0].values)}", "training step", "loss")
    drawn = False
    for number, one in enumerate(results):
        records = [each for each in read_metrics(folder / one.name / "metrics.jsonl") if each.get("eval")]
        if records:
            steps, losses = [each["step"] for each in records], [each["loss"] for each in records]
            label = ", ".join(one.values.values())
            dashes = ("-", "--", ":")[number // len(COLORS) % 3]
            ax.plot(steps, losses, dashes, marker="o", markersize=3, color=COLORS[number % len(COLORS)], label=label)
            drawn = True
    if drawn:
        ax.legend(frameon=False, fontsize=8, ncols=max(1, len(results) // 8))
    save(figure, folder / "sweep.png")
