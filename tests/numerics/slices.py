"""Sequences that ranks share: their slices, and how they are compared with the whole."""

import random

import torch
import torch.distributed as dist

from inplace_ttt.ttt.plan import local_slices, slice_bounds
from numerics.cases import largest, operands, random_documents, relative_error


def zigzag(tensor, cp_size, rank):
    edges = slice_bounds(tensor.shape[0], cp_size)
    return torch.cat([tensor[edges[i] : edges[i + 1]] for i in local_slices(cp_size, rank)])


def random_case(seed, cp_size):
    rng = random.Random(seed)
    chunk_size = rng.randint(1, 6)
    s = 2 * cp_size * chunk_size * rng.randint(1, 4)
    b, d, f = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9)
    return operands(seed, s, b, d, f), dict(
        eta=rng.uniform(-1, 1), chunk_size=chunk_size, cu_seqlens=random_documents(rng, s, chunk_size)
    )


def error_of_slices(values, expected) -> float:
    """The largest error of (out, dz, dv, dweight) of this rank against those of the whole sequence."""
    size, rank = dist.get_world_size(), dist.get_rank()
    *local, dweight = (value.double() for value in values)
    dist.all_reduce(dweight)
    slices = [zigzag(reference, size, rank) for reference in expected[:3]]
    pairs = zip((*local, dweight), (*slices, expected[3]), strict=True)
    return largest(relative_error(value, reference) for value, reference in pairs)


def norms_of_all_ranks(norms):
    """In rising order."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, norms)
    return torch.cat(parts).sort().values
