"""Exit codes, the Slurm exit file, torchrun's error file, cleanup of child processes."""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path

import psutil

from inplace_ttt.resilience.torchrun import MARK

# What a user must mend before a run can go on; other failures of a file system may pass
PERMANENT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
# What names something that no file can be: only the user can change that
PATH_ERRNOS = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ESPIPE, errno.ENXIO}


class _Tolerant:
    """A stream that nobody may read any more, as behind ``| head``: work goes on without it."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def tolerate_closed_output() -> None:
    """Let a job go on whose standard output nobody reads any more."""
    if sys.stdout is not None and not isinstance(sys.stdout, _Tolerant):
        sys.stdout = _Tolerant(sys.stdout)


def fail(message: str, code: int) -> int:
    """Report why this process ends, and return its exit code.

    The Slurm job reads the code from a file, for torchrun's own is 1 whatever happened. torchrun prints the message
    last (``torchrun.py``), from the error file that it names; a rank without torchrun prints it itself. Each report is
    made by itself: a full disk, which may be the reason, keeps some from being written.
    """
    told, report = os.environ.get("INPLACE_TTT_EXIT_FILE"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    logs, rank = os.environ.get("INPLACE_TTT_LOGS"), os.environ.get("RANK", "0")
    torchrun_says = False
    with contextlib.suppress(OSError):
        if told:
            _tell(Path(told), code)
    with contextlib.suppress(OSError):
        if report:
            extra = {"py_callstack": message, "timestamp": str(int(time.time())), MARK: code}
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
            torchrun_says = True
    with contextlib.suppress(OSError):
        if logs and torchrun_says:  # of each rank (launch/slurm/rank.sh)
            with Path(logs, f"rank_{rank}.log").open("a") as log:
                log.write(f"{message}\n")
    with contextlib.suppress(OSError):
        if not torchrun_says and os.environ.get("LOCAL_RANK", "0").strip() in ("0", ""):
            sys.stdout.flush()
            print(message, file=sys.stderr, flush=True)
    return code


def _tell(file: Path, code: int) -> None:
    """The first rank to fail knows why, others may have lost contact with it: there is one digit, 0 until it is told.

    Written over, for which a full disk has room.
    """
    with file.open("r+") as stream:
        if stream.read(1) == "0":
            stream.seek(0)
            stream.write(str(code))


def leave(code: int) -> None:
    """End this process and those it started, at once: a rank that failed must not wait for peers in a teardown."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    finally:
        os._exit(code)
