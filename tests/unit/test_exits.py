"""What a process that fails leaves to whoever started it, also on a full disk."""

import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from inplace_ttt.resilience.exits import fail
from inplace_ttt.resilience.torchrun import MARK, _sentences


@pytest.fixture
def told(tmp_path, monkeypatch) -> Path:
    """As launch/slurm/train.sbatch makes it."""
    path = tmp_path / "exit"
    path.write_text("0\n")
    monkeypatch.setenv("INPLACE_TTT_EXIT_FILE", str(path))
    return path


def test_the_first_to_fail_knows_why(told, monkeypatch, capsys):
    assert fail("stopped: the loss is not a number", 3) == 3
    assert fail("stopped: contact with another rank was lost", 4) == 4
    assert told.read_text() == "3\n"
    assert "not a number" in capsys.readouterr().err


def test_one_a_machine_says_it_and_torchrun_hears_all(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    fail("error: no", 2)
    assert capsys.readouterr().err == "" and told.read_text() == "2\n"
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: no"


class Full:
    """A terminal whose other end is a file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_cannot_be_said_is_told_all_the_same(told, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    monkeypatch.setattr("sys.stderr", Full())
    assert fail("stopped: the disk is full", 3) == 3
    assert told.read_text() == "3\n"


def failure(code, when, said=None):
    message = "" if said is None else dict(message=said, extraInfo={MARK: code})
    return SimpleNamespace(exitcode=code, timestamp=when, message=message)


def test_torchrun_names_the_cause_and_not_whom_it_ended():
    terminated, killed = -signal.SIGTERM, -signal.SIGKILL
    for failures, said in [
        ({0: failure(terminated, 1), 1: failure(2, 2, "error: no")}, ["error: no"]),
        ({0: failure(3, 1, "stopped: NaN"), 1: failure(terminated, 2)}, ["stopped: NaN"]),
        ({0: failure(2, 1, "error: no"), 1: failure(2, 2, "error: no")}, ["error: no"]),
    ]:
        assert _sentences(SimpleNamespace(failures=failures)) == said
    for ended in (terminated, killed):  # who is ended by somebody else is the cause of what the others say
        failures = {0: failure(ended, 1), 1: failure(4, 2, "contact with another rank was lost")}
        lost, cause = _sentences(SimpleNamespace(failures=failures))
        assert "was lost" in lost and f"rank 0 was killed by {signal.Signals(-ended).name}" in cause
