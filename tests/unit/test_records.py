"""Test what a run shows and logs: names are text, narrow terminals show the main numbers, logging may fail."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from inplace_ttt import plots
from inplace_ttt.training import records
from inplace_ttt.training.records import ProgressLog
from inplace_ttt.training.tensorboard import TensorBoard

NAME = "a[b] [/c] $d\\frac{e"
RECORD = dict(
    step=3, loss=5.4321, grad_norm=1.25, lr=1e-4, tokens_per_second=1234.5, tokens=99, mfu=0.4567,
    **{"update_ratio/layer_0": 0.125},
)  # fmt: skip


def shown(monkeypatch, width):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(records, "Console", lambda **_: console)
    config = SimpleNamespace(
        run=SimpleNamespace(name=NAME), train=SimpleNamespace(steps=8), log=SimpleNamespace(interval=1)
    )
    log = ProgressLog(config, 0)
    log.say(f"a note on {NAME}")
    log.step(RECORD)
    log.close()
    return written.getvalue()


@pytest.mark.parametrize(
    ("width", "there", "absent"),
    [
        (60, ["loss 5.4321", "left 0:0"], ["elapsed", "lr 1.0e-04"]),
        (80, ["loss 5.4321", "left 0:0", "1,23"], ["elapsed"]),
        (160, ["loss 5.4321", "left 0:0", "MFU 45.7%", "update ratio 0.125", "lr 1.0e-04", "elapsed"], []),
    ],
)
def test_the_progress_line(monkeypatch, width, there, absent):
    text = shown(monkeypatch, width)
    assert f"{NAME} 3/8 " in text and f"a note on {NAME}" in text
    assert all(part in text for part in there) and not any(part in text for part in absent)


def test_names_in_pictures_are_text(tmp_path):
    figure, _ = plots.axes(NAME, "x", "y")
    plots.save(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_tensorboard_that_fails_does_not_end_a_run(tmp_path, capsys):
    config = SimpleNamespace(log=SimpleNamespace(tensorboard=True))
    board = TensorBoard(config, tmp_path, 0)

    def fail(*_):
        raise OSError("no space left on device")

    board.write(RECORD)
    board.writer.add_scalar = fail
    for _ in range(2):
        board.write(RECORD)
    assert capsys.readouterr().out.count("TensorBoard logging stopped (no space left on device)") == 1
    board.close()
