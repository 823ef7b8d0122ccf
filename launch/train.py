"""Train: torchrun [--nnodes ...] --nproc-per-node N launch/train.py recipe=NAME [key=value ...]"""

import sys
from pathlib import Path

from inplace_ttt.resilience.exits import leave
from inplace_ttt.training.main import main

if __name__ == "__main__":  # checkpoint writer processes import this file again
    leave(main(sys.argv[1:], Path(__file__).resolve().parent.parent / "recipes"))
