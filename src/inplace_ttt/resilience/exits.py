"""Define exit codes, Slurm exit file, torchrun error file and cleanup of child processes."""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path

import psutil

from inplace_ttt.resilience.torchrun import MARK

# file system errors that a user must fix before a run can resume; others may be temporary
PERMANENT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
# errors of invalid paths, which a user must fix
PATH_ERRNOS = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ESPIPE, errno.ENXIO}


class _Tolerant:
    """Wrap a stream and ignore broken pipes, such as after ``| head``."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text and return its length; drop the text if nobody reads the pipe any more."""
        with contextlib.suppress(BrokenPipeError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; drop its content if nobody reads the pipe any more."""
        with contextlib.suppress(BrokenPipeError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def tolerate_closed_output() -> None:
    """Ignore broken pipes of standard output, so that a job continues without a reader."""
    if sys.stdout is not None and not isinstance(sys.stdout, _Tolerant):
        sys.stdout = _Tolerant(sys.stdout)


def fail(message: str, code: int) -> int:
    """Report why this process ends, and return its exit code.

    The Slurm job reads the code from a file, since torchrun's own exit code is always 1. torchrun prints the message
    last, from its error file (``torchrun.py``); a rank without torchrun prints it itself. Each report is independent of
    the others, because a full disk, which may be the cause, can prevent some of them.
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
        if logs and torchrun_says:  # one log per rank (launch/slurm/rank.sh)
            with Path(logs, f"rank_{rank}.log").open("a") as log:
                log.write(f"{message}\n")
    with contextlib.suppress(OSError):
        if not torchrun_says and os.environ.get("LOCAL_RANK", "0").strip() in ("0", ""):
            sys.stdout.flush()
            print(message, file=sys.stderr, flush=True)
    return code


def _tell(file: Path, code: int) -> None:
    """Write the exit code to the Slurm exit file, unless another rank has written one: the first failure is the cause.

    The single digit is overwritten in place, which works on a full disk.
    """
    with file.open("r+") as stream:
        if stream.read(1) == "0":
            stream.seek(0)
            stream.write(str(code))


def leave(code: int) -> None:
    """End this process and its children immediately; a failed rank must not wait for peers during teardown."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    finally:
        os._exit(code)
