"""Runs that are stopped, killed, moved and damaged end where an unbroken one does, or say why not."""

import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from inplace_ttt.resilience.checksums import corruption
from launching import SMALL, kill_all, numbers, run_main, torchrun, workers
from ranks import run_ranks

STEPS = 12
TRAIN = [
    *SMALL,
    f"train.steps={STEPS}",
    "train.eval_interval=6",
    "checkpoint.interval=3",
    "ttt.histogram_interval=2",
    "ttt.clip=0.001",
]
CP2 = "parallel.context_parallel_size=2"


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A run of two context-parallel ranks from beginning to end."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    for code, text in run_ranks(2, run_main, *TRAIN, CP2, f"run.dir={run}"):
        assert code == 0, text
    return run


def test_run_leaves_everything_behind(unbroken):
    records = numbers(unbroken)
    steps = [record for record in records if not record.get("eval")]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert {"loss", "grad_norm", "lr", "tokens", "update_ratio/layer_0", "update_ratio/layer_1"} <= set(steps[0])
    evaluations = [record for record in records if record.get("eval")]
    assert [record["step"] for record in evaluations] == [6, 12]
    for record in evaluations:  # questions begin in the second half of a sample
        assert [(one["from"], one["to"]) for one in record["position"]] == [(n, n + 32) for n in range(128, 256, 32)]
        assert record["loss"] == pytest.approx(sum(one["loss"] for one in record["position"]) / 4)
        assert record["loss_without_fast_weights"] != record["loss"]
    assert (unbroken / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (unbroken / "config.yaml").is_file()
    assert sorted(path.name for path in (unbroken / "checkpoints").iterdir()) == ["step_00000009", "step_00000012"]


def noted_histograms(run: Path, step: int = STEPS) -> dict:
    return json.loads((run / f"checkpoints/step_{step:08d}/update_histograms.json").read_bytes())


def test_checkpoints_hold_the_histograms_of_update_norms(unbroken):
    noted, records = noted_histograms(unbroken), [record for record in numbers(unbroken) if not record.get("eval")]
    assert [one["step"] for one in noted["histograms"]] == [2, 4, 6, 8, 10, 12]
    for one in noted["histograms"]:
        assert one["layers"] == records[one["step"] - 1]["update_histogram"]
        counts = one["layers"]["1"]
        assert sum(counts.values()) > 0
        # the quantile beside it lies in the bin that the counts say
        middle, bins = records[one["step"] - 1]["update_norm_p50/layer_1"], noted["bins"]
        bin = (math.log10(middle) - bins["lowest"]) * bins["per_decade"] + 1
        assert sum(count for number, count in counts.items() if int(number) < int(bin)) <= sum(counts.values()) / 2
        assert sum(count for number, count in counts.items() if int(number) <= bin) >= sum(counts.values()) / 2
    assert "update_histogram" not in records[0] and "update_norm_p50/layer_1" not in records[0]
    assert [one["step"] for one in noted_histograms(unbroken, 9)["histograms"]] == [2, 4, 6, 8]


def test_a_checkpoint_without_histograms_goes_on(unbroken, tmp_path):
    """As those of runs that count none; the run's last checkpoint then holds none either."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / "checkpoints/step_00000012")
    folder = run / "checkpoints/step_00000009"
    (folder / "update_histograms.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["update_histograms.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    kept = [{key: value for key, value in record.items() if "update_" not in key} for record in numbers(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    (code, text), _ = run_ranks(2, run_main, *TRAIN, "ttt.histogram_interval=0", CP2, f"run.dir={run}")
    assert code == 0 and "resuming from step 9" in text
    last = [record for record in numbers(run) if not record.get("eval")][-1]
    assert last["loss"] == [record for record in numbers(unbroken) if not record.get("eval")][-1]["loss"]
    assert "update_histogram" not in last
    assert not (run / "checkpoints/step_00000012/update_histograms.json").exists()


@pytest.mark.slow
def test_killed_runs_end_with_identical_metrics(unbroken, tmp_path):
    run, rng = tmp_path / "run", random.Random(0)
    for _ in range(2):
        process = torchrun(2, *TRAIN, CP2, f"run.dir={run}", log=tmp_path / "log")
        seen = len(numbers(run))
        wait_for(lambda seen=seen: len(numbers(run)) > seen + 3, process)
        time.sleep(rng.uniform(0, 0.3))
        kill_all(process)
    process = torchrun(2, *TRAIN, CP2, f"run.dir={run}", log=tmp_path / "log")
    assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    assert numbers(run) == numbers(unbroken)
    assert noted_histograms(run) == noted_histograms(unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_asked_to_stop_all_ranks_save_and_exit_0(number, unbroken, tmp_path):
    run = tmp_path / "run"
    process = torchrun(2, *TRAIN, "checkpoint.interval=0", CP2, f"run.dir={run}", log=tmp_path / "log")
    wait_for(lambda: len(numbers(run)) >= 2, process)
    workers(process)[1].send_signal(number)  # one rank hears it, all follow
    assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    assert "stopped on request: checkpoint saved at step" in (tmp_path / "log").read_text()
    (code, text), _ = run_ranks(2, run_main, *TRAIN, CP2, f"run.dir={run}")
    assert code == 0 and "resuming from step" in text
    assert numbers(run) == numbers(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_every_process_of_a_job_may_be_asked_to_stop(number, unbroken, tmp_path):
    """As schedulers do: writers of checkpoints, readers of data and W&B's process hear it too."""
    run, log = tmp_path / "run", tmp_path / "log"
    options = ["checkpoint.interval=1", "data.num_workers=1", "log.wandb=offline"]
    process = torchrun(2, *TRAIN, *options, CP2, f"run.dir={run}", log=log)
    wait_for(lambda: len(numbers(run)) >= 4, process)
    for rank in workers(process):
        for helper in rank.children(recursive=True):
            helper.send_signal(number)
        rank.send_signal(number)
    assert process.wait(timeout=60) == 0, log.read_text()
    assert "stopped on request: checkpoint saved at step" in log.read_text() and "Traceback" not in log.read_text()
    (code, text), _ = run_ranks(2, run_main, *TRAIN, CP2, f"run.dir={run}")
    assert code == 0 and "resuming from step" in text
    assert numbers(run) == numbers(unbroken)


def run_main_asked_to_stop_in(step: int, *arguments: str) -> tuple[int, str]:
    from inplace_ttt.training.loop import Trainer

    carry_out = Trainer._step

    def hear(loop, number, batches):
        if number == step:
            loop.stop.received = "SIGTERM"
        return carry_out(loop, number, batches)

    Trainer._step = hear
    try:
        return run_main(*arguments)
    finally:
        Trainer._step = carry_out


@pytest.mark.slow
def test_an_evaluation_that_a_request_to_stop_met_is_made_up_for(unbroken, tmp_path):
    run = tmp_path / "run"
    for step in (6, STEPS):
        for code, text in run_ranks(2, run_main_asked_to_stop_in, step, *TRAIN, CP2, f"run.dir={run}"):
            assert code == 0, text
        assert numbers(run) == [record for record in numbers(unbroken) if record["step"] <= step][:-1]
    (code, text), _ = run_ranks(2, run_main, *TRAIN, CP2, f"run.dir={run}")
    assert code == 0 and f"resuming from step {STEPS}" in text
    assert numbers(run) == numbers(unbroken)


def test_a_rank_that_dies_is_named_and_no_process_is_left(tmp_path):
    """One that hangs: tests/cluster/test_faults.py."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = torchrun(2, *TRAIN, "train.steps=100000", CP2, f"run.dir={run}", log=log)
    wait_for(lambda: len(numbers(run)) >= 4, process)
    started = psutil.Process(process.pid).children(recursive=True)
    victim = workers(process)[1]
    victim.kill()
    assert process.wait(timeout=40) != 0
    _, left = psutil.wait_procs(started, timeout=10)
    assert not left
    said = f"rank 1 ({socket.gethostname()}, process {victim.pid}) no longer responds; last heartbeat in "
    assert said in log.read_text() and "rerun the same command to resume" in log.read_text()


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, []),
        (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
        (2, ["parallel.pipeline_model_parallel_size=2"]),
        (2, []),
    ],
)
def test_resumes_at_another_layout(size, layout, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / "checkpoints/step_00000012")
    code, text = run_ranks(size, run_main, *TRAIN, *layout, f"run.dir={run}")[0]
    assert code == 0 and "resuming from step 9" in text
    for record, expected in zip(numbers(run), numbers(unbroken), strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def damaged_copy(unbroken, folder: Path, *, both: bool, how: str) -> Path:
    run = folder / "run"
    shutil.copytree(unbroken, run)
    for step in (12, 9) if both else (12,):
        shard = sorted((run / f"checkpoints/step_{step:08d}").glob("*.distcp"))[0]
        size = shard.stat().st_size
        if how == "missing":
            shard.unlink()
        elif how == "truncated":
            os.truncate(shard, size // 2)
        else:
            with shard.open("r+b") as file:  # a bit that flipped
                file.seek(size // 2)
                byte = file.read(1)[0]
                file.seek(size // 2)
                file.write(bytes([byte ^ 1]))
    return run


HOW = dict(missing="is missing", truncated="bytes instead of", corrupt="is corrupt: its checksum is")


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_passed_over_by_name(how, unbroken, tmp_path):
    run = damaged_copy(unbroken, tmp_path, both=False, how=how)
    (code, text), _ = run_ranks(2, run_main, *TRAIN, CP2, f"run.dir={run}")
    assert code == 0 and "resuming from step 9" in text
    assert "step_00000012" in text and HOW[how] in text
    assert numbers(run) == numbers(unbroken)
    assert [corruption(folder) for folder in (run / "checkpoints").glob("step_*")] == [None, None]


@pytest.mark.parametrize("how", ["truncated", "corrupt"])
def test_without_a_whole_checkpoint_the_run_stops_before_any_is_lost(how, unbroken, tmp_path):
    run = damaged_copy(unbroken, tmp_path, both=True, how=how)
    for _ in range(2 if how == "corrupt" else 1):  # also when it is tried again
        assert [code for code, _ in run_ranks(2, run_main, *TRAIN, CP2, f"run.dir={run}")] == [2, 2]
        assert numbers(run) == numbers(unbroken)


def test_another_model_is_not_continued(unbroken):
    code, text = run_ranks(1, run_main, *TRAIN, "ttt.eta=0.5", f"run.dir={unbroken}")[0]
    assert code == 2 and "ttt.eta=0.5" in text and "started with 1.0" in text
    code, text = run_ranks(1, run_main, *TRAIN, "data.recall_alphabet=30", f"run.dir={unbroken}")[0]
    assert code == 2 and "data.recall_alphabet=30" in text  # not the vocabulary, which follows from it


@pytest.mark.parametrize("content", ["{[", "- a"])
def test_a_damaged_configuration_is_named(content, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    (run / "config.yaml").write_text(content)
    (first, text), (second, _) = run_ranks(2, run_main, *TRAIN, CP2, f"run.dir={run}")
    assert first == second == 2 and f"'{run}/config.yaml' is damaged" in text


def test_weights_go_into_a_new_run_and_fast_weights_start_at_zero(unbroken, tmp_path):
    plain = tmp_path / "plain"
    assert run_ranks(1, run_main, *TRAIN, "train.steps=2", "ttt.enabled=false", f"run.dir={plain}")[0][0] == 0
    code, text = run_ranks(
        1, run_main, *TRAIN, f"checkpoint.load={plain}/checkpoints/step_00000002", f"run.dir={tmp_path / 'ttt'}"
    )[0]
    assert code == 0 and "4 tensors are newly initialised" in text
    assert numbers(tmp_path / "ttt")[0]["update_ratio/layer_0"] == 0


def test_a_trained_convolution_is_not_taken_for_none(unbroken, tmp_path):
    trained = unbroken
    code, text = run_ranks(
        1, run_main, *TRAIN, "ttt.convolution=false", f"checkpoint.load={trained}", f"run.dir={tmp_path / 'run'}"
    )[0]
    assert code == 2 and "has a trained target convolution in layer 0, and ttt.convolution=false" in text


def test_numbers_that_are_not_finite_stop_the_run_by_name(tmp_path):
    code, text = run_ranks(
        1, run_main, *TRAIN, "optim.lr=1e6", "optim.warmup_fraction=0", f"run.dir={tmp_path / 'run'}"
    )[0]
    assert code == 3 and "at step 2" in text and "no checkpoint was written yet" in text
    assert "first non-finite" in text


def test_fast_weights_that_run_away_stop_the_run(tmp_path):
    options = ["ttt.clip=null", "ttt.max_update_ratio=0.5", "ttt.eta=100", "optim.lr=1e-1", "checkpoint.interval=1"]
    code, text = run_ranks(2, run_main, *TRAIN, *options, CP2, f"run.dir={tmp_path / 'run'}")[0]
    assert code == 3 and "ttt.max_update_ratio=0.5" in text and "the last good checkpoint is" in text


def test_separate_clipping_and_learning_rate(tmp_path):
    options = ["ttt.clip_separately=true", "ttt.lr_multiplier=0"]
    code, text = run_ranks(1, run_main, *TRAIN, *options, f"run.dir={tmp_path / 'run'}")[0]
    assert code == 0, text
    last = numbers(tmp_path / "run")[-2]
    assert last["grad_norm_ttt"] > 0 and last["update_ratio/layer_0"] == 0  # the convolution never moved


def test_wandb_offline_is_the_default_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = tmp_path / "run"
    code, text = run_ranks(1, run_main, *TRAIN, "log.wandb=auto", "train.steps=3", f"run.dir={run}")[0]
    assert code == 0, text
    (log,) = (run / "wandb").glob("offline-run-*/*.wandb")
    for name in (
        b"train/loss",
        b"update_ratio/layer_1",
        b"update_norm_p50/layer_1",
        b"update_norm_log10/layer_1",
        b"eval/loss_without_fast_weights",
        b"eval_loss/position_128_160",
    ):
        assert name in log.read_bytes()


def with_a_known_peak(*overrides):
    from inplace_ttt.training import loop

    loop.peak_flops = lambda name: 1e9
    return run_main(*TRAIN, *overrides)


def test_model_flops_utilization(tmp_path):
    """By hand: 6 FLOPs for each weight of a product and token, attention beside it; over the peak of all ranks."""
    options = ["train.steps=2", "model.sliding_window=null", CP2, f"run.dir={tmp_path / 'run'}"]
    code, text = run_ranks(2, with_a_known_peak, *options)[0]
    assert code == 0 and "MFU" in text, text
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    model, tokens = config["model"], config["data"]["seq_length"] * config["train"]["global_batch_size"]
    d, f, heads = model["hidden_size"], model["ffn_hidden_size"], model["num_attention_heads"] * model["kv_channels"]
    keys = model["num_query_groups"] * model["kv_channels"]
    products = model["num_layers"] * (2 * d * (heads + keys) + 3 * d * f) + d * model["vocab_size"]
    products += 2 * d * (f + d)  # two layers write, and project their targets
    attention = model["num_layers"] * config["data"]["seq_length"] * heads  # of queries and keys, and of values: half
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][:2]
    for step in steps:
        assert step["mfu"] == pytest.approx(6 * tokens * (products + attention) / step["step_seconds"] / 2e9)


@pytest.mark.slow
def test_tensorboard_has_the_same_numbers(tmp_path):
    """Also after a run has gone on from a checkpoint; histograms are there, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    for steps in (3, 5):
        options = ["log.tensorboard=true", f"train.steps={steps}", "ttt.histogram_interval=1", f"run.dir={run}"]
        code, text = run_ranks(1, run_main, *TRAIN, *options)[0]
        assert code == 0, text
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {(name, one.step): one.value for name in events.Tags()["scalars"] for one in events.Scalars(name)}
    for record in numbers(run):
        prefix = "eval" if record.get("eval") else "train"
        assert shown[f"{prefix}/loss", record["step"]] == pytest.approx(record["loss"], rel=1e-6)
    assert ("eval_loss/position_128_160", 5) in shown and ("update_ratio/layer_1", 5) in shown
    (last,) = (one for one in events.Histograms("update_norm_log10/layer_1") if one.step == 5)
    assert last.histogram_value.num == sum(numbers(run)[-2]["update_histogram"]["1"].values())


def test_tensorboard_that_is_not_there(tmp_path):
    (tmp_path / "tensorboard.py").write_text("raise ImportError('no tensorboard here')")
    code, text = run_ranks(2, without_tensorboard, tmp_path, CP2)[0]
    assert code == 2 and "log.tensorboard=false" in text and "Traceback" not in text


def without_tensorboard(folder, *overrides):
    for name in [name for name in sys.modules if name.removeprefix("torch.utils.").split(".")[0] == "tensorboard"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    return run_main(*TRAIN, "log.tensorboard=true", *overrides, f"run.dir={folder / 'run'}")


def test_wandb_that_is_not_there(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')")  # found before the installed one
    code, text = run_ranks(2, without_wandb, tmp_path, CP2)[0]
    assert code == 2 and "log.wandb=offline" in text and "log.wandb=disabled" in text and "Traceback" not in text


def without_wandb(folder, *overrides):
    sys.modules.pop("wandb", None)
    sys.path.insert(0, str(folder))
    return run_main(*TRAIN, "log.wandb=offline", *overrides, f"run.dir={folder / 'run'}")


def change_in_step(step: int, changed: dict, *arguments: str) -> tuple[int, str]:
    """Train with other values from a step on, without a restart."""
    from inplace_ttt.megatron.optimizer import build_optimizer
    from inplace_ttt.training.loop import Trainer

    carry_out = Trainer._step

    def change(loop, number, batches):
        if number == step:
            for key, value in changed.items():
                section, name = key.split(".")
                setattr(getattr(loop.config, section), name, value)
            new, schedule = build_optimizer(loop.stepper.model, loop.stepper.model.config, loop.config)
            schedule.step(increment=step - 1)
            for mine, theirs in zip(loop.optimizer.param_groups, new.param_groups, strict=True):
                mine.update({name: value for name, value in theirs.items() if name not in ("params", "step")})
            schedule.optimizer = loop.scheduler.optimizer
            loop.scheduler = schedule
        return carry_out(loop, number, batches)

    Trainer._step = change
    try:
        return run_main(*arguments)
    finally:
        Trainer._step = carry_out


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process, with its last checkpoint taken away: it goes on from step 9."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert run_ranks(1, run_main, *TRAIN, f"run.dir={run}")[0][0] == 0
    shutil.rmtree(run / "checkpoints/step_00000012")
    return run


@pytest.mark.parametrize(
    "changed",
    [
        {"optim.lr": 5e-3, "optim.min_lr_ratio": 0.5, "ttt.lr_multiplier": 3.0},
        pytest.param(
            {"optim.adam_beta1": 0.5, "optim.adam_beta2": 0.9, "optim.adam_eps": 1e-4, "optim.weight_decay": 0.5},
            marks=pytest.mark.slow,
        ),
        pytest.param({"optim.clip_grad": 0.1}, marks=pytest.mark.slow),
        pytest.param({"optim.warmup_fraction": 0.5, "optim.decay_fraction": 0.9}, marks=pytest.mark.slow),
    ],
    ids=lambda changed: " ".join(changed),
)
def test_what_is_changed_on_resume_takes_effect(changed, alone, tmp_path):
    """Bit for bit as if the values had been changed in a run that goes on."""
    expected, run = tmp_path / "expected", tmp_path / "run"
    assert run_ranks(1, change_in_step, 10, changed, *TRAIN, f"run.dir={expected}")[0][0] == 0
    shutil.copytree(alone, run)
    keys = [f"{key}={value}" for key, value in changed.items()]
    code, text = run_ranks(1, run_main, *TRAIN, *keys, f"run.dir={run}")[0]
    assert code == 0 and all(f"changed since the last start: {key} was" in text for key in changed), text
    assert numbers(run) == numbers(expected) != numbers(alone)


def test_an_optimizer_of_another_kind_is_refused(alone):
    code, text = run_ranks(1, run_main, *TRAIN, "parallel.use_distributed_optimizer=false", f"run.dir={alone}")[0]
    assert code == 2 and "parallel.use_distributed_optimizer=False, but the run in run.dir=" in text


@pytest.mark.slow
def test_an_optimizer_that_is_not_distributed_resumes(tmp_path):
    options = [*TRAIN, "parallel.use_distributed_optimizer=false"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_ranks(1, run_main, *options, f"run.dir={whole}")[0][0] == 0
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/step_00000012")
    code, text = run_ranks(1, run_main, *options, f"run.dir={run}")[0]
    assert code == 0 and "resuming from step 9" in text
    assert numbers(run) == numbers(whole)


def test_a_run_of_an_earlier_version_goes_on(alone, tmp_path):
    """Its config.yaml lacks keys and has one that there is no more; its run.json says less."""
    import yaml

    run = tmp_path / "run"
    shutil.copytree(alone, run)
    values = yaml.safe_load((run / "config.yaml").read_text())
    del values["ttt"]["comm_dtype"], values["log"], values["model"]["sliding_window"]
    values["model"]["sliding_window"] = 16
    assert values["model"].pop("family") == "qwen3"
    values["model"]["qk_layernorm"] = True
    values["parallel"]["of_old"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    code, text = run_ranks(1, run_main, *TRAIN, f"run.dir={run}")[0]
    assert code == 0 and "resuming from step 9" in text and "changed since" not in text


def test_two_runs_in_one_folder(alone, tmp_path):
    from inplace_ttt.resilience.lock import Lock

    run = tmp_path / "run"
    shutil.copytree(alone, run)
    before = sorted(path.name for path in run.rglob("*"))
    with Lock(run / ".lock", "the run"):
        code, text = run_ranks(1, run_main, *TRAIN, f"run.dir={run}")[0]
    assert code == 2 and f"run.dir='{run}' is in use by process {os.getpid()} on host {socket.gethostname()}" in text
    assert sorted(path.name for path in run.rglob("*")) == before


def test_nothing_is_written_before_training_begins(tmp_path):
    run = tmp_path / "new" / "run"
    (tmp_path / "empty").mkdir()
    code, text = run_ranks(1, run_main, *TRAIN, f"checkpoint.load={tmp_path / 'empty'}", f"run.dir={run}")[0]
    assert code == 2 and text.count("\n") == 1, text
    assert not (tmp_path / "new").exists()


def test_a_half_written_checkpoint_of_others_is_left_alone(alone, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    (run / "checkpoints/.step_00000010.mine").mkdir()
    (run / "checkpoints/.step_00000010.ours").mkdir()
    (run / "checkpoints/.step_00000010.ours/.inplace_ttt_partial").touch()
    code, text = run_ranks(1, run_main, *TRAIN, f"run.dir={run}")[0]
    assert code == 0 and "looks like an unfinished checkpoint" in text and ".step_00000010.mine" in text
    assert [path.name for path in (run / "checkpoints").glob(".step*")] == [".step_00000010.mine"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b'\xff\xfe\n[1]\n{"step": "x"}\n'),
        ("timeline.jsonl", b'{\n\xff\n{"event": 3}\n{"event": "start"}\n'),
        ("checkpoints/step_00000009/run.json", b'{"step": 99999999, "samples": 1}'),
        ("checkpoints/step_00000009/manifest.json", b"{}"),
    ],
)
def test_damaged_files_of_a_run(name, content, alone, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    before = (run / name).read_bytes() if name.endswith("jsonl") else b""
    (run / name).write_bytes(before + content)
    code, text = run_ranks(1, run_main, *TRAIN, f"run.dir={run}")[0]
    assert (code, text.count("error: ")) in ((0, 0), (2, 1)) and "Traceback" not in text
    if name.endswith("jsonl"):
        assert code == 0 and len([record for record in numbers(run) if not record.get("eval")]) == STEPS
