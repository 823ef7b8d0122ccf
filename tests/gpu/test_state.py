"""States and clipping with the kernels, in bf16, against the definition in fp64."""

import random

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from inplace_ttt.ttt import FastWeightState, fast_weight_linear, naive
from inplace_ttt.ttt.products import gram
from numerics.cases import largest, operands, random_documents, relative_error
from numerics.slices import zigzag
from ranks import run_ranks


def random_case(seed: int, size: int = 1):
    """Return bf16 operands (z, v, weight, g), an initial state in fp32, the gradient of the final one, and options."""
    rng = random.Random(seed)
    chunk_size, b = rng.choice([64, 128, 256]), rng.randint(1, 2)
    d, f = 64 * rng.randint(1, 5), 64 * rng.randint(1, 7)
    if size == 1:
        s, pending = rng.randint(1, 2000), rng.choice([0, rng.randint(0, chunk_size - 1)])
    else:  # cuts lie on chunk boundaries
        s, pending = 2 * size * chunk_size * rng.randint(1, 3), 0
    bounds = random_documents(rng, s, unit=1 if size == 1 else chunk_size)
    tensors = [t.to(torch.bfloat16) for t in operands(seed, s, b, d, f)]
    z, v, _, _ = (t.to(torch.bfloat16) for t in operands(seed + 1000, pending, b, d, f))
    generator = torch.Generator().manual_seed(seed)
    updates, g_updates = torch.randn(2, b, d, f, generator=generator)
    options = dict(eta=rng.choice([0.003, -0.01]), chunk_size=chunk_size, cu_seqlens=bounds)
    # some updates are larger, some are not: their norms are about eta sqrt(chunk_size d f), the weight's sqrt(d f)
    options["clip"] = rng.choice([None, abs(options["eta"]) * chunk_size**0.5 * rng.choice([0.1, 1.0, 10.0])])
    return tensors, FastWeightState(0.1 * updates, z, v), g_updates, options


def run(function, tensors, state, g_updates, options):
    """Return out, final updates where there are some, and all gradients."""
    z, v, weight, g = tensors
    inputs = [t.detach().clone().requires_grad_() for t in (z, v, weight, *state)]
    out, final = function(*inputs[:3], initial_state=FastWeightState(*inputs[3:]), output_final_state=True, **options)
    loss = (out * g).sum() + (0 if final is None else (final.updates * g_updates).sum())
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return out, None if final is None else final.updates, *grads


def in_fp64(tensors, state, g_updates):
    return [t.double().cuda() for t in tensors], FastWeightState(*(t.double().cuda() for t in state)), g_updates.cuda()


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("keep", [True, False])
def test_states_and_clipping_match_the_definition(seed, keep):
    tensors, state, g_updates, options = random_case(seed)
    exact = run(naive.fast_weight_linear, *in_fp64(tensors, state, g_updates), options)
    cuda = [t.cuda() for t in tensors], FastWeightState(*(t.cuda() for t in state)), g_updates.cuda()
    for value, reference in zip(
        run(fast_weight_linear, *cuda, options | dict(keep_chunk_weights=keep)), exact, strict=True
    ):
        assert relative_error(value.double(), reference) < 1e-2


@pytest.mark.parametrize("tokens", [64, 512, 515, 1024])
def test_gram_matrices(tokens):
    x = torch.randn(3, 2 * tokens, 96, device="cuda").bfloat16()[:, :tokens]
    assert relative_error(gram(x).double(), x.double() @ x.double().mT) < 3e-3


def errors_over_ranks(seeds, prefix):
    size, rank, errors = dist.get_world_size(), dist.get_rank(), []
    for seed in seeds:
        tensors, state, g_updates, options = random_case(seed, size)
        exact = run(naive.fast_weight_linear, *in_fp64(tensors, state, g_updates), options)
        local = [t.cuda() if at == 2 else zigzag(t, size, rank).cuda() for at, t in enumerate(tensors)]
        options |= dict(cp_group=dist.group.WORLD, prefix=prefix, keep_chunk_weights=seed % 2 == 0)
        cuda_state = FastWeightState(*(t.cuda() for t in state))
        out, final, dz, dv, dweight, dupdates, *_ = run(
            fast_weight_linear, local, cuda_state, g_updates.cuda(), options
        )
        dweight = dweight.float()
        dist.all_reduce(dweight)
        pairs = [(a, zigzag(exact[at], size, rank)) for a, at in ((out, 0), (dz, 2), (dv, 3))] + [(dweight, exact[4])]
        if rank == 0:
            pairs += [(final, exact[1]), (dupdates, exact[5])]
        errors += [relative_error(value.double(), reference) for value, reference in pairs]
    return largest(errors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("prefix", ["ring", "ring_messages"])
def test_states_over_ranks(prefix):
    assert largest(run_ranks(2, errors_over_ranks, range(40), prefix, backend="nccl")) < 1e-2
