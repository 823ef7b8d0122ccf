"""Runs on a real Slurm of three nodes: they go on after time limits and crashes, and end where an unbroken one does."""

import re
import subprocess
import sys

import pytest

from cluster.slurm import GPUS, Slurm, why_not
from launching import ROOT, SMALL, numbers, torchrun

if why_not():
    pytest.skip(f"Slurm: {why_not()}", allow_module_level=True)

STEPS = 40
TRAIN = [*SMALL, f"train.steps={STEPS}", "train.eval_interval=0", "train.eval_samples=0", "checkpoint.interval=5"]
TRAIN += ["parallel.context_parallel_size=2", "parallel.timeout_minutes=0.5"]
ENVIRONMENT = dict(INPLACE_TTT_PYTHON=sys.executable, GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm") / "cluster", 3)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Two nodes with two ranks each are four ranks."""
    folder = tmp_path_factory.mktemp("unbroken")
    process = torchrun(2 * GPUS, *TRAIN, f"run.dir={folder}/run", log=folder / "log")
    assert process.wait(timeout=200) == 0, (folder / "log").read_text()
    return numbers(folder / "run")


def submit(slurm, run, *options: str, keys=TRAIN, nodes: int = 2, **environment: str) -> str:
    done = slurm.on(
        "ctl", sys.executable, str(ROOT / "launch/submit.py"), f"--nodes={nodes}", f"--gpus-per-node={GPUS}",
        *options, *keys, f"run.dir={run}", environment=ENVIRONMENT | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return re.search(r"job (\d+)", done.stdout)[1]


def steps(run) -> int:
    return len(numbers(run)) if (run / "metrics.jsonl").exists() else 0


def finished(slurm, number: str, run, seconds: float = 240) -> str:
    """The job's main log, when it has ended."""
    ended = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}
    slurm.wait(lambda: slurm.job(number).get("JobState") in ended, seconds)
    return (run / f"slurm-{number}.log").read_text()


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
    assert "asked to stop: saving" in log and "requeued" in log and "start 2" in log
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
    assert "2 starts in a row ended at step 0: not requeued" in log
