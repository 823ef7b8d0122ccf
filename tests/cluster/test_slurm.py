"""Runs on a real Slurm of three nodes: they go on after time limits and crashes, and end where an unbroken one does."""

import shlex
import subprocess
import sys

import pytest

from cluster import jobs
from cluster.jobs import finished, steps
from cluster.slurm import GPUS, why_not
from launching import SMALL, numbers, torchrun

if why_not():
    pytest.skip(f"Slurm: {why_not()}", allow_module_level=True)

STEPS = 40
TRAIN = [*SMALL, f"train.steps={STEPS}", "train.eval_interval=0", "train.eval_samples=0", "checkpoint.interval=5"]
TRAIN += ["parallel.context_parallel_size=2", "parallel.timeout_minutes=0.5"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Two nodes with two ranks each are four ranks."""
    folder = tmp_path_factory.mktemp("unbroken")
    process = torchrun(2 * GPUS, *TRAIN, f"run.dir={folder}/run", log=folder / "log")
    assert process.wait(timeout=200) == 0, (folder / "log").read_text()
    return numbers(folder / "run")


def submit(slurm, run, *options: str, keys=TRAIN, nodes: int = 2, **environment: str) -> str:
    return jobs.submit(slurm, run, *options, keys=keys, nodes=nodes, processes=GPUS, **environment)


def test_two_nodes(slurm, unbroken, tmp_path):
    run = tmp_path / "run"
    number = submit(slurm, run)
    log = finished(slurm, number, run)
    assert slurm.job(number)["JobState"] == "COMPLETED", log
    assert "2 nodes (node[1-2]), 2 processes on each" in log and ": done" in log
    assert log.count(f"step     {STEPS}/{STEPS}") <= 1  # the first rank's lines, not everyone's
    assert sorted(path.name for path in (run / "logs").iterdir()) == [f"rank_{rank}.log" for rank in range(4)]
    assert numbers(run) == unbroken


def test_time_limit(slurm, unbroken, tmp_path):
    """The signal comes before the limit; the job saves, requeues itself and goes on."""
    run = tmp_path / "run"
    number = submit(slurm, run)
    slurm.wait(lambda: steps(run) >= 3, 120)
    assert slurm.on("ctl", "scancel", "--batch", "--signal=USR1", number).returncode == 0
    log = finished(slurm, number, run)
    assert slurm.job(number)["JobState"] == "COMPLETED", log
    assert "stop requested: saving" in log and "requeued" in log and "start 2" in log
    assert numbers(run) == unbroken


def test_a_worker_crashes(slurm, unbroken, tmp_path):
    run = tmp_path / "run"
    number = submit(slurm, run)
    slurm.wait(lambda: steps(run) >= 7, 120)
    slurm.crash("node2")
    try:
        log = finished(slurm, number, run)
    finally:
        slurm.boot("node2")
    assert slurm.job(number)["JobState"] == "COMPLETED", log
    assert "contact with another rank was lost" in log
    assert "start 2: 2 nodes (node[1,3])" in log
    assert numbers(run) == unbroken


def test_the_first_node_crashes(slurm, unbroken, tmp_path):
    """The script ends with it; Slurm finds the node down and requeues the job."""
    run = tmp_path / "run"
    number = submit(slurm, run, INPLACE_TTT_PREFLIGHT="0")
    slurm.wait(lambda: list((run / "checkpoints").glob("step_*")), 120)
    slurm.crash("node1")
    try:
        log = finished(slurm, number, run)
    finally:
        slurm.boot("node1")
    assert slurm.job(number)["JobState"] == "COMPLETED", log
    assert "start 2: 2 nodes (node[2-3])" in log and "resuming from step" in log
    assert numbers(run) == unbroken


def test_a_second_stage_waits_for_the_first(slurm, tmp_path):
    """And goes with it, where it fails for good."""
    first, second = tmp_path / "first", tmp_path / "second"
    keys = [*SMALL, "train.steps=3", "train.eval_samples=0"]
    then = shlex.join([*keys, f"checkpoint.load={first}", f"run.dir={second}"])
    scalars_of = jobs.submit_all(
        slurm, first, "--then", then, keys=keys, nodes=1, processes=1, INPLACE_TTT_PREFLIGHT="0"
    )
    assert slurm.job(scalars_of[1])["Dependency"].startswith(f"afterok:{scalars_of[0]}")
    log = finished(slurm, scalars_of[1], second)
    assert slurm.job(scalars_of[1])["JobState"] == "COMPLETED", log
    assert f"initialised from '{first}'" in log and steps(second) == 3

    failing = tmp_path / "failing"
    failing.mkdir()
    (failing / "checkpoints").write_text("no folder")
    one, two = jobs.submit_all(
        slurm, failing, "--then", then, keys=keys, nodes=1, processes=1, INPLACE_TTT_PREFLIGHT="0"
    )
    finished(slurm, one, failing)
    slurm.wait(lambda: slurm.job(two).get("JobState") == "CANCELLED", 60)


def test_a_node_that_cannot_train_is_named_and_the_job_is_not_requeued(slurm, tmp_path):
    """Node 2 sees another folder in the place of the run's."""
    run, python = tmp_path / "run", tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
[ "$SLURMD_NODENAME" = node2 ] && [ "$1" = launch/preflight.py ] || exec {sys.executable} "$@"
exec unshare --mount bash -c 'mount -t tmpfs none {run} && exec "$@"' _ {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    number = submit(slurm, run, INPLACE_TTT_PYTHON=str(python))
    log = finished(slurm, number, run)
    assert slurm.job(number)["JobState"] == "FAILED" and slurm.job(number)["Restarts"] == "0", log
    assert f"run.dir: node2: '{run}' differs from that of the first node" in log and "not requeued" in log
    assert not (run / "metrics.jsonl").exists()


def test_what_must_be_changed_is_not_requeued(slurm, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("no folder")
    number = submit(slurm, run)
    log = finished(slurm, number, run)
    assert slurm.job(number)["JobState"] == "FAILED" and slurm.job(number)["Restarts"] == "0", log
    assert "cannot be written" in log and "not requeued" in log


def test_a_run_without_progress_is_given_up(slurm, tmp_path):
    run = tmp_path / "run"
    keys = [*TRAIN, "checkpoint.interval=0", "train.steps=100000"]
    number = submit(slurm, run, keys=keys, nodes=1, INPLACE_TTT_IDLE_RESTARTS="1")
    for start in (1, 2):
        log = run / f"slurm-{number}.log"
        slurm.wait(lambda start=start, log=log: log.exists() and f"start {start}:" in log.read_text(), 120)
        slurm.wait(lambda: steps(run) >= 1, 120)
        subprocess.run(["pkill", "-9", "-f", f"launch/train.py.*{run}"], check=True)
        (run / "metrics.jsonl").unlink()
    log = finished(slurm, number, run)
    assert slurm.job(number)["JobState"] == "FAILED", log
    assert "2 consecutive starts ended at step 0: not requeued" in log
