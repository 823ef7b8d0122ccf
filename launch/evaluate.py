"""Evaluate models: launch/evaluate.py TASK MODEL [MODEL ...] [options]; --help says more."""

import sys

from inplace_ttt.evaluation.main import main
from inplace_ttt.exits import leave

if __name__ == "__main__":  # making samples starts processes that import this file again
    leave(main(sys.argv[1:]))
