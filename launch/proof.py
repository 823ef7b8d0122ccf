"""Show that fast weights store information: train the `recall` task with and without them, and compare.

python launch/proof.py [--folder runs/proof]

The answers are outside the sliding window of attention, so without fast weights no accuracy above chance is possible.
A third run makes the targets from the current token alone (reconstruction, ttt.convolution=false): by the paper's
Theorem 1 they cannot recall, unless attention first moves a key to the position of its value, which takes many more
steps to learn. The changes of logits that the theorem bounds are measured on the trained model.

Writes FOLDER/proof.png and proof.json. The exit code is 0 if the run with fast weights recalls and the others stay at
chance. Runs of an earlier proof in the same folder are replaced.
"""

import argparse
import json
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
from inplace_ttt.plots import COLORS, axes, save
from inplace_ttt.training.records import read_metrics

ROOT = Path(__file__).resolve().parent.parent
ALPHABET = 100
CHANCE = 1 / ALPHABET
RECALLS, AT_CHANCE = 0.9, 3 * CHANCE
LEARNED, RECONSTRUCTED, PLAIN = "with fast weights", "reconstruction target", "attention only"
# keys of each run, and the name of its folder
VARIANTS = {
    LEARNED: ("ttt_true", ["ttt.target=input_embed"]),  # as the theorem has it
    RECONSTRUCTED: ("reconstruction", ["ttt.target=input_embed", "ttt.convolution=false"]),
    PLAIN: ("ttt_false", ["ttt.enabled=false"]),
}
SAMPLES = 64  # held-out samples on which changes of logits are measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/proof"), help="output folder (runs/proof)")
    arguments = parser.parse_args()
    return run_command(lambda: prove(user_path(arguments.folder)))


def prove(folder: Path) -> int:
    """Train the variants in ``folder`` and return the exit code: 0 if the proof succeeds, 1 if it fails."""
    console, started = Console(), time.monotonic()
    runs = {name: folder / place for name, (place, _) in VARIANTS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs.values():
        _remove(run)
    _train(runs, console)
    curves = {name: _curve(run) for name, run in runs.items()}
    _plot(curves, folder / "proof.png")
    table = Table(title=f"recall of held-out pairs (chance {CHANCE:.0%})", title_justify="left")
    table.add_column("step", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for rows in zip(*curves.values(), strict=True):
        table.add_row(str(rows[0][0]), *(f"{accuracy:.1%}" for _, accuracy in rows))
    console.print(table)
    changes = _logit_changes(runs[LEARNED], folder / "exported")
    _report(changes, console)
    last = {name: curve[-1][1] for name, curve in curves.items()}
    worst = max(accuracy for name in (RECONSTRUCTED, PLAIN) for _, accuracy in curves[name])
    proven = last[LEARNED] >= RECALLS and worst <= AT_CHANCE
    (folder / "proof.json").write_text(json.dumps(dict(proven=proven, recall=curves, logit_changes=changes), indent=1))
    console.print(
        f"{'proven' if proven else 'NOT proven'}: {last[LEARNED]:.1%} with fast weights, {last[RECONSTRUCTED]:.1%} "
        f"with the reconstruction target, {last[PLAIN]:.1%} without fast weights "
        f"({time.monotonic() - started:.0f} s; picture: {folder / 'proof.png'})",
        soft_wrap=True,
    )
    return 0 if proven else 1


def _train(runs: dict[str, Path], console: Console) -> None:
    """Train all variants at once. Raises UserError if one fails."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // len(runs)))
    processes = {}
    for name, run in runs.items():
        with run.with_suffix(".log").open("w") as log:
            processes[name] = subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "launch/train.py"),
                    "recipe=recall",
                    *VARIANTS[name][1],
                    f"run.dir={run}",
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
            log = runs[name].with_suffix(".log")
            raise UserError(f"the run {name} ended with exit code {process.returncode}: see {log}")


def _logit_changes(run: Path, exported: Path) -> dict[str, dict]:
    """Measure the changes of logits that Theorem 1 bounds, with the model's targets and with reconstruction targets.

    Returns per target the medians over queries, the share of queries within the bounds, and the share recalled.
    """
    import torch

    from inplace_ttt.data.recall import HELD_OUT_SEED, KeyValueRecall
    from inplace_ttt.evaluation.logit_changes import measure
    from inplace_ttt.evaluation.mode import FastWeightMode
    from inplace_ttt.evaluation.models import open_model
    from inplace_ttt.hf.convert import export_checkpoint

    shutil.rmtree(exported, ignore_errors=True)
    config = export_checkpoint(run, exported, tokenizer=False)
    data = config.data
    network = open_model(exported, run.name, FastWeightMode(), torch.device("cpu"), torch.float32).network
    task = KeyValueRecall(data.seq_length, data.recall_pairs, data.recall_alphabet, config.train.seed + HELD_OUT_SEED)
    found = {}
    for name, reconstruct in (("next token", False), ("current token", True)):
        one = measure(network, task, SAMPLES, reconstruct=reconstruct)
        holds = one.right.abs() <= one.right_bound if reconstruct else one.right >= one.right_bound
        found[name] = dict(
            right=one.right.median().item(),
            right_bound=one.right_bound.median().item(),
            right_holds=holds.double().mean().item(),
            wrong=one.wrong.median().item(),
            wrong_bound=one.wrong_bound.median().item(),
            wrong_holds=(one.wrong <= one.wrong_bound).double().mean().item(),
            recalled=one.recalled,
        )
    return found


def _report(changes: dict[str, dict], console: Console) -> None:
    """Print the changes of logits."""
    table = Table(title="logits changed by the last layer's fast weights (medians)", title_justify="left")
    table.add_column("target made from the")
    for name in changes:
        table.add_column(name, justify="right")
    rows = {
        "right value": lambda one, _: f"{one['right']:+.1f}",
        "  bound of its pair's update": lambda one, sign: f"{sign} {one['right_bound']:.1f}",
        "  within the bound": lambda one, _: f"{one['right_holds']:.0%}",
        "any other value": lambda one, _: f"± {one['wrong']:.1f}",
        "  bound of the pair's update ": lambda one, _: f"± {one['wrong_bound']:.1f}",
        "  within the bound ": lambda one, _: f"{one['wrong_holds']:.0%}",
        "recalled": lambda one, _: f"{one['recalled']:.1%}",
    }
    for title, cell in rows.items():
        table.add_row(title, *(cell(one, sign) for one, sign in zip(changes.values(), ("≥", "±"), strict=True)))
    console.print(table)


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
