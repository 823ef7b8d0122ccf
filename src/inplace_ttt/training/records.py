"""Write the records of a run: metrics.jsonl, terminal output and W&B. Only rank 0 writes them."""

import json
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, TextColumn

from inplace_ttt.config import Config, UserError, one_line
from inplace_ttt.files import read_json_lines, write_text
from inplace_ttt.resilience.signals import block_stop_signals
from inplace_ttt.training.scalars import scalars_of

TIMES = ("tokens_per_second", "step_seconds", "peak_memory_gib")  # measurements of a step that depend on the machine


class MetricsFile:
    """Write metrics.jsonl, one JSON object per line: a training step, or an evaluation after it if ``eval`` is set."""

    def __init__(self, path: Path, last_step: int):
        """Open the file to append after ``last_step``. Remove records beyond it, which a previous start wrote after its
        last checkpoint."""
        from inplace_ttt.training.update_histograms import LastHistograms  # imports torch, which status.py avoids

        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= last_step]
        self.evaluated = max(
            (line["step"] for line in kept if line.get("eval")), default=0
        )  # last step with an evaluation
        self.histograms = LastHistograms()
        for line in kept:
            self.histograms.add(line)
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a", buffering=1)

    def write(self, record: dict) -> None:
        """Append a record."""
        self.file.write(json.dumps(record) + "\n")
        self.histograms.add(record)

    def flush(self) -> None:
        """Flush the file to disk (fsync)."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file. Its records are written (it is line-buffered), but only ``flush`` forces them to disk."""
        self.file.close()


def read_metrics(path: Path) -> list[dict]:
    """Return the valid records of a metrics.jsonl. Skip incomplete and damaged lines."""
    return [record for record in read_json_lines(path)[0] if _is_record(record)]


def _is_record(record: dict) -> bool:
    """Return whether a line has all numbers that a record must have."""
    needed = ("loss",) if record.get("eval") else ("loss", "grad_norm", *TIMES)
    needed += tuple(key for key in record if key.startswith(("update_ratio/", "loss_")))
    step = record.get("step")
    return type(step) is int and 0 <= step < 10**12 and all(_is_number(record.get(key)) for key in needed)


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # finite: other steps are not recorded


class ProgressLog:
    """Show the progress: a live line in a terminal, otherwise one line every ``log.interval`` steps."""

    def __init__(self, config: Config, first_step: int):
        self.config, self.first = config, first_step
        self.console = Console(stderr=False)
        self.started = time.monotonic()
        self.live = self.bar = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self.console,
            )
            self.task = self.bar.add_task(
                config.run.name, total=config.train.steps, completed=first_step, numbers="starting"
            )
            self.live = Live(self.bar, console=self.console, refresh_per_second=4)
            self.live.start()

    def say(self, message: str) -> None:
        """Print a message above the live line."""
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def step(self, record: dict) -> None:
        """Show the record of a training step."""
        done = record["step"] - self.first
        left = (time.monotonic() - self.started) / max(done, 1) * (self.config.train.steps - record["step"])
        ratios = [value for key, value in record.items() if key.startswith("update_ratio/")]
        # the most important ones first: a narrow terminal shows as many as it has room for
        numbers = [
            f"loss {record['loss']:.4f}",
            f"left {duration(left)}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            *([f"MFU {record['mfu']:.1%}"] if "mfu" in record else []),
            f"grad {record['grad_norm']:.2f}",
            *([f"update ratio {max(ratios):.3f}"] if ratios else []),
            f"lr {record['lr']:.1e}",
            f"elapsed {duration(time.monotonic() - self.started)}",
        ]
        if self.bar is not None:
            room = self.console.width - len(f"{self.config.run.name} {record['step']}/{self.config.train.steps} ")
            while len(numbers) > 2 and len("  ".join(numbers)) > room:
                numbers.pop()
            self.bar.update(self.task, completed=record["step"], numbers="  ".join(numbers))
        elif record["step"] % self.config.log.interval == 0 or record["step"] == self.config.train.steps:
            self.say(f"step {record['step']:>6}/{self.config.train.steps}  {'  '.join(numbers)}")

    def close(self) -> None:
        """End the live line, which stays in the terminal as it was last."""
        if self.live is not None:
            self.live.stop()


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class WandB:
    """Log to Weights & Biases. A restart resumes the same W&B run."""

    def __init__(self, config: Config, resolved: dict, folder: Path):
        mode = config.log.wandb
        self.run = None
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"log.wandb={mode}: the package wandb cannot be imported ({one_line(error)}): install it, or use "
                f"log.wandb=disabled"
            ) from error
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") or _has_wandb_login() else "offline"
        remembered = folder / "wandb_id"
        known = remembered.read_bytes().decode(errors="replace").strip() if remembered.is_file() else ""
        if not re.fullmatch(r"[\w-]{1,64}", known, re.ASCII):  # no ID yet, or a damaged one
            known = uuid.uuid4().hex[:12]
            write_text(remembered, known)
        try:
            with block_stop_signals():
                self.run = wandb.init(
                    project=config.log.wandb_project,
                    name=config.run.name,
                    id=known,
                    resume="allow",
                    mode=mode,
                    dir=str(folder),
                    config=resolved,
                    settings=wandb.Settings(silent=True, console="off"),
                )
        except Exception as error:
            raise UserError(
                f"log.wandb={config.log.wandb}: W&B did not start ({one_line(error)}): repair that, or use "
                f"log.wandb=offline, which stores its data in the run's folder"
            ) from error

    def write(self, record: dict) -> None:
        """Log the scalars and histograms of a record of metrics.jsonl."""
        if self.run is not None:
            numbers = scalars_of(record) | _histograms(record.get("update_histogram", {}))
            self._carefully(lambda: self.run.log(numbers, step=record["step"]))

    def close(self) -> None:
        """Finish the W&B run."""
        if self.run is not None:
            self._carefully(self.run.finish)

    def _carefully(self, action: Callable[[], None]) -> None:
        """Run an action of W&B; if it fails, continue without W&B. Its process may end before training does, for
        example when a scheduler signals all processes of a job."""
        if not succeeds("W&B", action):
            self.run = None


def succeeds(name: str, action: Callable[[], None]) -> bool:
    """Run an action of a logger. If it fails, which must not end a run, say so and return False."""
    try:
        action()
    except Exception as error:
        print(f"{name} logging stopped ({one_line(error)}); metrics.jsonl is complete", flush=True)
        return False
    return True


def _histograms(layers: dict[str, dict[str, int]]) -> dict:
    """Return W&B histograms of log10 of the update norms, by layer."""
    if not layers:
        return {}
    import wandb

    from inplace_ttt.training.update_histograms import dense, log10_edges

    edges = log10_edges()
    return {
        f"update_norm_log10/layer_{layer}": wandb.Histogram(np_histogram=(dense(sparse), edges))
        for layer, sparse in layers.items()
    }


def _has_wandb_login() -> bool:
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
