"""Context parallelism: any number of ranks gives what one gives, documents and batches included."""

import random

import pytest
import torch
import torch.distributed as dist

from inplace_ttt.ttt import CarryCache, ChunkTargets, LayoutError, fast_weight_linear, naive
from inplace_ttt.ttt.plan import make_plan
from inplace_ttt.ttt.target import chunk_ids, chunk_target
from numerics.cases import largest, operands, with_gradients
from numerics.slices import error_of_slices, norms_of_all_ranks, random_case, zigzag
from ranks import run_ranks


def worst_error_over_cases(seeds, comm_dtype=None):
    size, rank, errors = dist.get_world_size(), dist.get_rank(), []
    for seed in seeds:
        (z, v, weight, g), options = random_case(seed, size)
        expected = with_gradients(naive.fast_weight_linear, z, v, weight, g, **options)
        local = *(zigzag(t, size, rank) for t in (z, v)), weight, zigzag(g, size, rank)
        group = dict(cp_group=dist.group.WORLD, comm_dtype=comm_dtype)
        # each rank in an order of its own
        group["keep_chunk_weights"] = random.Random(f"{seed} {rank}").choice([True, False])
        errors.append(error_of_slices(with_gradients(fast_weight_linear, *local, **group, **options), expected))
    return largest(errors)


@pytest.mark.parametrize(("cp_size", "cases"), [(1, 60), (2, 60), (3, 60), (4, 60), (6, 20), (8, 20)])
def test_equals_definition(cp_size, cases):
    assert largest(run_ranks(cp_size, worst_error_over_cases, range(cases))) < 1e-12


def targets_slice_by_slice(cu_seqlens):
    """Whether targets that the operation computes give the same bits as a tensor, and it computes them by slices."""
    size, rank, parts = dist.get_world_size(), dist.get_rank(), []
    write = ChunkTargets.write
    ChunkTargets.write = lambda self, v, tokens: parts.append(tokens) or write(self, v, tokens)
    z, u, weight, g = (zigzag(t, size, rank) if t.dim() == 3 else t for t in operands(0, 48, 2, 5, 7))
    torch.manual_seed(0)
    kernel, projection = torch.randn(5, 1, 3, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    documents = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    ids = chunk_ids(make_plan(48, 4, documents, size, rank).chunk_lengths)
    options = dict(eta=0.5, chunk_size=4, cu_seqlens=cu_seqlens, cp_group=dist.group.WORLD)

    def by_slices(z, u, weight):
        return fast_weight_linear(z, ChunkTargets(u, kernel, projection, ids), weight, **options)

    def at_once(z, u, weight):
        return fast_weight_linear(z, chunk_target(u, kernel, projection, ids), weight, **options)

    found = with_gradients(by_slices, z, u, weight, g)
    made, length = list(parts), len(u)
    pairs = zip(found, with_gradients(at_once, z, u, weight, g), strict=True)
    whole = [slice(0, length)]
    halves = [slice(0, length // 2), slice(length // 2, length)]
    return all(torch.equal(a, b) for a, b in pairs), made == (whole if rank == size - 1 else halves)


@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 8, 40, 48])], ids=["one document", "documents"])
def test_targets_are_computed_slice_by_slice(cp_size, cu_seqlens):
    assert run_ranks(cp_size, targets_slice_by_slice, cu_seqlens) == [(True, True)] * cp_size


def test_bf16_on_the_wire_costs_its_rounding_and_no_more():
    worst = largest(run_ranks(4, worst_error_over_cases, range(20), torch.bfloat16))
    assert 1e-6 < worst < 0.03


def count_messages(cu_seqlens):
    sent = []
    isend = dist.isend
    dist.isend = lambda tensor, *args, **kwargs: (sent.append(tensor.numel()), isend(tensor, *args, **kwargs))[1]
    try:
        z, v, weight, g = operands(0, 16, 1, 4, 4)
        options = dict(eta=1.0, chunk_size=4, cu_seqlens=cu_seqlens, cp_group=dist.group.WORLD)
        out = fast_weight_linear(z.requires_grad_(), v, weight, **options)
        forward = sum(sent)
        out.backward(g)
        return forward, sum(sent) - forward
    finally:
        dist.isend = isend


def test_nothing_is_sent_where_documents_end():
    one_document = run_ranks(2, count_messages, None)
    assert one_document == [(16, 16), (16, 16)]  # slices 0 -> 1 up, 2 -> 3 down; 1 -> 2 stays on rank 1
    each_its_own = run_ranks(2, count_messages, torch.tensor([0, 8, 16, 24, 32]))
    assert each_its_own == [(0, 0), (0, 0)]
    ends_in_slice_1 = run_ranks(2, count_messages, torch.tensor([0, 12, 32]))
    assert ends_in_slice_1 == [(16, 16), (16, 16)]
    ends_with_slice_0 = run_ranks(2, count_messages, torch.tensor([0, 8, 32]))
    assert ends_with_slice_0 == [(0, 16), (16, 0)]


def messages_of_a_repeated_forward():
    """Values and gradients of a second forward that is given what the first received, and what it sent."""
    (z, v, weight, g), options = random_case(3, dist.get_world_size())
    options |= dict(cu_seqlens=None, cp_group=dist.group.WORLD)
    z, v, g = (zigzag(t, dist.get_world_size(), dist.get_rank()) for t in (z, v, g))
    inputs = [t.requires_grad_() for t in (z, v, weight)]
    cache = CarryCache()
    first = fast_weight_linear(*inputs, carry_cache=cache, **options)
    expected = torch.autograd.grad(first, inputs, g)
    exchange, dist.isend, dist.irecv = (dist.isend, dist.irecv), None, None
    second = fast_weight_linear(*inputs, carry_cache=cache, **options)
    dist.isend, dist.irecv = exchange
    again = torch.autograd.grad(second, inputs, g)
    return [torch.equal(x, y) for x, y in zip((first, *expected), (second, *again), strict=True)]


def test_a_repeated_forward_communicates_nothing():
    assert run_ranks(4, messages_of_a_repeated_forward) == [[True] * 4] * 4


def norms_of_each_rank():
    z, v, weight, _ = operands(3, 32, 2, 4, 5)
    size, rank = dist.get_world_size(), dist.get_rank()
    options = dict(eta=0.3, chunk_size=2, cu_seqlens=torch.tensor([0, 6, 8, 20, 32]), return_update_norms=True)
    _, whole = fast_weight_linear(z, v, weight, **options)
    _, part = fast_weight_linear(
        zigzag(z, size, rank), zigzag(v, size, rank), weight, cp_group=dist.group.WORLD, **options
    )
    return (norms_of_all_ranks(part) - whole.sort().values).abs().max().item()


def test_update_norms_are_counted_once_where_documents_end():
    assert largest(run_ranks(2, norms_of_each_rank)) < 1e-12


def refused():
    z, v, weight, _ = operands(0, 12, 1, 4, 4)
    with pytest.raises(LayoutError, match="slice 1 of 4"):
        fast_weight_linear(z, v, weight, eta=1.0, chunk_size=4, cp_group=dist.group.WORLD)


def test_unaligned_slices_are_refused_on_every_rank():
    run_ranks(2, refused)
