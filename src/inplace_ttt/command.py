"""End the one-process commands of ``launch/`` with a sentence and an exit code."""

import errno
import os
import sys
from collections.abc import Callable

from inplace_ttt.config import UserError
from inplace_ttt.resilience.exits import PATH_ERRNOS, PERMANENT_ERRNOS


def run_command(action: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run a command and return its exit code: what it returns, 2 where the user must change something, 3 for a file
    system that is full or cannot be written, 4 for another that failed, 130 for Ctrl-C, which is answered by
    ``stopped``."""
    try:
        return action() or 0
    except UserError as error:
        return _say(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _say(stopped, 130)
    except BrokenPipeError:  # whoever read what we print has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, *PATH_ERRNOS):
            return _say(f"error: {error}", 2)
        return _say(f"error: {error}", 3 if error.errno in PERMANENT_ERRNOS else 4)


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code
