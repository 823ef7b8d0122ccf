"""Show that fast weights store information: train the `recall` task twice, with and without them, and compare.

python launch/proof.py [--folder runs/proof]

The answers are outside the sliding window of attention, so without fast weights no accuracy above chance is possible.
Writes FOLDER/proof.png. The exit code is 0 if the run with fast weights recalls and the run without stays at chance.
Runs of an earlier proof in the same folder are replaced.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from inplace_ttt.command import run_command
from inplace_ttt.config import UserError
from inplace_ttt.files import user_path
from inplace_ttt.training.plots import COLORS, axes, save
from inplace_ttt.training.records import read_metrics

ROOT = Path(__file__).resolve().parent.parent
ALPHABET = 100
CHANCE = 1 / ALPHABET
RECALLS, AT_CHANCE = 0.9, 3 * CHANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/proof"), help="output folder (runs/proof)")
    arguments = parser.parse_args()
    return run_command(lambda: prove(user_path(arguments.folder)))


def prove(folder: Path) -> int:
    """Train both variants in ``folder`` and return the exit code: 0 if the proof succeeds, 1 if it fails."""
    console = Console()
    variants = {"with fast weights": "true", "attention only": "false"}
    runs = {name: folder / f"ttt_{enabled}" for name, enabled in variants.items()}
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs.values():
        _remove(run)
    threads = str(max(1, len(os.sched_getaffinity(0)) // len(variants)))
    processes = {}
    for name, enabled in variants.items():
        log = (folder / f"ttt_{enabled}.log").open("w")
        processes[name] = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "launch/train.py"),
                "recipe=recall",
                f"ttt.enabled={enabled}",
                f"run.dir={runs[name]}",
                f"data.recall_alphabet={ALPHABET}",
                "log.wandb=disabled",
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
    try:
        with console.status("") as status:
            while any(process.poll() is None for process in processes.values()):
                done = {name: len(read_metrics(run / "metrics.jsonl")) for name, run in runs.items()}
                status.update("training: " + ", ".join(f"{name} {n} records" for name, n in done.items()))
                time.sleep(1)
    finally:
        for process in processes.values():
            process.terminate()  # if this program was stopped
            process.wait()
    for name, process in processes.items():
        if process.returncode:
            log = folder / f"ttt_{variants[name]}.log"
            raise UserError(f"the run {name} ended with exit code {process.returncode}: see {log}")
    curves = {name: _curve(run) for name, run in runs.items()}
    _plot(curves, folder / "proof.png")
    table = Table(title=f"recall of held-out pairs (chance {CHANCE:.0%})", title_justify="left")
    table.add_column("step", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for rows in zip(*curves.values(), strict=True):
        table.add_row(str(rows[0][0]), *(f"{accuracy:.1%}" for _, accuracy in rows))
    console.print(table)
    with_ttt, without = (curve[-1][1] for curve in curves.values())
    worst_without = max(accuracy for _, accuracy in curves["attention only"])
    proven = with_ttt >= RECALLS and worst_without <= AT_CHANCE
    console.print(
        f"{'proven' if proven else 'NOT proven'}: {with_ttt:.1%} with fast weights, {without:.1%} without "
        f"({time.monotonic() - started:.0f} s; picture: {folder / 'proof.png'})",
        soft_wrap=True,
    )
    return 0 if proven else 1


def _remove(run: Path) -> None:
    """Remove the run of an earlier proof. Raises UserError if the folder is something else."""
    if run.is_symlink() or (run.exists() and any(run.iterdir()) and not (run / "config.yaml").is_file()):
        raise UserError(f"'{run}' is not a run of an earlier proof: move it away, or use another --folder")
    shutil.rmtree(run, ignore_errors=True)


def _curve(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["accuracy"]) for r in read_metrics(run / "metrics.jsonl") if r.get("eval")]


def _plot(curves: dict[str, list[tuple[int, float]]], picture: Path) -> None:
    figure, ax = axes("Recall beyond the attention window", "training step", "pairs recalled (%)")
    for (name, curve), color in zip(curves.items(), COLORS, strict=False):
        steps, accuracy = zip(*curve, strict=True)
        ax.plot(steps, [100 * a for a in accuracy], "o-", color=color, linewidth=2, markersize=4, label=name)
    ax.axhline(100 * CHANCE, color="#888888", linestyle="--", linewidth=1, label=f"chance ({CHANCE:.0%})")
    ax.set_ylim(-3, 103)
    ax.legend(frameon=False, loc="center right")
    save(figure, picture)


if __name__ == "__main__":
    sys.exit(main())
