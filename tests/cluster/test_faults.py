"""What happens when machines fail: no wrong result, no step lost but those since the last save, and a sentence of why.

A rank that dies, and damaged checkpoints, are tested in tests/parallel/test_training.py; nodes that crash, in
test_slurm.py. FAULTS=50 asks for more of the random ones.
"""

import contextlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import jobs
from cluster.jobs import finished, steps
from launching import SMALL, kill_all, numbers, torchrun, workers

if os.geteuid() != 0:
    pytest.skip("faults need root", allow_module_level=True)

STEPS = 40
TRAIN = [*SMALL, f"train.steps={STEPS}", "train.eval_interval=0", "train.eval_samples=0", "checkpoint.interval=5"]
TRAIN += ["parallel.context_parallel_size=2", "parallel.timeout_minutes=0.25"]
COMPILER = shutil.which("cc")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Two ranks."""
    folder = tmp_path_factory.mktemp("unbroken")
    process = torchrun(2, *TRAIN, f"run.dir={folder}/run", log=folder / "log")
    assert process.wait(timeout=200) == 0, (folder / "log").read_text()
    return numbers(folder / "run")


def submit(slurm, run, **environment: str) -> str:
    """Two nodes with a rank each."""
    return jobs.submit(slurm, run, keys=TRAIN, processes=1, INPLACE_TTT_PREFLIGHT="0", **environment)


def test_a_rank_hangs(slurm, unbroken, tmp_path):
    run = tmp_path / "run"
    number = submit(slurm, run)
    slurm.wait(lambda: steps(run) >= 7, 120)
    (rank,) = [pid for pid in slurm.processes("node2", "launch/train.py") if _is_rank(pid)]
    os.kill(rank, signal.SIGSTOP)
    log = finished(slurm, number, run)
    assert slurm.job(number)["JobState"] == "COMPLETED", log
    assert "stopped: rank 1 (node2, process" in log and "rank 0 waits in" in log
    assert "crashed" in log and "requeued" in log
    assert numbers(run) == unbroken


def test_the_network_is_cut(slurm, unbroken, tmp_path):
    """Those cut off end by themselves; the others go on without their node."""
    run = tmp_path / "run"
    number = submit(slurm, run)
    slurm.wait(lambda: steps(run) >= 7, 120)
    slurm.cut("node2")
    try:
        log = finished(slurm, number, run)
        slurm.wait(lambda: not slurm.processes("node2", "launch/train.py"), 60)
    finally:
        slurm.mend("node2")
    assert slurm.job(number)["JobState"] == "COMPLETED", log
    assert "start 2: 2 nodes (node[1,3])" in log
    assert "cannot be reached" in (run / "logs/rank_1.log").read_text()
    assert numbers(run) == unbroken


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_clocks_differ_and_jump(slurm, unbroken, tmp_path):
    """A day apart from the start; then the first is set back two days, the second to two hours ahead."""
    run, python, library = tmp_path / "run", tmp_path / "python", tmp_path / "clock.so"
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-O1", "-o", library, Path(__file__).with_name("clock.c")], check=True
    )
    python.write_text(
        f"#!/bin/bash\nexport LD_PRELOAD={library} CLOCK_AHEAD={tmp_path}/$SLURMD_NODENAME\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)

    def set_clocks(hours: dict[str, int]) -> None:
        for node, ahead in hours.items():
            with (tmp_path / node).open("r+b" if (tmp_path / node).exists() else "wb") as file:
                file.write(struct.pack("l", 3600 * ahead))

    set_clocks(dict(node1=0, node2=24, node3=24))
    number = jobs.submit(slurm, run, keys=TRAIN, processes=1, INPLACE_TTT_PYTHON=str(python))
    slurm.wait(lambda: steps(run) >= 7, 120)
    set_clocks(dict(node1=-48, node2=2, node3=2))
    log = finished(slurm, number, run)
    assert slurm.job(number)["JobState"] == "COMPLETED" and slurm.job(number)["Restarts"] == "0", log
    assert "s ahead" in log or "s behind" in log  # preflight has said it
    assert numbers(run) == unbroken


@pytest.fixture
def small_disk(tmp_path):
    """A file system of some megabytes, and a way to make it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], check=True)
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    subprocess.run(["umount", disk], check=True)


def test_the_disk_is_full(small_disk, unbroken, tmp_path):
    """While a checkpoint is written: the one before stays, and with more room the run goes on."""
    (disk, make_room), log = small_disk, tmp_path / "log"
    command = [*TRAIN, "checkpoint.keep=100", f"run.dir={disk}/run"]
    assert torchrun(2, *command, log=log).wait(timeout=120) != 0
    assert "could not be written" in log.read_text() and "the last good checkpoint is" in log.read_text()
    saved = sorted((disk / "run/checkpoints").glob("step_*"))
    assert saved and len(numbers(disk / "run")) < STEPS
    make_room()
    assert torchrun(2, *command, log=log).wait(timeout=120) == 0, log.read_text()
    assert f"resuming from step {int(saved[-1].name.removeprefix('step_'))}" in log.read_text()
    assert numbers(disk / "run") == unbroken


def test_the_disk_is_full_for_metrics(small_disk, tmp_path):
    (disk, _), log = small_disk, tmp_path / "log"
    process = torchrun(2, *TRAIN, "train.steps=100000", "checkpoint.interval=0", f"run.dir={disk}/run", log=log)
    deadline = time.monotonic() + 120
    while steps(disk / "run") < 3:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    with pytest.raises(OSError), (disk / "rest").open("wb", buffering=0) as rest:
        while True:
            rest.write(bytes(4096))
    assert process.wait(timeout=120) != 0
    assert "can no longer be written" in log.read_text() and "No space left" in log.read_text()


def test_killed_while_a_checkpoint_is_half_written(unbroken, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    process = torchrun(2, *TRAIN, "checkpoint.interval=1", f"run.dir={run}", log=log)
    deadline = time.monotonic() + 120
    while not (steps(run) >= 6 and list((run / "checkpoints").glob(".step_*/*.distcp"))):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
    kill_all(process)
    assert torchrun(2, *TRAIN, f"run.dir={run}", log=log).wait(timeout=120) == 0, log.read_text()
    assert "resuming from step" in log.read_text()
    assert not list((run / "checkpoints").glob(".step_*"))
    assert numbers(run) == unbroken


def test_a_rank_hangs_after_the_last_step(unbroken, tmp_path, monkeypatch):
    """The other has nothing left to do, and is the only one to notice it."""
    run, log, drawing = tmp_path / "run", tmp_path / "log", tmp_path / "drawing"
    # rank 0 says when it draws loss.png, the last thing that it does, and waits there to be stopped
    (tmp_path / "matplotlib.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(drawing)!r}).write_text(str(os.getpid()))\ntime.sleep(100)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = torchrun(2, *TRAIN, f"run.dir={run}", log=log)
    deadline = time.monotonic() + 120
    while not (drawing.exists() and drawing.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.kill(int(drawing.read_text()), signal.SIGSTOP)
    assert process.wait(timeout=120) != 0
    assert "stopped: rank 0" in log.read_text() and "no longer responds" in log.read_text()
    assert numbers(run) == unbroken


def test_random_faults(unbroken, tmp_path):
    """Kills, hangs, requests to stop and lost writers, at random moments: a run ends where an unbroken one does."""
    count, rng = int(os.environ.get("FAULTS", "4")), random.Random(int(os.environ.get("SEED", "0")))
    log, runs = tmp_path / "log", 0
    run = tmp_path / "run_0"
    while count:
        process = torchrun(2, *TRAIN, f"run.dir={run}", log=log)
        # before the first step, between steps, or while the last is saved
        time.sleep(rng.uniform(4, 24))
        if process.poll() is None:
            _strike(process, rng)
            count -= 1
        code = process.wait(timeout=120)
        if code == 0 and len(numbers(run)) == STEPS:
            assert numbers(run) == unbroken
            runs += 1
            run = tmp_path / f"run_{runs}"
    assert torchrun(2, *TRAIN, f"run.dir={run}", log=log).wait(timeout=120) == 0, log.read_text()
    assert numbers(run) == unbroken


def _strike(process: subprocess.Popen, rng: random.Random) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = workers(process)
    helpers = [child for child in children if child not in ranks]
    how = rng.choice(["kill all", "kill a rank", "stop", "hang", "kill a helper"])
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        if how == "kill all":
            kill_all(process)
        elif how == "kill a rank":
            rng.choice(ranks).kill()
        elif how == "stop":
            rng.choice(ranks).terminate()
        elif how == "hang":
            rng.choice(ranks).suspend()
        else:
            rng.choice(helpers).kill()


def _is_rank(pid: int) -> bool:
    """Rather than torchrun, or a process that writes a rank's checkpoints and has its command line from it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        parent = process.parent()
        ours, theirs = " ".join(process.cmdline()), " ".join(parent.cmdline()) if parent else ""
        return "launch/train.py" in ours and "torchrun" not in ours and "torch.distributed.run" not in ours and (
            "torchrun" in theirs or "torch.distributed.run" in theirs or "rank.sh" in theirs
        )  # fmt: skip
    return False
