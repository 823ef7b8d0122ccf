"""Run the single-process commands of ``launch/``: convert exceptions to a message and an exit code."""

import errno
import os
import sys
from collections.abc import Callable

from inplace_ttt.config import UserError
from inplace_ttt.resilience.exits import PATH_ERRNOS, PERMANENT_ERRNOS


def run_command(action: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run a command and return its exit code.

    The code is the value that ``action`` returns, or 2: the user must change something; 3: the file system is full or
    not writable; 4: another file error; 130: Ctrl-C, after printing ``stopped``.
    """
    try:
        return action() or 0
    except UserError as error:
        return _say(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _say(stopped, 130)
    except BrokenPipeError:  # the reader of the output has ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, *PATH_ERRNOS):
            return _say(f"error: {error}", 2)
        return _say(f"error: {error}", 3 if error.errno in PERMANENT_ERRNOS else 4)


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code
