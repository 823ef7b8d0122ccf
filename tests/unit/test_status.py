"""What is said of ranks that hold up others, of restarts, and of a run by its folder."""

import json
import os
import time
from functools import partial

import pytest
import torch

from inplace_ttt.resilience.stragglers import MIN_STEPS, MatmulProbe, StragglerDetector
from inplace_ttt.training.status import Status, sparkline
from inplace_ttt.training.timeline import RestartCost, Timeline, read_timeline
from launching import run_launch_script

HOSTS = ["node1", "node1", "node2", "node2"]


def detector(compute: list[float], data: list[float], steps: int = MIN_STEPS) -> StragglerDetector:
    one = StragglerDetector(HOSTS, "cpu")
    for _ in range(steps):
        one.add(compute, data, 2.0)
    return one


def test_a_rank_whose_arithmetic_is_slow_is_named():
    (slow,) = detector([1.0, 1.1, 1.0, 1.8], [0.0] * 4).slow()
    assert (slow.rank, slow.host) == (3, "node2")
    assert str(slow) == "straggler: rank 3 (node2): matmul probe 1.80x the median"


def test_a_rank_that_reads_slowly_is_named():
    (slow,) = detector([1.0] * 4, [0.01, 0.5, 0.01, 0.01]).slow()
    assert slow.rank == 1 and "data loading 0.49 s per step above the median" in str(slow)


def test_nobody_is_named_too_early_or_for_little():
    assert detector([1.0, 1.0, 1.0, 9.0], [0.0] * 4, steps=MIN_STEPS - 1).slow() == []
    assert detector([1.0, 1.4, 1.0, 1.1], [0.01, 0.02, 0.03, 0.04]).slow() == []


def test_the_probe_takes_time_and_no_random_numbers():
    before = torch.get_rng_state()
    probe = MatmulProbe(torch.device("cpu"))
    probe.run()
    assert probe.seconds() > 0 and torch.equal(before, torch.get_rng_state())


def record(step: int) -> dict:
    return {"step": step, "loss": 5.0 - step / 10, "grad_norm": 1.0, "tokens_per_second": 1000.0, "step_seconds": 2.0,
            "peak_memory_gib": 1.5, "update_ratio/layer_0": step / 100}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Ten steps; then, 100 seconds after the last, a start after step 8."""
    (tmp_path / "config.yaml").write_text("run: {name: mine}\ntrain: {steps: 40}\n")
    timeline, metrics = Timeline(tmp_path), tmp_path / "metrics.jsonl"
    timeline.start(metrics, 0, HOSTS)
    lines = [record(step) for step in range(1, 11)] + [dict(step=10, eval=True, loss=4.5, accuracy=0.1)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(metrics, (time.time() - 100,) * 2)
    timeline.start(metrics, 8, HOSTS)
    os.utime(metrics)
    return tmp_path


def test_what_a_restart_costs(run):
    first, second = read_timeline(run)
    assert "down_seconds" not in first and second["step"] == 8 and second["hosts"] == ["node1", "node2"]
    lost = RestartCost.of(read_timeline(run))
    assert lost.restarts == 1 and lost.redone_steps == 2 and lost.redone_seconds == 4.0
    assert lost.down_seconds == pytest.approx(100, abs=2)


def test_a_clock_that_was_set_back_loses_no_negative_time(run):
    os.utime(run / "metrics.jsonl", (time.time() + 5000,) * 2)
    Timeline(run).start(run / "metrics.jsonl", 10, HOSTS)
    assert read_timeline(run)[-1]["down_seconds"] == 0


def test_a_record_that_was_cut_off_hides_no_other(run):
    with (run / "timeline.jsonl").open("a") as file:
        file.write('{"event": "ra')
    Timeline(run).end("done")
    assert [event["event"] for event in read_timeline(run)] == ["start", "start", "end"]


command = partial(run_launch_script, "status.py")


def test_command_shows_the_run(run):
    slow = dict(rank=3, host="node2", compute=1.8, data=0.0, says="rank 3 (node2) holds up the others: slow")
    Timeline(run).write("ranks", step=10, spread=1.8, slow=[slow])
    done = command(str(run))
    assert done.returncode == 0, done.stderr
    for said in (
        "mine", "running", "10 of 40", "4.0000", "held out 4.5000", "2.00 s per step", "update ratio, layer 0",
        "0.1000", "1 restart cost 1:4", "for 2 repeated steps", "rank 3 (node2) holds up the others",
        "4 ranks on node1, node2",
    ):  # fmt: skip
        assert said in done.stdout, said


def test_state_of_a_run(run):
    assert Status.read(run).state()[0] == "running"
    os.utime(run / "metrics.jsonl", (time.time() - 4000,) * 2)
    assert Status.read(run).state()[0].startswith("no record for 1:06:")
    Timeline(run).end("done")
    assert Status.read(run).state()[0] == "done"


def test_command_draws_the_run(run):
    done = command(str(run), "--png")
    assert done.returncode == 0 and (run / "status.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_before_its_first_step(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {name: mine}\ntrain: {steps: 40}\n")
    for options in ((), ("--png",)):
        done = command(str(tmp_path), *options)
        assert done.returncode == 0, done.stderr


def test_what_is_no_run_is_refused(tmp_path):
    done = command(str(tmp_path / "nothing"))
    assert done.returncode == 2 and "is not a run folder" in done.stderr and len(done.stderr.splitlines()) == 1


def test_sparkline_means_where_there_is_no_room():
    assert sparkline([0.0, 1.0], 10) == "▁█" and len(sparkline(list(range(100)), 10)) == 10
    assert sparkline([2.0, 2.0], 10) == "▁▁"
