"""Train: torchrun [--nnodes ...] --nproc-per-node N launch/train.py recipe=NAME [key=value ...]"""

import os
import sys
from pathlib import Path

import psutil

from inplace_ttt.training.main import main


def leave(code: int) -> None:
    """End this process and those it started, at once: a rank that failed must not wait for peers in a teardown."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(code)


if __name__ == "__main__":  # saving checkpoints starts processes that import this file again
    leave(main(sys.argv[1:], Path(__file__).resolve().parent.parent / "recipes"))
