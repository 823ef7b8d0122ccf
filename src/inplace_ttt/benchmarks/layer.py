"""Measure one MLP layer, plain and with fast weights: time, memory, and error relative to float64."""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from inplace_ttt.benchmarks.timing import milliseconds, peak_gib, ratio
from inplace_ttt.ttt import ChunkTargets, fast_weight_linear, histogram, naive
from inplace_ttt.ttt.plan import make_plan
from inplace_ttt.ttt.target import chunk_ids

ETA = 0.01
CLIP = 1e-6  # small enough that every update is rescaled


@dataclass(frozen=True)
class Shape:
    """Describe the sizes of a layer and its input."""

    tokens: int
    hidden: int
    ffn: int
    documents: int = 1  # documents of equal length in the sequence

    @property
    def bounds(self) -> tuple[int, ...]:
        """Return the document bounds: ``documents`` + 1 positions from 0 to ``tokens``."""
        return tuple(self.tokens * i // self.documents for i in range(self.documents + 1))

    @property
    def plain_flops(self) -> float:
        """Return the FLOPs of the plain MLP, forward and backward."""
        return 9 * 2.0 * self.tokens * self.hidden * self.ffn

    def ttt_flops(self, chunk_size: int) -> float:
        """Return the FLOPs of the MLP with fast weights, forward and backward; a multiply-add counts as two.

        Each token adds 3 products of d x d for the projection. Each token whose update is used adds 3 products of d x f
        for the update and its gradients.
        """
        lengths = [stop - start for start, stop in itertools.pairwise(self.bounds)]
        learned_from = sum((length - 1) // chunk_size * chunk_size for length in lengths if length)
        return self.plain_flops + 6.0 * self.hidden * (learned_from * self.ffn + self.tokens * self.hidden)


def materialised(z: Tensor, v: Tensor, weight: Tensor, *, eta: float, chunk_size: int) -> Tensor:
    """Compute the fast-weight map literally: all updates as matrices, their cumulative sum, one batched product."""
    z_chunks, v_chunks = (t.squeeze(1).unflatten(0, (-1, chunk_size)) for t in (z, v))
    updates = eta * torch.einsum("ncd,ncf->ndf", v_chunks, z_chunks)
    weights = weight + updates.cumsum(0) - updates
    return torch.einsum("ncf,ndf->ncd", z_chunks, weights).flatten(0, 1)[:, None]


class Layer:
    """Hold the bf16 parameters of one layer, one rank's input, and the variants of the layer."""

    def __init__(self, shape: Shape, update_norms: bool = False, ranks: int = 1, rank: int = 0):
        d, f = shape.hidden, shape.ffn
        generator = torch.Generator(device="cuda").manual_seed(0)

        def normal(*size, std):
            values = torch.randn(size, generator=generator, device="cuda") * std
            return values.bfloat16().requires_grad_()

        self.shape, self.update_norms, self.share, self.ids = shape, update_norms, (ranks, rank), {}
        self.x = normal(shape.tokens // ranks, 1, d, std=1.0)
        self.fc1, self.fc2 = normal(2 * f, d, std=d**-0.5), normal(d, f, std=f**-0.5)
        self.conv, self.projection = normal(d, 1, 5, std=0.4), normal(d, d, std=d**-0.5)
        self.g = normal(shape.tokens // ranks, 1, d, std=1.0).detach()

    def z(self) -> Tensor:
        """Return the inputs of the down-projection, silu(gate) * up, (s, 1, f) for the s tokens of this rank."""
        gate, up = F.linear(self.x, self.fc1).chunk(2, dim=-1)
        return F.silu(gate) * up

    def targets(self, chunk_size: int) -> ChunkTargets:
        """Return the targets (s, 1, d) of the layer's input, not yet computed; see ``ChunkTargets``."""
        return ChunkTargets(self.x, self.conv, self.projection, self.chunk_ids(chunk_size))

    def chunk_ids(self, chunk_size: int) -> Tensor:
        """Return the chunk IDs; all runs share one copy, as all layers of a model do."""
        if chunk_size not in self.ids:
            lengths = make_plan(self.shape.tokens, chunk_size, self.shape.bounds, *self.share).chunk_lengths
            self.ids[chunk_size] = chunk_ids(lengths).cuda()
        return self.ids[chunk_size]

    def plain(self) -> Tensor:
        """Run the layer without fast weights; return its output (s, 1, d)."""
        return F.linear(self.z(), self.fc2)

    def fast(self, operation: Callable, chunk_size: int) -> Tensor:
        """Run the layer as the model does; ``materialised`` receives its targets as a tensor."""
        z, v = self.z(), self.targets(chunk_size)
        if operation is materialised:
            v = v.materialise()
        return operation(z, v, self.fc2, eta=ETA, chunk_size=chunk_size)

    def forward_backward(self, forward: Callable[[], Tensor]) -> None:
        """Run a forward and the backward of its output, (s, 1, d), for the fixed output gradient ``g``.

        Gradients of an earlier run are dropped first, so that the backward does not add to them.
        """
        for parameter in (self.x, self.fc1, self.fc2, self.conv, self.projection):
            parameter.grad = None
        forward().backward(self.g)

    def variants(self, chunk_size: int, wanted: list[str]) -> dict[str, Callable[[], Tensor]]:
        """Return the forwards of the ``wanted`` variants by name. Each returns the layer's output (s, 1, d).

        A forward is a ``partial`` of ``fast``, whose first argument is the variant's operation.
        """
        bounds = torch.tensor(self.shape.bounds, dtype=torch.int32)
        ours = partial(_noting_norms if self.update_norms else fast_weight_linear, cu_seqlens=bounds)
        operations = {
            "materialised": materialised,
            "chunk loop": partial(ours, backend="torch"),
            "kept": partial(ours, keep_chunk_weights=True),
            "recomputed": partial(ours, keep_chunk_weights=False),
            "clipped": partial(ours, keep_chunk_weights=True, clip=CLIP),
            "counted": partial(_counting_updates, keep_chunk_weights=True, cu_seqlens=bounds),
        }
        return {name: partial(self.fast, operations[name], chunk_size) for name in wanted}


def _noting_norms(*args, **kwargs) -> Tensor:
    out, _ = fast_weight_linear(*args, return_update_norms=True, **kwargs)
    return out


def _counting_updates(*args, **kwargs) -> Tensor:
    out, ratios = fast_weight_linear(*args, return_update_ratios=True, **kwargs)
    histogram.count(ratios)
    return out


def measure(
    shape: Shape, chunk_sizes: list[int], variants: list[str], rounds: int, update_norms: bool = False
) -> list[dict]:
    """Return one record for the plain layer and each variant at each chunk size.

    ``update_norms``: also compute update norms, as training does in each forward except a recompute.
    """
    layer = Layer(shape, update_norms)
    records = []
    layer.forward_backward(layer.plain)  # allocate the libraries' workspaces, which do not belong to the layer
    plain_memory = peak_gib(lambda: layer.forward_backward(layer.plain))
    for chunk_size in chunk_sizes:
        wanted = [name for name in variants if name != "materialised" or _can_materialise(shape, chunk_size)]
        forwards = {"plain": layer.plain, **layer.variants(chunk_size, wanted)}
        memory = {name: peak_gib(partial(layer.forward_backward, forward)) for name, forward in forwards.items()}
        with torch.no_grad():
            forward_times = milliseconds(forwards, rounds)
        times = milliseconds({name: partial(layer.forward_backward, run) for name, run in forwards.items()}, rounds)
        for name in forwards:
            median = statistics.median(times[name])
            flops = shape.plain_flops if name == "plain" else shape.ttt_flops(chunk_size)
            records.append(
                dict(
                    chunk_size=chunk_size,
                    variant=name,
                    forward_ms=statistics.median(forward_times[name]),
                    ms=median,
                    ratio=ratio(times[name], times["plain"]),
                    floor=flops / shape.plain_flops,
                    extra_gib=memory[name] - plain_memory,
                    tflops=flops / median / 1e9,
                )
            )
    return records


def _can_materialise(shape: Shape, chunk_size: int) -> bool:
    weights = 2 * shape.hidden * shape.ffn * (shape.tokens // chunk_size)
    return shape.documents == 1 and shape.tokens % chunk_size == 0 and 8 * weights < torch.cuda.mem_get_info()[0]


def errors(shape: Shape, chunk_size: int, variants: list[str]) -> dict[str, dict[str, float]]:
    """Return RMS errors of output and gradients / RMS of the float64 value, for the same bf16 operands, by variant."""
    layer = Layer(shape)
    with torch.no_grad():
        operands = [layer.z(), layer.targets(chunk_size).materialise(), layer.fc2]
    bounds = torch.tensor(shape.bounds, dtype=torch.int32)
    definition = partial(naive.fast_weight_linear, cu_seqlens=bounds)
    exact, found = {}, {}
    for name in variants:
        if name == "materialised" and not _can_materialise(shape, chunk_size):
            continue
        operation = layer.variants(chunk_size, [name])[name].args[0]
        clip = CLIP if name == "clipped" else None
        if clip not in exact:
            exact[clip] = _values(partial(definition, clip=clip), operands, layer.g, chunk_size, torch.float64)
        values = _values(operation, operands, layer.g, chunk_size, torch.bfloat16)
        found[name] = {
            key: relative_error(value, reference).item()
            for (key, value), reference in zip(values.items(), exact[clip].values(), strict=True)
        }
    return found


def relative_error(value: Tensor, reference: Tensor) -> Tensor:
    """Return the RMS of the difference of two tensors / the RMS of the reference, ()."""
    return (value - reference).norm() / reference.norm().clamp(min=1e-30)


def _values(operation, operands, g, chunk_size, dtype) -> dict[str, Tensor]:
    inputs = [t.detach().to(dtype).requires_grad_() for t in operands]
    out = operation(*inputs, eta=ETA, chunk_size=chunk_size)
    # The last chunk's update is not used, so with one chunk v has no gradient in the definition's graph
    gradients = torch.autograd.grad(out, inputs, g.to(dtype), allow_unused=True, materialize_grads=True)
    return dict(zip(("out", "dz", "dv", "dW"), (t.double() for t in (out.detach(), *gradients)), strict=True))
