"""How a process of a job ends: what it says, who hears it, and what it takes along."""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path

import psutil

# What a user must mend before a run can go on; other failures of a file system may pass
LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def fail(message: str, code: int) -> int:
    """Tell whoever started the job, who does not see the code through torchrun; tell torchrun, whose summary then has
    the message; say it once a machine. Each by itself: a full disk, which may be the reason, keeps some from it."""
    told, report = os.environ.get("INPLACE_TTT_EXIT_FILE"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    with contextlib.suppress(OSError):
        if told:
            _tell(Path(told), code)
    with contextlib.suppress(OSError):
        if report:
            extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    with contextlib.suppress(OSError):
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
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
