"""The chunk-local convolution against its definition."""

import random

import pytest
import torch

from inplace_ttt.ttt import naive
from inplace_ttt.ttt.plan import make_plan
from inplace_ttt.ttt.target import ChunkTargets, chunk_ids, chunk_target
from numerics.cases import random_documents, relative_error


@pytest.mark.parametrize("seed", range(30))
def test_matches_definition(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    s, b, d = rng.randint(1, 40), rng.randint(1, 3), rng.randint(1, 6)
    chunk_size, cu_seqlens = rng.randint(1, 12), random_documents(rng, s)
    u = torch.randn(s, b, d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(d, 1, rng.choice([1, 3, 5, 7]), dtype=torch.float64, requires_grad=True)
    projection = torch.randn(d, d, dtype=torch.float64, requires_grad=True) if rng.random() < 0.7 else None
    g = torch.randn(s, b, d, dtype=torch.float64)
    plan = make_plan(s, chunk_size, None if cu_seqlens is None else tuple(cu_seqlens.tolist()))

    inputs = [t for t in (u, weight, projection) if t is not None]

    expected = naive.target(u, weight, projection, chunk_size=chunk_size, cu_seqlens=cu_seqlens)
    value = chunk_target(u, weight, projection, chunk_ids(plan.chunk_lengths))
    assert relative_error(value, expected) < 1e-13
    for gradient, reference in zip(
        torch.autograd.grad(value, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        assert relative_error(gradient, reference) < 1e-13


def test_made_in_two_halves_it_is_the_same():
    torch.manual_seed(0)
    s, d = 24, 6
    ids = chunk_ids(make_plan(s, 4, None).chunk_lengths)
    u, weight, projection = torch.randn(s, 2, d), torch.randn(d, 1, 5), torch.randn(d, d)
    for tensors in ((u, weight, projection), (u, weight, None)):
        expected = chunk_target(*tensors, ids)
        targets = ChunkTargets(*tensors, ids)
        v = targets.allocate().fill_(torch.nan)
        targets.write(v, slice(0, s // 2))
        assert torch.equal(v[: s // 2], expected[: s // 2]) and v[s // 2 :].isnan().all()
        targets.write(v, slice(s // 2, s))
        assert torch.equal(v, expected)
