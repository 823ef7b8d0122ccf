"""Evaluate models: launch/evaluate.py TASK MODEL [MODEL ...] [options]. See --help."""

import sys


def run() -> None:
    try:
        from inplace_ttt.evaluation.main import main
        from inplace_ttt.resilience.exits import leave
    except KeyboardInterrupt:  # nothing to save yet
        sys.exit(130)
    leave(main(sys.argv[1:]))


if __name__ == "__main__":  # worker processes that generate samples import this file again
    run()
