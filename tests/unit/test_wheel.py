"""Installed without a checkout: the recipes come along, and one's own lie beside them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inplace_ttt.config import UserError
from inplace_ttt.training.compose import compose_config, split_config_dir, to_config
from launching import ROOT

RECIPES = ROOT / "recipes"
MINE = """\
# @package _global_
defaults:
  - tiny
  - _self_

run:
  name: mine
train:
  steps: 2
"""
SMALL = ["data.kind=recall", "data.reset_at_documents=false", "model.vocab_size=null", "data.seq_length=256"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel in it."""
    base = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = base / "source"
    source.mkdir()
    for name in ("src", "recipes", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(base / "wheels")]
    subprocess.run([*pip, "wheel", *options, str(source)], check=True, cwd=base)
    (wheel,) = (base / "wheels").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(base / "site"), str(wheel)], check=True, cwd=base)
    return base / "site"


def write_recipe(folder: Path, content: str = MINE, name: str = "mine") -> Path:
    (folder / "recipe").mkdir(parents=True, exist_ok=True)
    (folder / f"recipe/{name}.yaml").write_text(content)
    return folder


@pytest.mark.slow
def test_training_from_an_empty_folder(installed, tmp_path):
    write_recipe(tmp_path / "my recipes")
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def run(*command):
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return found.returncode, found.stdout + found.stderr

    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2"]
    words = ["-m", "inplace_ttt.train", "--config-dir", "my recipes"]
    code, printed = run(*torchrun, *words, "recipe=mine", "log.wandb=disabled", *SMALL)
    assert code == 0 and (tmp_path / "runs/mine/metrics.jsonl").is_file(), printed
    code, printed = run(sys.executable, *words, "recipe=mini")
    assert (code, printed) == (2, "error: recipe=mini does not exist; did you mean recipe=mine?\n")
    _, place = run(sys.executable, "-c", "import inplace_ttt; print(inplace_ttt.__file__)")
    assert Path(place.strip()).is_relative_to(installed)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("foo: [", "is damaged"),
        ("- a", "holds no keys"),
        ("# @package _global_\ntrain: {steps: 3}\ntrain: {steps: 4}\n", "has the key 'train' twice"),
        ("train: {steps: 3}\n", "first line of recipe/mine.yaml must be '# @package _global_'"),
        ("# @package _global_\ndefaults: [mine]\n", "refer to each other in a circle"),
        ("# @package _global_\ntrain:\n  stepz: 3\n", "Key 'stepz' not in 'Train'"),
        ("# @package _global_\ntrain: {steps: abc}\n", "could not be converted to Integer"),
        ("# @package _global_\ndefaults: [nothing]\n", "Could not load 'recipe/nothing'"),
        ("a: !!python/object/apply:os.system [ls]", "is damaged"),
    ],
)
def test_recipes_that_cannot_be_used(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence):
        compose_config(*split_config_dir(["recipe=mine", f"--config-dir={write_recipe(tmp_path, content)}"], RECIPES))


def test_folders_that_cannot_be_used(tmp_path):
    write_recipe(tmp_path / "taken", name="tiny")
    (write_recipe(tmp_path / "yml") / "recipe/mine.yaml").rename(tmp_path / "yml/recipe/mine.yml")
    (write_recipe(tmp_path / "schema") / "schema.yaml").write_text("train: {seed: 7}")
    (tmp_path / "schema/docker.yaml").write_text("a: &b 1\nc: *b\n")  # no file of a config group: not read
    for words, sentence in [
        (["--config-dir"], "is not a folder"),
        (["--config-dir", str(tmp_path / "none")], "is not a folder"),
        ([f"--config-dir={tmp_path / 'taken'}"], "recipe/tiny.yaml is the name of a built-in recipe"),
        ([f"--config-dir={tmp_path / 'yml'}"], "Hydra does not read recipe/mine.yml: name it recipe/mine.yaml"),
        ([f"--config-dir={tmp_path / 'schema'}"], "schema.yaml would replace a file of this program"),
        ([f"--config-dir={tmp_path / 'taken'}", "--config-dir", "b"], "--config-dir is given twice"),
    ]:
        with pytest.raises(UserError, match=sentence):
            split_config_dir(words, RECIPES)


def test_groups_of_ones_own(tmp_path):
    """A model, and a group that there is not here."""
    own = write_recipe(tmp_path)
    (own / "model").mkdir()
    (own / "model/wide.yaml").write_text("# @package model\ndefaults: [tiny]\nhidden_size: 512\n")
    overrides, recipes = split_config_dir(["recipe=mine", "model=wide", "--config-dir", str(own)], RECIPES)
    config = to_config(compose_config([*overrides, *SMALL], recipes))
    assert config.model.hidden_size == 512 and config.run.name == "mine" and config.train.steps == 2
    with pytest.raises(UserError, match=r"model=wid does not exist; use one of .*wide"):
        compose_config(["recipe=mine", "model=wid"], recipes)
