"""What a run is said to need, against what was seen, and what is said of runs that do not fit."""

import math
import re
from functools import partial

import pytest

from inplace_ttt import estimate, fit
from inplace_ttt.training.compose import compose_config, to_config
from launching import ROOT, run_launch_script

STEP_24 = [
    "model=qwen3_4b",
    "model.num_layers=24",
    "data.kind=recall",
    "data.seq_length=32768",
    "train.recompute=full",
    "train.global_batch_size=1",
    "train.steps=1",
    "optim.lr=1e-5",
    "run.name=seen",
]
STEP_128K = ["recipe=qwen3_4b_ttt_128k", "parallel=h200", "train.global_batch_size=1", "train.recompute=full",
             "train.recompute_core_attn=false"]  # fmt: skip
OFF = ["ttt.enabled=false"]


plan = partial(run_launch_script, "plan.py")


@pytest.mark.parametrize(
    ("overrides", "gpus", "gpu", "seen_gib", "seen_seconds"),
    [
        (STEP_24, 1, "H100", 57.6, 3.339),
        (STEP_24 + OFF, 1, "H100", 56.6, 3.337),
        (STEP_128K, 2, "H200", 111.7, 20.4),
        (STEP_128K + OFF, 2, "H200", 110.7, 20.7),
    ],
)
def test_says_what_was_seen(overrides, gpus, gpu, seen_gib, seen_seconds):
    config = to_config(compose_config(overrides, ROOT / "recipes"))
    memory = estimate.memory(config, gpus, estimate.GPUS[gpu])
    assert memory.allocated / estimate.GIB == pytest.approx(seen_gib, rel=0.1)
    assert estimate.step_seconds(config, gpus, estimate.GPUS[gpu]) == pytest.approx(seen_seconds, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "seen_gib"),
    [
        (["train.recompute=none"], 104.6),
        (["train.recompute=none", "train.fp8=hybrid"], 107.7),
        (["train.recompute=full", "train.recompute_core_attn=false", "train.fp8=hybrid"], 85.6),
        (["train.recompute_modules=[mlp]", "train.recompute_num_layers=8", "train.fp8=hybrid"], 105.1),
    ],
)
def test_memory_of_recompute_and_fp8(overrides, seen_gib):
    """Compare with the peaks of all 36 layers on an H200, four samples of 8k."""
    step = ["model.num_layers=36", "data.seq_length=8192", "train.global_batch_size=4", "train.recompute=selective"]
    config = to_config(compose_config([*STEP_24, *step, *overrides], ROOT / "recipes"))
    found = estimate.memory(config, 1, estimate.GPUS["H200"])
    assert found.allocated / estimate.GIB == pytest.approx(seen_gib, rel=0.02)


def test_precision_of_the_optimizer_and_offloading_free_memory():
    """Check bytes per parameter, and that offloaded layers keep nothing."""

    def needs(*overrides: str) -> dict:
        step = [*STEP_24, "train.recompute=none", "ttt.keep_chunk_weights=false", *overrides]
        return estimate.memory(to_config(compose_config(step, ROOT / "recipes")), 1, estimate.GPUS["H200"]).persistent

    plain, moments = needs(), needs("optim.moments_dtype=bf16")
    parameters = plain["weights"] / 2
    assert plain["gradients"] + plain["optimizer"] == 16 * parameters
    assert moments["gradients"] + moments["optimizer"] == (4 + 4 + 2 * 2) * parameters
    assert needs("optim.main_grads_dtype=bf16")["gradients"] == 2 * parameters
    assert needs("train.offload_layers=12")["activations"] == pytest.approx(plain["activations"] / 2, rel=0.01)


def test_kept_chunk_weights_are_counted_where_they_are_kept():
    """Without recompute those of all layers at a time: 4 layers of 16 chunks of 1536 x 4096 in bf16."""

    def needed(*overrides: str) -> float:
        config = to_config(compose_config([*STEP_24, "model.num_layers=4", "model.hidden_size=1536", "ttt.layers=all",
                                           "model.ffn_hidden_size=4096", "ttt.chunk_size=2048", *overrides],
                                          ROOT / "recipes"))  # fmt: skip
        return estimate.memory(config, 1, estimate.GPUS["H100"]).allocated

    kept = 4 * 16 * 2 * 1536 * 4096
    without = needed("train.recompute=none", "ttt.keep_chunk_weights=false")
    assert kept / 2 < needed("train.recompute=none", "ttt.keep_chunk_weights=true") - without <= kept
    assert needed("train.recompute=none") == needed("train.recompute=none", "ttt.keep_chunk_weights=true")
    small = "ttt.chunk_size=64"  # 25 GiB of them
    assert needed("train.recompute=none", small) == needed(
        "train.recompute=none", small, "ttt.keep_chunk_weights=false"
    )


PRESETS = sorted(path.stem for path in (ROOT / "recipes" / "parallel").glob("*.yaml"))
CURRICULA = sorted(path.stem for path in (ROOT / "recipes" / "recipe").glob("*_ttt_128k.yaml"))


@pytest.mark.parametrize("count", [8, 16, 64])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_curriculum_fits_every_preset(preset, count):
    from inplace_ttt.validation import validate

    gpu = estimate.GPUS[preset.upper()]
    for recipe in (*CURRICULA, *(name.removesuffix("_128k") for name in CURRICULA)):
        config = to_config(compose_config([f"recipe={recipe}", f"parallel={preset}"], ROOT / "recipes"))
        config.checkpoint.load = None
        validate(config, count)
        assert estimate.memory(fit.choose_recompute(config, count, gpu), count, gpu).needed <= gpu.memory


@pytest.mark.parametrize(("ranks", "here", "overlaps"), [("16", "8", True), ("8", "8", False), ("", "x", False)])
def test_presets_overlap_between_nodes(monkeypatch, ranks, here, overlaps):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    config = to_config(compose_config(["recipe=qwen3_4b_ttt", "parallel=h100"], ROOT / "recipes"))
    assert config.parallel.overlap_grad_reduce == config.parallel.overlap_param_gather == overlaps


ON_A_LAPTOP = ("recall", "smollm2_135m_ttt", "tiny", "tiny_ttt")  # or on one GPU
RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_the_preset_that_it_names(recipe):
    from inplace_ttt.validation import validate

    content = (ROOT / f"recipes/recipe/{recipe}.yaml").read_text()
    named = re.search(rf"recipe={recipe} parallel=(\w+) +# (\d+) GPUs?", content)
    if named is None:
        assert recipe in ON_A_LAPTOP, f"no comment in {recipe}.yaml names a preset and a number of GPUs"
        return
    gpu, count = estimate.GPUS[named[1].upper()], named[2]
    config = to_config(compose_config([f"recipe={recipe}", f"parallel={named[1]}"], ROOT / "recipes"))
    config.checkpoint.load = None
    validate(config, int(count))
    assert estimate.memory(fit.choose_recompute(config, int(count), gpu), int(count), gpu).needed <= gpu.memory


@pytest.mark.parametrize(
    ("recipe", "billions"),
    [("qwen3_8b_ttt", 20), ("scratch_500m_ttt", 20), ("scratch_1_5b_ttt", 60), ("scratch_4b_window", 120)],
)
def test_recipes_have_the_papers_tokens(recipe, billions):
    config = to_config(compose_config([f"recipe={recipe}"], ROOT / "recipes"))
    tokens = config.train.steps * config.train.global_batch_size * config.data.seq_length
    assert tokens == pytest.approx(billions * 1e9, rel=0.001)


def test_warm_up_in_steps_or_tokens():
    from inplace_ttt.config import warmup_steps

    def steps(*overrides):
        return warmup_steps(to_config(compose_config(["recipe=scratch_1_7b_ttt", *overrides], ROOT / "recipes")))

    assert steps() == math.ceil(1.6e9 / (1024 * 8192)) == 191
    assert steps("optim.warmup_tokens=null") == round(0.02 * 14305)
    assert steps("optim.warmup_tokens=null", "optim.warmup_steps=7") == 7


def test_says_that_it_fits():
    done = plan("recipe=qwen3_4b_ttt_128k", "parallel=h200", "--gpus", "16")
    assert done.returncode == 0, done.stderr
    assert "16 x H200" in done.stdout and "CP 2 DP 8" in done.stdout and "it fits" in done.stdout


@pytest.mark.slow
def test_what_does_not_fit_gets_a_layout_that_does():
    done = plan("recipe=llama3_8b_ttt", "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
                "train.recompute=none")  # fmt: skip
    assert done.returncode == 2
    settings = [word for word in done.stderr.split() if "=" in word]
    assert settings and plan("recipe=llama3_8b_ttt", *settings).returncode == 0
    none = plan("recipe=llama3_8b_ttt_128k", "--gpus", "2")
    assert none.returncode == 2 and "use more GPUs" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe=qwen3_4b_ttt", "--gpu", "B300"], "H100, H200, A100"),
        (["recipe=qwen3_4b_ttt", "--gpus", "0"], "use 1 to"),
        (["recipe=qwen3_4b_ttt", "--gpus", "7"], "use 133"),
        (["recipe=qwen3_4b_tt"], "did you mean recipe=qwen3_4b_ttt?"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, said):
    done = plan(*arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def chosen(memory: float, *overrides: str):
    """Return the choice of train.recompute=auto for one GPU of so many GiB, and whether it fits."""
    auto = [*STEP_24, "train.recompute=auto", "train.recompute_core_attn=true", *overrides]
    config, gpu = to_config(compose_config(auto, ROOT / "recipes")), estimate.Gpu("H100", memory * estimate.GIB)
    found = fit.choose_recompute(config, 1, gpu)
    return found, estimate.memory(found, 1, gpu).needed <= gpu.memory


def test_auto_recomputes_as_little_as_fits():
    """Check that less memory means more recompute, from nothing over chunk weights and products to whole layers."""
    seen = [chosen(gib) for gib in (400, 150, 120, 115, 90, 75, 65, 5)]
    assert [fits for _, fits in seen] == [True] * 7 + [False]
    none, weights, cheap, chunks, *products, full, impossible = [found.train for found, _ in seen]
    assert weights.recompute == "none"
    assert (none.recompute, full.recompute, impossible.recompute) == ("none", "full", "full")
    assert cheap.recompute_modules == chunks.recompute_modules == ["layernorm", "mlp_act", "rope"]
    assert all(train.recompute_modules == ["layernorm", "mlp_act", "rope", "mlp", "qkv"] for train in products)
    layers = [train.recompute_num_layers for train in products]
    assert layers == sorted(set(layers))
    keeps = [found.ttt.keep_chunk_weights for found, _ in seen]
    assert keeps == [True, False, True, False, False, False, None, None]
    assert chosen(115, "ttt.keep_chunk_weights=true")[0].ttt.keep_chunk_weights is True
    without_qk_norm = chosen(115, "model.family=llama")[0].train
    assert without_qk_norm.recompute_modules == ["layernorm", "mlp_act"]  # rope frees as much as it then keeps


@pytest.mark.parametrize("modules", [["layernorm"], ["mlp_act"], ["rope"], ["mlp"], ["qkv"], ["core_attn"]])
def test_each_module_frees_memory_and_costs_time(modules):
    def needs(*overrides: str) -> tuple[float, float]:
        plain = [*STEP_24, "train.recompute_core_attn=true", *overrides]
        config = to_config(compose_config(plain, ROOT / "recipes"))
        return (
            estimate.memory(config, 1, estimate.GPUS["H200"]).allocated,
            estimate.step_seconds(config, 1, estimate.GPUS["H200"]),
        )

    gib, seconds = needs("train.recompute=none")
    less, longer = needs("train.recompute=selective", f"train.recompute_modules=[{modules[0]}]")
    assert less < gib
    assert (longer > seconds) is (modules[0] in ("mlp", "qkv", "core_attn"))


def test_options_of_gpus_can_be_planned_anywhere():
    options = ["train.fp8=hybrid", "optim.moments_dtype=bf16", "optim.main_grads_dtype=bf16"]
    done = plan("recipe=qwen3_4b_ttt", "parallel=h100", *options, "--gpus", "8")
    assert done.returncode == 0 and "FP8 weights" in done.stdout
    done = plan("recipe=qwen3_4b_ttt", "parallel=h100", "train.recompute=none", "train.offload_layers=1", "--gpus", "8")
    assert done.returncode and "it fits with train.recompute=auto train.offload_layers=0" in done.stderr


def test_plan_says_what_auto_chooses():
    done = plan("recipe=qwen3_4b_ttt", "parallel=h200", "--gpus", "8")
    assert "chosen by train.recompute=auto: train.recompute=selective" in done.stdout and done.returncode == 0
