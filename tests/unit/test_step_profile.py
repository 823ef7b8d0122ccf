"""Check that kernels are attributed to the scopes around their launches, in a synthetic trace and in a real step."""

import pytest

from inplace_ttt.benchmarks import step_profile
from inplace_ttt.training.compose import compose_config, to_config
from launching import ROOT
from models import Training, tiny_config
from ranks import run_ranks


def scope(name, ts, dur, tid=1, cat="cpu_op"):
    return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, pid=1, tid=tid)


def kernel(number, name, ts, dur, launched, tid=1):
    """Return the events of a kernel and of its launch."""
    args = dict(correlation=number)
    launch = dict(ph="X", cat="cuda_runtime", name="cudaLaunchKernel", ts=launched, dur=1, pid=1, tid=tid, args=args)
    return [launch, dict(ph="X", cat="kernel", name=name, ts=ts, dur=dur, pid=0, tid=7, args=args)]


EVENTS = [
    dict(ph="M", name="process_name"),
    scope("_Linear", 0, 100),
    *kernel(1, "nvjet_tst_256x128", 1000, 3000, 10),
    *kernel(2, "rmsnorm_fwd", 4000, 500, 20),  # inside a linear, and no product
    scope("autograd::engine::evaluate_function: _LinearBackward", 200, 100, tid=2),
    scope("_LinearBackward", 201, 98, tid=2),
    scope("recompute", 210, 20, tid=2, cat="user_annotation"),
    *kernel(3, "nvjet_tst_64x64", 5000, 700, 215, tid=2),
    *kernel(4, "nvjet_tst_64x64", 5700, 900, 240, tid=2),
    scope("FusedAttnFunc", 400, 10),
    *kernel(5, "cudnn_generated_fort_native_sdpa", 7000, 2000, 401),
    *kernel(6, "ncclDevKernel_AllReduce", 8000, 4000, 403),  # beside the one before it
    scope("optimizer", 500, 100, cat="user_annotation"),
    scope("aten::mul", 510, 10),
    *kernel(7, "multi_tensor_apply", 12000, 100, 511),
    *kernel(8, "elementwise", 13000, 50, 700),
    scope("CheckpointFunctionBackward", 800, 100, tid=2),
    scope("_Linear", 810, 10, tid=2),
    *kernel(9, "nvjet_tst_64x64", 14000, 200, 811, tid=2),  # its forward again
    scope("_LinearBackward", 830, 10, tid=2),
    *kernel(10, "nvjet_tst_64x64", 14200, 300, 831, tid=2),
]


def test_kernels_belong_to_the_innermost_known_scope():
    found = step_profile.milliseconds_by_part(EVENTS, 0.015)
    busy = 3000 + 500 + 700 + 900 + 5000 + 100 + 50 + 200 + 300
    assert found == pytest.approx(
        {
            "linear layers": 4.2,
            step_profile.RECOMPUTE: 0.9,
            "attention": 2.0,
            step_profile.COMMUNICATION: 4.0,
            step_profile.OPTIMIZER: 0.1,
            step_profile.OTHER: 0.55,
            step_profile.IDLE: 15 - busy / 1e3,
        }
    )


def test_kernels_are_counted_by_name_and_part():
    slowest, *_ = found = step_profile.slowest_kernels(EVENTS, 4)
    assert slowest == dict(part="communication", calls=1, ms=4.0, kernel="ncclDevKernel_AllReduce")
    assert [record["ms"] for record in found] == [4.0, 3.0, 2.0, pytest.approx(1.2)]
    assert found[3]["kernel"] == "nvjet_tst_64x64" and found[3]["calls"] == 2  # not those of the recompute


def scopes_of_a_step() -> set[str]:
    recompute = {"recompute": "selective", "recompute_modules": ["mlp_act"]}
    training = Training(tiny_config({"train": recompute}))
    events = step_profile.trace(lambda: training.step(0))
    return {event["name"] for event in events if event.get("cat") in step_profile.SCOPES}


def test_the_scopes_of_a_real_step_are_known():
    """Check the names of the graph's nodes, which a change of the code would change."""
    import re

    names = run_ranks(1, scopes_of_a_step)[0]
    for part, pattern in step_profile.PARTS.items():
        if part != step_profile.OPTIMIZER:  # marked by the benchmark
            assert any(re.search(pattern, name) for name in names), part
    for node in ("FastWeightLinear", "_ChunkTarget", "_LinearCrossEntropy"):
        assert {node, f"{node}Backward"} <= names


def test_floors_follow_the_work():
    def floors(*overrides):
        step = ["recipe=qwen3_4b_ttt", "parallel=h200", "model.vocab_size=151936", "train.recompute=none", *overrides]
        config = to_config(compose_config([*step, "train.recompute_core_attn=true"], ROOT / "recipes"))
        return step_profile.floors(config, 8, 8e14, 4e12)

    plain, longer = floors(), floors("data.seq_length=65536", "train.global_batch_size=64")
    assert longer["linear layers"] == pytest.approx(plain["linear layers"])  # as many tokens
    assert longer["attention"] == pytest.approx(2 * plain["attention"])
    assert plain["optimizer"] == longer["optimizer"]
    assert floors("ttt.enabled=false")["fast weights"] == 0
    again = floors("train.recompute=selective", "train.recompute_modules=[mlp]")
    assert again["recompute"] > plain["recompute"] == 0
