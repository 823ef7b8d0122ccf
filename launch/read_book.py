"""Read texts once, and save what the fast weights have learnt: launch/read_book.py MODEL FILE [FILE ...] --output BOOK;
--help says more."""

import sys


def run() -> None:
    try:
        from inplace_ttt.inference.reading import main
        from inplace_ttt.resilience.exits import leave
    except KeyboardInterrupt:  # before there is anything to keep
        sys.exit(130)
    leave(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
