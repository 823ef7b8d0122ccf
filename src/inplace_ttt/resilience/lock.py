"""Lock files, to keep a second process from writing to the same run folder, corpus or export."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from inplace_ttt.config.errors import UserError

# errors of file systems without locks
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[int] = set()


def _forget() -> None:
    """Close lock files in a forked child, so that a lock ends with the parent process."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


class Lock:
    """Lock a file with flock(2); the kernel releases the lock when the process dies."""

    def __init__(self, path: Path, what: str):
        """Lock ``path``. ``what`` is the locked resource in messages, such as "run.dir='runs/a'".

        Raises UserError, naming host and process, if it is locked; OSError if ``path`` cannot be written.
        """
        self.path, self.warning = path, None
        while True:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder()
                os.close(self.descriptor)
                raise UserError(f"{what} is in use by {holder}: wait until it ends, or use another") from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    os.close(self.descriptor)
                    raise
                self.warning = (
                    f"the file system of '{path.parent}' does not support locks ({error.strerror}): make sure that no "
                    f"second process writes to {what}"
                )
            if self._is_there():
                break
            os.close(self.descriptor)  # the previous holder has removed the file in the meantime
        _held.add(self.descriptor)
        told = json.dumps(dict(host=socket.gethostname(), process=os.getpid(), since=time.strftime("%F %T")))
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, told.encode(), 0)

    def release(self) -> None:
        """Remove the file and release the lock."""
        if self.descriptor in _held:
            _held.discard(self.descriptor)
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self.descriptor)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            told = json.loads(os.pread(self.descriptor, 4096, 0))
            return f"process {int(told['process'])} on host {str(told['host'])[:80]}, since {str(told['since'])[:40]}"
        except (ValueError, TypeError, KeyError, OSError):
            return "another process"


def lock_beside(output: Path, what: str) -> Lock:
    """Lock ``output`` through a file next to it; create its parent folder if necessary.

    Raises UserError if it is locked or has no file name.
    """
    if not output.name or output.name == "..":
        raise UserError(f"'{output}' is not a valid output name: name a new folder, such as out/model")
    output.parent.mkdir(parents=True, exist_ok=True)
    return Lock(output.with_name(f".{output.name}.lock"), what)
