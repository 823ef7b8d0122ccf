"""Generate text: launch/generate.py MODEL [--prompt TEXT] [--file FILE] [--chat] [options]. See --help."""

import sys


def run() -> None:
    try:
        from inplace_ttt.inference.generating import main
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
