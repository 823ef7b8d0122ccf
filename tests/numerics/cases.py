"""Random shapes, documents and chunk sizes, and how results are compared."""

import itertools
import math
import random
from collections.abc import Iterable

import torch


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; of the value alone where the reference is zero."""
    scale = reference.norm()
    return ((value - reference).norm() / (scale if scale > 0 else 1.0)).item()


def largest(errors: Iterable[float]) -> float:
    """The largest; NaN where one is, which ``max`` leaves out."""
    errors = list(errors)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def random_documents(rng: random.Random, length: int, unit: int = 1) -> torch.Tensor | None:
    """Bounds of documents at multiples of ``unit`` in ``length`` tokens; None (one document) now and then."""
    if rng.random() < 0.3:
        return None
    places = range(unit, length, unit)
    cuts = sorted(rng.sample(places, min(len(places), rng.randint(0, 4))))
    return torch.tensor([0, *cuts, length], dtype=torch.int32)


def operands(seed: int, s: int, b: int, d: int, f: int, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """z (s, b, f), v (s, b, d), weight (d, f) and an output gradient (s, b, d)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (s, b, f), (s, b, d), (d, f), (s, b, d)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def update_norms(z: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, eta: float) -> torch.Tensor:
    """Squared norms of what documents sum up to, by definition; in rising order."""
    bounds = [0, len(z)] if cu_seqlens is None else cu_seqlens.tolist()
    norms = [
        (eta * v[start:stop, row].T @ z[start:stop, row]).square().sum()
        for row, (start, stop) in itertools.product(range(z.shape[1]), itertools.pairwise(bounds))
    ]
    return torch.stack(norms).sort().values


def with_gradients(function, z, v, weight, g, **options):
    """The output and the gradients of z, v and weight."""
    inputs = [tensor.clone().requires_grad_() for tensor in (z, v, weight)]
    out = function(*inputs, **options)
    return out, *torch.autograd.grad(out, inputs, g, materialize_grads=True)
