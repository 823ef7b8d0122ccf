"""Training jobs on the Slurm of the tests."""

import re
import sys

from launching import ROOT, numbers

ENVIRONMENT = dict(INPLACE_TTT_PYTHON=sys.executable, GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1")


def submit(slurm, run, *options: str, keys: list[str], nodes: int = 2, processes: int, **environment: str) -> str:
    """The number of a job that launch/submit.py has submitted."""
    return submit_all(slurm, run, *options, keys=keys, nodes=nodes, processes=processes, **environment)[0]


def submit_all(slurm, run, *options, keys, nodes: int = 2, processes: int, **environment: str) -> list[str]:
    done = slurm.on(
        "ctl", sys.executable, str(ROOT / "launch/submit.py"), f"--nodes={nodes}", f"--gpus-per-node={processes}",
        *options, *keys, f"run.dir={run}", environment=ENVIRONMENT | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return re.findall(r"job (\d+)", done.stdout)


def steps(run) -> int:
    return len(numbers(run)) if (run / "metrics.jsonl").exists() else 0


def finished(slurm, number: str, run, seconds: float = 240) -> str:
    """The job's main log, when it has ended."""
    ended = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}
    slurm.wait(lambda: slurm.job(number).get("JobState") in ended, seconds)
    return (run / f"slurm-{number}.log").read_text()
