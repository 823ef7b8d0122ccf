"""Sweeps: which runs a command line makes, how they are started, and what is read from them."""

import json
import runpy
from pathlib import Path

import pytest

from inplace_ttt.config import UserError
from inplace_ttt.training import sweep
from launching import ROOT, run_launch_script


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", ["1"]),
        ("256, 512", ["256", "512"]),
        ("[0,6],every 6th,all", ["[0,6]", "every 6th", "all"]),
        ("[{path: a,weight: 1}],[{path: b}]", ["[{path: a,weight: 1}]", "[{path: b}]"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("1,,2", ["1", "", "2"]),
    ],
)
def test_values(text, values):
    assert sweep.split_values(text) == values


def test_all_combinations():
    found = sweep.points(["recipe=tiny", "ttt.eta=0.3,1", "train.steps=5", "optim.lr=1e-3,5e-4"])
    assert [point.name for point in found] == [
        "eta=0.3_lr=1e-3", "eta=0.3_lr=5e-4", "eta=1_lr=1e-3", "eta=1_lr=5e-4"
    ]  # fmt: skip
    assert found[2].values == {"ttt.eta": "1", "optim.lr": "1e-3"}
    assert found[2].overrides == ["recipe=tiny", "train.steps=5", "ttt.eta=1", "optim.lr=1e-3"]


def test_names_are_file_names_that_differ():
    found = sweep.points(["ttt.layers=[0,6],every 6th,all", "model.num_layers=2,4", "train.steps=1,2", "optim.lr=1,2"])
    assert found[0].name == "layers=0-6_num_layers=2_steps=1_lr=1"
    assert found[-1].name == "layers=all_num_layers=4_steps=2_lr=2"
    same_end = sweep.points(["log.interval=1,2", "checkpoint.interval=3,4"])
    assert same_end[0].name == "log.interval=1_checkpoint.interval=3"
    alike = sweep.points(["ttt.layers=[0,6],[0.6],[0 6]"])
    assert [point.name for point in sweep.points(["ttt.layers=[0,6],0-6"])] == ["run_0", "run_1"]
    assert len({point.name for point in alike}) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=tiny"], "no key has several values"),
        (["ttt.eta=1,1"], "occurs twice"),
        (["ttt.eta=1,"], "empty"),
        (["ttt.eta=1,2", "ttt.eta=3,4"], "given twice"),
        (["run.dir=a,b"], "a sweep sets run.dir"),
        (["run.name=x", "ttt.eta=1,2"], "a sweep sets run.name"),
        ([f"ttt.eta={','.join(map(str, range(40)))}", f"optim.lr={','.join(map(str, range(40)))}"], "1,600 runs"),
    ],
)
def test_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        sweep.points(overrides)


def recorded(folder: Path, steps: int, losses: list[float]):
    folder.mkdir(parents=True)
    lines = [
        dict(
            step=step,
            loss=1.0,
            grad_norm=1.0,
            peak_memory_gib=1.0,
            tokens_per_second=100.0 * step,
            step_seconds=1.0,
            **{"update_ratio/layer_0": 0.1 * step},
        )
        for step in range(1, steps + 1)
    ]
    lines += [
        dict(step=steps, eval=True, loss=loss, loss_without_fast_weights=loss + 1,
             position=[{"loss": 7.0}, {"loss": loss + 2}])
        for loss in losses
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_results(tmp_path):
    points = sweep.points(["ttt.eta=1,2,3"])
    recorded(tmp_path / "eta=1", 4, [3.0, 2.5])
    recorded(tmp_path / "eta=2", 2, [])
    results = [sweep.read_result(point, tmp_path / point.name, 4, point.name == "eta=2") for point in points]
    first, second, third = results
    assert (first.state, first.loss, first.loss_without, first.last_range) == ("done", 2.5, 3.5, 4.5)
    assert first.update_ratio == pytest.approx(0.4) and first.tokens_per_second == 300.0
    assert (second.state, second.step, second.loss) == ("failed", 2, None)
    assert (third.state, third.step) == ("waiting", 0)
    sweep.write(tmp_path, "command", results)
    assert json.loads((tmp_path / "sweep.json").read_text())["runs"][0]["loss"] == 2.5
    assert "| 1 | 2.5000 | 3.5000 | 4.5000 | 0.4 | 4 |" in (tmp_path / "sweep.md").read_text()
    assert "| 2 |  |  |  | 0.2 | 2 of 4 |" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").is_file()
    assert sweep.table(results).row_count == 3


def test_every_run_is_checked_before_the_first_starts(tmp_path):
    folder = f"--folder={tmp_path / 'sweep'}"
    done = run_launch_script("sweep.py", folder, "recipe=recall", "ttt.eta=1,much")
    assert done.returncode == 2 and done.stderr.startswith("error: eta=much: ttt.eta=much cannot be used")
    done = run_launch_script("sweep.py", folder, "recipe=recall", "ttt.chunk_size=32,4096")
    assert done.returncode == 2 and "chunk_size=4096: ttt.chunk_size=4096 is larger" in done.stderr
    assert run_launch_script("sweep.py", "--report", folder, "recipe=recall", "ttt.eta=1,2").returncode == 2
    assert not (tmp_path / "sweep").exists()
    done = run_launch_script("sweep.py", "--dry-run", folder, "recipe=recall", "ttt.eta=1,2")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert not (tmp_path / "sweep").exists()


def test_each_run_has_gpus_of_its_own(monkeypatch):
    from types import SimpleNamespace

    gpus = runpy.run_path(str(ROOT / "launch/sweep.py"))["gpus"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    two = SimpleNamespace(jobs=2, nproc_per_node=2)
    assert [gpus(slot, two)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4,5", "6,7"]
    with pytest.raises(UserError, match="needs 6 GPUs, and there are 4"):
        gpus(0, SimpleNamespace(jobs=3, nproc_per_node=2))


@pytest.mark.slow
def test_a_sweep_runs_and_resumes(tmp_path):
    keys = ["recipe=recall", "ttt.eta=1,2", "train.steps=3", "train.eval_samples=8", "log.wandb=disabled"]
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "eta=2").write_text("in the way")
    done = run_launch_script("sweep.py", f"--folder={folder}", "--jobs=2", *keys)
    assert done.returncode == 1, done.stderr
    assert "eta=2 failed: see" in done.stdout
    (folder / "eta=2").unlink()
    done = run_launch_script("sweep.py", f"--folder={folder}", *keys)
    assert done.returncode == 0 and "[1/1] eta=2" in done.stdout
    results = json.loads((folder / "sweep.json").read_text())["runs"]
    assert [one["state"] for one in results] == ["done", "done"]
    assert results[0]["loss"] != results[1]["loss"]
