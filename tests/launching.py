"""Run ``launch/train.py`` as a user does, or its main function in forked ranks, on a run of seconds."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import psutil

from inplace_ttt.training.records import read_metrics

ROOT = Path(__file__).resolve().parent.parent
# synthetic data: nothing needs to be prepared
SMALL = [
    "recipe=recall",
    "log.wandb=disabled",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "data.recall_alphabet=36",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.eval_samples=4",
]
TIMES = ("tokens_per_second", "step_seconds", "peak_memory_gib", "mfu")


def printed_by(main: Callable[..., int], *arguments) -> tuple[int, str]:
    """Exit code of a main function and all that it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(*arguments)
    return code, printed.getvalue()


def run_main(*arguments: str) -> tuple[int, str]:
    """Exit code and all that was printed; for run_ranks."""
    from inplace_ttt.training.main import main

    return printed_by(main, list(arguments), ROOT / "recipes")


def run_evaluate(*arguments: str) -> tuple[int, str]:
    """As ``run_main``, of ``launch/evaluate.py``."""
    from inplace_ttt.evaluation.main import main

    return printed_by(main, list(arguments))


def run_launch_script(name: str, *arguments) -> subprocess.CompletedProcess:
    """The main function of ``launch/NAME``, in this process: what a user's command prints and returns."""
    words, out, err = list(map(str, arguments)), io.StringIO(), io.StringIO()
    main = runpy.run_path(str(ROOT / "launch" / name))["main"]
    with patch.object(sys, "argv", [name, *words]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as end:  # argparse
            code = end.code or 0
    return subprocess.CompletedProcess([name, *words], code, out.getvalue(), err.getvalue())


def torchrun(ranks: int, *arguments: str, log: Path, script: str = "train.py") -> subprocess.Popen:
    """A command of the README, in the background."""
    command = [
        str(Path(sys.executable).parent / "torchrun"),
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(ROOT / "launch" / script),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks under a torchrun; not the processes that write their checkpoints."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if any("launch/" in word for word in child.cmdline()):
                found.append(child)
    return found


def kill_all(process: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()
    process.wait()


def numbers(run: Path) -> list[dict]:
    """The records of a run without what depends on the machine's speed."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(run / "metrics.jsonl")
    ]
