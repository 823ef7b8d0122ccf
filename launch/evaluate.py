"""Evaluate models: launch/evaluate.py TASK MODEL [MODEL ...] [options]; --help says more."""

import sys


def run() -> None:
    try:
        from inplace_ttt.evaluation.main import main
        from inplace_ttt.resilience.exits import leave
    except KeyboardInterrupt:  # before there is anything to keep
        sys.exit(130)
    leave(main(sys.argv[1:]))


if __name__ == "__main__":  # making samples starts processes that import this file again
    run()
