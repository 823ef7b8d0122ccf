"""Process texts once and save the fast weights as a book: launch/read_book.py MODEL FILE [FILE ...] --output BOOK.

See --help.
"""

import sys


def run() -> None:
    try:
        from inplace_ttt.inference.reading import main
        from inplace_ttt.resilience.exits import leave
    except KeyboardInterrupt:  # nothing to save yet
        sys.exit(130)
    leave(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
