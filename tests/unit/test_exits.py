"""What a process that fails leaves to whoever started it, also on a full disk."""

import errno
import json
import os
from pathlib import Path

import pytest

from inplace_ttt.exits import fail


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
