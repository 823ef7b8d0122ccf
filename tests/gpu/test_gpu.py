"""What the CPU has shown, on one, two and four GPUs: the operation, the ring over NCCL, the model."""

import functools
import random
import types
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from exported_models import build
from hf_models import SMALL
from inplace_ttt.data.build import micro_batches
from inplace_ttt.evaluation import generation, steps
from inplace_ttt.ttt import fast_weight_linear, naive, scan
from inplace_ttt.ttt.backends.hopper.scan import HopperBackend
from inplace_ttt.validation import transformer_engine_available
from layouts import CHEAP, PRODUCTS, parallel
from models import VOCAB, train_losses
from numerics.cases import largest, operands, random_documents, relative_error, with_gradients
from numerics.slices import error_of_slices, random_case, zigzag
from ranks import run_ranks


def gpus(count):
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")


over_ranks = pytest.mark.parametrize("size", [pytest.param(size, marks=gpus(size)) for size in (2, 4)])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_operation_against_fp64(dtype, bound):
    cu_seqlens = torch.tensor([0, 300, 1024], dtype=torch.int32)
    tensors = [t.to(dtype) for t in operands(0, 1024, 2, 128, 192)]
    options = dict(eta=0.01, chunk_size=64, cu_seqlens=cu_seqlens)
    exact = [t.double().requires_grad_() for t in tensors[:3]]
    expected = naive.fast_weight_linear(*exact, **options)
    expected = expected, *torch.autograd.grad(expected, exact, tensors[3].double())
    inputs = [t.cuda().requires_grad_() for t in tensors[:3]]
    out = fast_weight_linear(*inputs, **options)
    for value, reference in zip((out, *torch.autograd.grad(out, inputs, tensors[3].cuda())), expected, strict=True):
        assert relative_error(value.double().cpu(), reference) < bound


def error_over_ranks(tensors, expected, **options) -> float:
    """Of this rank's slices, and of the weight's gradient summed over ranks."""
    size, rank = dist.get_world_size(), dist.get_rank()
    z, v, weight, g = tensors
    local = [t.cuda() for t in (zigzag(z, size, rank), zigzag(v, size, rank), weight, zigzag(g, size, rank))]
    return error_of_slices(with_gradients(fast_weight_linear, *local, cp_group=dist.group.WORLD, **options), expected)


def ring_errors(seeds, prefix):
    errors = []
    for seed in seeds:
        tensors, options = random_case(seed, dist.get_world_size())
        expected = with_gradients(fast_weight_linear, *(t.cuda() for t in tensors), **options)
        errors.append(error_over_ranks(tensors, expected, prefix=prefix, **options))
    return largest(errors)


@over_ranks
@pytest.mark.parametrize("prefix", ["ring", "ring_messages"])
def test_ring(prefix, size):
    assert largest(run_ranks(size, ring_errors, range(40), prefix, backend="nccl")) < 1e-12


def ring_with_kernels_errors(seeds, prefix):
    """Of bf16 operands over ranks, against the definition in fp64 on one."""
    size, errors = dist.get_world_size(), []
    for seed in seeds:
        rng = random.Random(seed)
        chunk_size, d, f = rng.choice([64, 128, 256]), 64 * rng.randint(1, 9), 64 * rng.randint(1, 7)
        length, b = 2 * size * chunk_size * rng.randint(1, 3), rng.randint(1, 2)
        bounds = random_documents(rng, length, unit=chunk_size)
        options = dict(eta=0.01, chunk_size=chunk_size, cu_seqlens=bounds)
        tensors = [t.to(torch.bfloat16) for t in operands(seed, length, b, d, f)]
        expected = with_gradients(naive.fast_weight_linear, *(t.double().cuda() for t in tensors), **options)
        options |= dict(prefix=prefix, keep_chunk_weights=rng.choice([True, False]))
        with mock.patch.object(scan, "STATE_PER_WAVE", rng.choice([2, scan.STATE_PER_WAVE])):  # most blocks, or two
            errors.append(error_over_ranks(tensors, expected, **options))
    return largest(errors)


@over_ranks
@pytest.mark.parametrize("prefix", ["ring", "ring_messages"])
def test_ring_with_kernels(prefix, size):
    assert largest(run_ranks(size, ring_with_kernels_errors, range(60), prefix, backend="nccl")) < 1e-2


def assert_close(results, expected, bound):
    for (loss, norm), (loss_1, norm_1) in zip(results, expected, strict=True):
        assert abs(loss - loss_1) <= bound * loss_1
        assert abs(norm - norm_1) <= 5 * bound * norm_1


# Wider than on the CPU, as fused kernels want it, and with chunks that the fast weights' kernels take in bf16
WIDE = {
    "model": {"hidden_size": 256, "ffn_hidden_size": 512, "kv_channels": 64, "init_method_std": 0.03},
    "ttt": {"chunk_size": 64, "eta": 0.005},
    "data": {"seq_length": 1024},
}
VARIANTS = {
    "packed": [],
    "one document": [{"data": {"reset_at_documents": False}}],
    "input_embed": [{"ttt": {"target": "input_embed"}}],
    "recompute": [{"train": {"recompute": "full"}}],
    "recompute without attention": [{"train": {"recompute": "full", "recompute_core_attn": False}}],
    "recompute of modules": [PRODUCTS],
    "clipped": [{"ttt": {"clip": 0.2}}],
    "windows": [{"model": {"sliding_window": 100, "window_attn_skip_freq": 2}}],
}
LAYOUTS = {
    "CP2": (2, parallel(context=2)),
    "TP2 SP": (2, parallel(tensor_model=2, sequence_parallel=True)),
    "PP2": (2, parallel(pipeline_model=2)),
    "CP4": (4, parallel(context=4)),
    "CP2 TP2 SP": (4, parallel(context=2, tensor_model=2, sequence_parallel=True)),
    "CP2 PP2": (4, parallel(context=2, pipeline_model=2)),
    "CP8": (8, parallel(context=8)),
    "CP4 TP2 SP": (8, parallel(context=4, tensor_model=2, sequence_parallel=True)),
    "CP2 PP2 TP2 SP": (8, parallel(context=2, pipeline_model=2, tensor_model=2, sequence_parallel=True)),
}
EXACT = "local", torch.float32
BF16 = [(impl, torch.bfloat16) for impl in ("local", *["transformer_engine"] * transformer_engine_available())]


def model_losses(layout: dict, kinds: list) -> dict:
    """Losses and gradient norms of a few steps, by variant, layers and dtype."""
    from inplace_ttt.megatron import runtime

    losses = {}
    for variant, changes in VARIANTS.items():
        for impl, dtype in kinds:
            losses[variant, impl, dtype] = train_losses(4, WIDE, *changes, layout, impl=impl, dtype=dtype)
            runtime.leave_groups()
    return losses


@functools.cache
def on_one_gpu():
    return run_ranks(1, model_losses, {}, [EXACT, *BF16], backend="nccl")[0]


@functools.cache
def on_several_gpus(name: str):
    size, layout = LAYOUTS[name]
    return run_ranks(size, model_losses, layout, [EXACT, *BF16], backend="nccl")[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_follows_fp32(variant):
    for kind in BF16:
        assert_close(on_one_gpu()[variant, *kind], on_one_gpu()[variant, *EXACT], 1e-2)


def test_variants_differ():
    """Check that each variant changes the losses."""
    first = [on_one_gpu()[name, *EXACT][0] for name in ("packed", "one document", "input_embed", "clipped", "windows")]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=gpus(size)) for name, (size, _) in LAYOUTS.items()])
def test_layouts_equal_one_gpu(name, variant):
    assert_close(on_several_gpus(name)[variant, *EXACT], on_one_gpu()[variant, *EXACT], 1e-4)
    for kind in BF16:
        assert_close(on_several_gpus(name)[variant, *kind], on_one_gpu()[variant, *EXACT], 1e-2)


def losses_and_peaks(impl: str) -> dict:
    """Return losses of a few steps in bf16 and the peak of allocated bytes, without recompute and with it."""
    from inplace_ttt.megatron import runtime

    found, longer = {}, {"data": {"seq_length": 8192}, "ttt": {"keep_chunk_weights": False}}
    for name, changes in {"none": [], "cheap": [CHEAP], "products": [PRODUCTS]}.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        losses = train_losses(3, WIDE, longer, *changes, impl=impl, dtype=torch.bfloat16)
        found[name] = losses, torch.cuda.max_memory_allocated()
        runtime.leave_groups()
    return found


@pytest.mark.parametrize("impl", [impl for impl, _ in BF16])
def test_recompute_of_modules_saves_memory_and_changes_nothing(impl):
    found = run_ranks(1, losses_and_peaks, impl, backend="nccl")[0]
    losses, peaks = zip(*found.values(), strict=True)
    if impl == "local":
        assert losses[0] == losses[1] == losses[2]
    else:  # the backward of its attention adds in any order
        assert losses[0][0][0] == losses[1][0][0] == losses[2][0][0]
        assert_close(losses[1][:1], losses[0][:1], 2e-6)
        assert_close(losses[2][:1], losses[0][:1], 2e-6)
        assert_close(losses[1], losses[0], 1e-3)
        assert_close(losses[2], losses[0], 1e-3)
    assert peaks[0] > peaks[1] > peaks[2]


def losses_of_options() -> dict:
    """Return losses of a few steps in bf16, and the peak of allocated bytes, with options of Transformer Engine."""
    from inplace_ttt.megatron import runtime

    options = {
        "plain": {},
        "bf16 gradients": {"optim": {"main_grads_dtype": "bf16"}},
        "bf16 moments": {"optim": {"moments_dtype": "bf16"}},
        "offload": {"train": {"offload_layers": 2}},
        "fp8": {"train": {"fp8": "hybrid"}},
        "fp8 blockwise": {"train": {"fp8": "e4m3", "fp8_recipe": "blockwise"}},
        "fp8 recompute": {"train": {"fp8": "hybrid", **PRODUCTS["train"]}},
    }
    longer, found = {"data": {"seq_length": 8192}, "ttt": {"keep_chunk_weights": False}}, {}
    for name, change in options.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        losses = train_losses(4, WIDE, longer, change, impl="transformer_engine", dtype=torch.bfloat16)
        found[name] = losses, torch.cuda.max_memory_allocated()
        runtime.leave_groups()
    return found


@pytest.mark.skipif(not transformer_engine_available(), reason="needs Transformer Engine")
def test_precisions_and_offloading():
    found = run_ranks(1, losses_of_options, backend="nccl")[0]
    plain, peak = found.pop("plain")
    for name, (losses, _) in found.items():
        assert_close(losses, plain, 1e-3 if name == "offload" else 2e-2)
    assert found["offload"][1] < peak
    assert found["fp8 recompute"][1] < found["fp8"][1]
    assert_close(found["fp8 recompute"][0], found["fp8"][0], 1e-3)


@pytest.mark.parametrize(("columns", "here"), [(128, 128), (151936, 151669), (20000, 0)])
def test_kernels_of_the_cross_entropy(columns, here):
    from inplace_ttt.megatron import loss
    from inplace_ttt.megatron.kernels import loss as kernels

    torch.manual_seed(0)
    logits = torch.randn(37, columns, device="cuda") * 10
    label = torch.randint(-1, max(here, 1), (37,), device="cuda") if here else torch.full((37,), -1, device="cuda")
    best, sums = kernels.best_and_sums(logits, here)
    expected = loss.best_and_sums(logits, here)
    assert best.equal(expected[0])
    torch.testing.assert_close(sums, expected[1], rtol=1e-5, atol=0)
    log_sum, counts = torch.logsumexp(logits, dim=1), torch.rand(37, device="cuda") > 0.3
    arguments = log_sum, label, counts, here, torch.float32
    found, expected = (part.logit_gradients(logits.clone(), *arguments) for part in (kernels, loss))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_kernels_of_norms_products_and_heads(dtype, bound):
    """Compare outputs and gradients with the definitions in fp64, which run in torch's operations."""
    from inplace_ttt.megatron.heads import make_heads
    from inplace_ttt.megatron.norm import rms_norm
    from inplace_ttt.megatron.rope import RotaryEmbedding
    from inplace_ttt.megatron.swiglu import swiglu

    torch.manual_seed(0)
    table = RotaryEmbedding(1e6 ** -torch.linspace(0, 1, 64)).cuda()(torch.arange(100000, 100513)[None].cuda())
    make = functools.partial(make_heads, groups=8, channels=128, eps=1e-6)
    cases = [
        (lambda x, w: rms_norm(x, w, 1e-6), [(513, 2, 2560), (2560,)]),
        (lambda x, w: rms_norm(x, w, 1e-6), [(513, 2, 5120), (5120,)]),
        (swiglu, [(513, 2, 2 * 9728)]),
        (lambda qkv, q, k: make(qkv, table, q, k), [(513, 2, 48 * 128), (128,), (128,)]),
        (lambda qkv: make(qkv, table, None, None), [(513, 2, 48 * 128)]),
    ]
    for function, shapes in cases:
        inputs = [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]
        exact = [one.detach().double().requires_grad_() for one in inputs]
        found, expected = (function(*some) for some in (inputs, exact))
        found, expected = (one if isinstance(one, tuple) else (one,) for one in (found, expected))
        given = [torch.randn_like(one) for one in found]
        found += torch.autograd.grad(found, inputs, given)
        expected += torch.autograd.grad(expected, exact, [one.double() for one in given])
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype and (a.double() - b).norm() / b.norm() < bound


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_exported_model_calls_the_kernels(clip, monkeypatch):
    """Compare with what its own file computes, to the rounding of bf16."""
    from inplace_ttt.hf import modeling_inplace_ttt as exported

    torch.manual_seed(0)
    config = exported.InPlaceTTTQwen3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, ttt_layers=[0, 2], ttt_chunk=64, ttt_lr=0.02, ttt_clip=clip,
    )  # fmt: skip
    model = exported.InPlaceTTTQwen3ForCausalLM(config).eval().cuda()
    for name, parameter in model.named_parameters():
        if "ttt" in name:
            parameter.data.normal_(0, 0.1)
    text = torch.randint(0, VOCAB, (2, 500), device="cuda")
    calls, scan_chunks = [], HopperBackend.scan
    monkeypatch.setattr(HopperBackend, "scan", lambda *a, **k: calls.append(1) or scan_chunks(*a, **k))
    with torch.no_grad():
        monkeypatch.setattr(exported, "fast_weight_linear", None)
        exact = model.double()(text).logits
        model.bfloat16()
        by_itself = model(text).logits
        assert not calls
        monkeypatch.setattr(exported, "fast_weight_linear", fast_weight_linear)
        by_operation = model(text).logits
    assert calls
    assert relative_error(by_operation.double(), exact) < 1.2 * relative_error(by_itself.double(), exact) + 1e-4


@pytest.mark.parametrize("variant", ["qwen3", "input_embed, no projection", "bounded", None])
def test_answers_by_a_cuda_graph(variant, monkeypatch):
    """They are those of steps that nothing records, over several chunks; also of a model without fast weights."""
    network = build(variant) if variant else AutoModelForCausalLM.from_config(Qwen3Config(**SMALL)).eval()
    network.cuda()
    tokens = torch.randint(0, 199, (5, 70), generator=torch.Generator().manual_seed(1)).tolist()
    asked = [generation.Prompt(n, tuple(row[: 70 - 11 * n]), 50) for n, row in enumerate(tokens)]
    model = types.SimpleNamespace(network=network, tokenizer=mock.Mock(), name="model")
    model.tokenizer.batch_decode = lambda texts, **_: texts
    recorded = generation.answer(model, asked)
    begin = steps.GreedySteps.__init__
    monkeypatch.setattr(
        steps.GreedySteps, "__init__", lambda self, *args: begin(self, *args) or setattr(self, "records", False)
    )
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    assert recorded == generation.answer(model, asked) and not replays
    monkeypatch.setattr(steps.GreedySteps, "__init__", begin)
    assert recorded == generation.answer(model, asked) and len(replays) == 48
    assert all(len(text) == 50 for text in recorded) and len({tuple(text) for text in recorded}) > 1


def test_batches_come_pinned_from_workers():
    from inplace_ttt.data.recall import KeyValueRecall

    options = dict(micro_batch_size=1, cp_size=1, cp_rank=0, chunk_size=64)
    data = KeyValueRecall(256, 16, 100, seed=0)
    found = list(micro_batches(data, range(4), num_workers=2, device=torch.device("cuda"), **options))
    expected = list(micro_batches(data, range(4), num_workers=0, device=torch.device("cpu"), **options))
    for batch, reference in zip(found, expected, strict=True):
        assert batch.tokens.is_cuda and batch.layout.chunk_ids.is_cuda
        assert torch.equal(batch.tokens.cpu(), reference.tokens) and batch.layout.plan == reference.layout.plan
        assert reference.pin_memory().layout.chunk_ids.is_pinned()
