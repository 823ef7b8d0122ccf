"""The commands at the top of README.md, in order: a model trained, evaluated, exported and asked."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launching import ROOT

BIN = Path(sys.executable).parent
COPIED = ("launch", "recipes", "src", "Makefile", "pyproject.toml", "constraints.txt", "README.md")


def commands() -> list[str]:
    """Return the lines of the first block, without their comments and without the tests themselves."""
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    lines = [re.sub(r"\s+#.*", "", line) for line in block.splitlines()]
    return [line for line in lines if not line.startswith("make test")]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy, with this environment, which must not be made anew for it."""
    place = tmp_path / "checkout"
    place.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, place / name, **({"symlinks": True} if copy is shutil.copytree else {}))
    (place / ".venv").symlink_to(BIN.parent)
    if subprocess.run(["make", "--question", "setup"], cwd=place, capture_output=True).returncode:
        pytest.skip("this environment is not what make setup has made")
    return place


@pytest.mark.slow
def test_the_first_screen(checkout):
    assert len(commands()) == 4 and commands()[0] == "make train"
    keys = "train.steps=4 train.eval_interval=0 train.eval_samples=2 checkpoint.interval=0 log.wandb=disabled"
    environment = {**os.environ, "MEGABYTES": "2", "KEYS": keys, "OMP_NUM_THREADS": "1"}
    for command in commands():
        found = subprocess.run(["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True)
        assert found.returncode == 0, f"{command}\n{found.stdout[-3000:]}{found.stderr[-3000:]}"
    left = [
        "runs/tiny_ttt/loss.png", "runs/evaluation/position_tiny_ttt/position.png", "exported/model.safetensors",
        "runs/evaluation/needle_tiny_ttt/needle.png",
    ]  # fmt: skip
    assert all((checkout / name).is_file() for name in left), list(checkout.rglob("*.png"))
    assert len(found.stdout.split()) > 5, found.stdout  # the last one answers
