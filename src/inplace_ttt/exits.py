"""How a process of a job ends: what it says, who hears it, and what it takes along."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import psutil


def fail(message: str, code: int) -> int:
    """Say it once a machine, and tell torchrun, whose summary then has it too, and whoever started it, who does not
    see the code through torchrun."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(message, file=sys.stderr, flush=True)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # a full disk, which may be the reason
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    told = os.environ.get("INPLACE_TTT_EXIT_FILE")
    if told:
        # A rank that only lost contact does not speak for one that knows why: it does not overwrite what is there
        with contextlib.suppress(OSError), Path(told).open("x" if code == 4 else "w") as file:
            file.write(f"{code}\n")
    return code


def leave(code: int) -> None:
    """End this process and those it started, at once: a rank that failed must not wait for peers in a teardown."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(code)
