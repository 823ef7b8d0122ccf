"""One process at a time writes to a run's folder, a corpus, an export."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from inplace_ttt.config import UserError
from inplace_ttt.hf.convert import fresh_folder
from inplace_ttt.resilience.lock import Lock

HOLD = "import sys, time; from pathlib import Path; from inplace_ttt.resilience.lock import Lock; "
HOLD += "lock = Lock(Path(sys.argv[1]), 'x');"


def held_by_another(path) -> subprocess.Popen:
    code = HOLD + "print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_has_it_and_a_kill_frees_it(tmp_path):
    process = held_by_another(tmp_path / "lock")
    try:
        with pytest.raises(UserError, match=rf"the run is in use by process {process.pid} on host \S+, since 2"):
            Lock(tmp_path / "lock", "the run")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with Lock(tmp_path / "lock", "the run") as lock:
        assert lock.warning is None
    assert not (tmp_path / "lock").exists()


def test_a_child_does_not_keep_its_parents_lock(tmp_path):
    code = HOLD + "import os\nif os.fork() == 0:\n    time.sleep(20)\nelse:\n    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")])
    time.sleep(0.1)
    Lock(tmp_path / "lock", "the run").release()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Lock(tmp_path / "lock", "the run") as lock:
        assert "does not support locks" in lock.warning and "the run" in lock.warning


def test_a_link_under_the_locks_name_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError):
        Lock(tmp_path / "lock", "the run")
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_we_did_not_make_is_left_alone_and_named(kind, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/work").write_text("precious")
    if kind == "link":
        (tmp_path / "out.partial").symlink_to(tmp_path / "mine")
    else:
        (tmp_path / "mine").rename(tmp_path / "out.partial")
    with pytest.raises(UserError, match=r"out\.partial' was not made by this program"), fresh_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial/work").read_text() == "precious"


def test_what_we_began_is_begun_anew(tmp_path):
    with pytest.raises(ZeroDivisionError), fresh_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("")
        raise ZeroDivisionError
    with fresh_folder(tmp_path / "out") as partial:
        assert not (partial / "half").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and not list((tmp_path / "out").iterdir())
