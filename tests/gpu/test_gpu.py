"""What the CPU has shown, on one and on two GPUs: the operation, the ring over NCCL, the model."""

import functools

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import torch.distributed as dist

from inplace_ttt.ttt import fast_weight_linear, naive
from inplace_ttt.validation import transformer_engine_available
from models import SEQ_LENGTH, VOCAB, tiny_config
from numerics.cases import operands, relative_error
from parallel.test_prefix_ring import random_case, zigzag
from ranks import run_ranks

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


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


def ring_errors(seeds):
    size, rank, worst = dist.get_world_size(), dist.get_rank(), 0.0
    for seed in seeds:
        (z, v, weight, g), options = random_case(seed, size)
        whole = [t.cuda().requires_grad_() for t in (z, v, weight)]
        expected = fast_weight_linear(*whole, **options)
        gradients = torch.autograd.grad(expected, whole, g.cuda())
        local = [zigzag(t, size, rank).cuda().requires_grad_() for t in (z, v)] + [weight.cuda().requires_grad_()]
        out = fast_weight_linear(*local, cp_group=dist.group.WORLD, **options)
        dz, dv, dweight = torch.autograd.grad(out, local, zigzag(g, size, rank).cuda())
        dist.all_reduce(dweight)
        for value, reference in zip((out, dz, dv), (expected, *gradients[:2]), strict=True):
            worst = max(worst, relative_error(value, zigzag(reference, size, rank)))
        worst = max(worst, relative_error(dweight, gradients[2]))
    return worst


@two_gpus
def test_ring_over_nccl():
    assert max(run_ranks(2, ring_errors, range(40), backend="nccl")) < 1e-12


def model_losses(impl: str, precision: str, *changes):
    """Losses and gradient norms of a few steps; the model is wider than on the CPU, as fused kernels want it."""
    from inplace_ttt.data.batch import MicroBatch, Sample
    from inplace_ttt.megatron import runtime
    from inplace_ttt.megatron.initialize import initialize
    from inplace_ttt.megatron.model import build_model
    from inplace_ttt.megatron.optimizer import build_optimizer, wrap_data_parallel
    from inplace_ttt.training.step import Stepper

    wide = {"model": {"hidden_size": 256, "ffn_hidden_size": 512, "kv_channels": 64, "init_method_std": 0.03}}
    config = tiny_config(wide, *changes)
    groups = runtime.start(config.parallel, 0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = build_model(config, dtype, impl, VOCAB, groups)
    initialize(model, config, groups)
    for layer, module in model.ttt_modules.items():
        weight = module.ttt_conv.weight
        weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer)) * 0.3)
    wrapped = wrap_data_parallel(model, model.config, config)
    optimizer, scheduler = build_optimizer(wrapped, model.config, config)
    stepper = Stepper(config, wrapped, model.config, groups)
    results = []
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        batches = []
        for _ in range(4 // groups.dp.size()):
            text = torch.randint(0, VOCAB, (SEQ_LENGTH + 1,), generator=generator)
            documents = (0, 24, 40, SEQ_LENGTH) if config.data.reset_at_documents else None
            sample = Sample(text[:-1], text[1:], torch.ones(SEQ_LENGTH), documents)
            batches.append(MicroBatch.collate([sample], groups.cp.size(), groups.cp.rank(), runtime.device()))
        totals = stepper.train(iter(batches), len(batches))
        scheduler.step(increment=1)
        _, norm, _ = optimizer.step()
        optimizer.zero_grad()
        results.append((totals.mean_loss, float(norm)))
    return results


def assert_close(results, expected, bound):
    for (loss, norm), (loss_1, norm_1) in zip(results, expected, strict=True):
        assert abs(loss - loss_1) <= bound * loss_1
        assert abs(norm - norm_1) <= 5 * bound * norm_1


VARIANTS = {
    "packed": [],
    "one document": [{"data": {"reset_at_documents": False}}],
    "input_embed": [{"ttt": {"target": "input_embed"}}],
    "recompute": [{"train": {"recompute": "full"}}],
}
IMPLEMENTATIONS = ["local", "transformer_engine"] if transformer_engine_available() else ["local"]


@functools.cache
def exact(variant: str):
    """One GPU, fp32, local layers."""
    return run_ranks(1, model_losses, "local", "fp32", *VARIANTS[variant], backend="nccl")[0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_follows_fp32(impl, variant):
    assert_close(run_ranks(1, model_losses, impl, "bf16", *VARIANTS[variant], backend="nccl")[0], exact(variant), 1e-2)


@two_gpus
@pytest.mark.parametrize(
    "sizes",
    [
        dict(context_parallel_size=2),
        dict(tensor_model_parallel_size=2, sequence_parallel=True),
        dict(pipeline_model_parallel_size=2),
    ],
)
@pytest.mark.parametrize("variant", ["packed", "one document", "input_embed"])
def test_two_gpus_equal_one(sizes, variant):
    changes = [*VARIANTS[variant], {"parallel": sizes}]
    split = run_ranks(2, model_losses, "local", "fp32", *changes, backend="nccl")[0]
    assert_close(split, exact(variant), 1e-4)
    if "transformer_engine" in IMPLEMENTATIONS:
        split = run_ranks(2, model_losses, "transformer_engine", "bf16", *changes, backend="nccl")[0]
        assert_close(split, exact(variant), 1e-2)
