"""Check the recompute of single activations: the same numbers, less memory, and nothing after them a second time."""

import weakref
from collections import Counter
from typing import ClassVar

import pytest
import torch

from inplace_ttt.config import Train, recomputed_modules
from inplace_ttt.fit import CHEAP
from inplace_ttt.megatron.recompute import recompute_outputs, recomputed, recomputing
from layouts import parallel
from models import train_losses
from ranks import run_ranks


class Doubled(torch.autograd.Function):
    """Return 2 x, in memory whose release can be observed."""

    alive: ClassVar[list] = []
    runs = 0

    @staticmethod
    def forward(ctx, x):
        array = (2 * x.detach()).numpy()
        Doubled.alive.append(weakref.ref(array))
        Doubled.runs += 1
        return torch.from_numpy(array)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def living() -> int:
    return sum(one() is not None for one in Doubled.alive)


@pytest.fixture(autouse=True)
def forget():
    Doubled.alive, Doubled.runs = [], 0


def graph(x: torch.Tensor, scope: bool = True) -> torch.Tensor:
    """Build a chain whose two outputs are saved by nodes that follow them, the first as a transposed view."""
    with recomputing(scope):
        y = recomputed(Doubled.apply, x)
        z = recomputed(Doubled.apply, y * 1.0)
        return (z.square() * y.t().sin().t()).sum()


def test_outputs_are_freed_and_computed_once_more():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(graph(x, scope=False), x)
    Doubled.runs = 0
    kept = graph(x, scope=False)
    assert (living(), Doubled.runs) == (2, 2)
    del kept
    loss = graph(x)
    assert (living(), Doubled.runs) == (0, 4)
    assert (torch.autograd.grad(loss, x)[0] == expected).all()
    assert (living(), Doubled.runs) == (0, 6)


def test_a_chain_of_calls_is_not_kept():
    """Check two calls of which the second reads the first's output: neither is kept, and each runs once more."""
    x = torch.randn(5, requires_grad=True)
    with recomputing():
        loss = recomputed(Doubled.apply, recomputed(Doubled.apply, x)).square().sum()
    assert (living(), Doubled.runs) == (0, 2)
    loss.backward()
    assert (living(), Doubled.runs) == (0, 4)
    torch.testing.assert_close(x.grad, 32 * x.detach())


def test_a_graph_can_be_used_twice():
    x = torch.randn(3, 4, requires_grad=True)
    loss = graph(x)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert (torch.autograd.grad(loss, x)[0] == first).all()


def test_views_of_inputs_are_left_to_who_owns_them():
    x = torch.randn(4, 6, requires_grad=True)
    with recomputing():
        left, right = recomputed(lambda t: t.chunk(2, dim=1), x * 1.0)
        loss = (left.exp() * right).sum()
    loss.backward()
    a, b = x.detach().chunk(2, dim=1)
    torch.testing.assert_close(x.grad, torch.cat([a.exp() * b, a.exp()], dim=1))


def test_no_effect_without_gradients_and_outside():
    linear = torch.nn.Linear(3, 3)
    recompute_outputs(linear)
    x = torch.randn(2, 3)
    with torch.no_grad(), recomputing():
        inside = linear(x)
    assert (inside == linear(x)).all()


def test_of_layer():
    chosen = recomputed_modules(Train(recompute="selective", recompute_modules=["mlp", "rope"], recompute_num_layers=2))
    assert chosen.of_layer(1) == {"mlp", "mlp_act", "rope"}
    assert chosen.of_layer(2) == {"rope"}
    assert recomputed_modules(Train(recompute="full", recompute_modules=["mlp"])).of_layer(0) == set()


# modules, layers that recompute products, and what then runs more than once
CHOICES = [
    (["layernorm"], None, {"RMSNorm"}),
    (["mlp_act"], None, set()),
    (["rope"], None, set()),
    (["mlp", "qkv"], 1, {"ColumnParallelLinear"}),
    ([*CHEAP, "mlp", "qkv", "core_attn"], None, {"ColumnParallelLinear", "RMSNorm", "DocumentAttention"}),
]


def counted(layout: dict) -> list:
    """Return losses of two steps and how often each kind of module ran: without recompute, and for each choice."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from inplace_ttt.megatron.attention import DocumentAttention
    from inplace_ttt.megatron.norm import RMSNorm
    from inplace_ttt.megatron.runtime import leave_groups
    from inplace_ttt.ttt.autograd import FastWeightLinear

    runs = Counter()
    for kind in (ColumnParallelLinear, RowParallelLinear, RMSNorm):
        kind.forward = _counting(kind.forward, runs, kind.__name__)
    DocumentAttention.attend = _counting(DocumentAttention.attend, runs, "DocumentAttention")
    FastWeightLinear.forward = staticmethod(_counting(FastWeightLinear.forward, runs, "FastWeightLinear"))
    found = []
    for modules, layers, _ in [([], None, None), *CHOICES]:
        train = {"recompute": "selective", "recompute_modules": modules, "recompute_num_layers": layers}
        runs.clear()
        losses = train_losses(2, layout, {"train": train if modules else {}})
        found.append((losses, dict(runs)))
        leave_groups()
    return found


def _counting(function, runs, name):
    def call(*args, **kwargs):
        runs[name] += 1
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("layout", [{}, parallel(context=2), parallel(tensor_model=2, sequence_parallel=True)])
def test_the_same_numbers_and_nothing_else_twice(layout):
    (plain, runs), *others = run_ranks(2 if layout else 1, counted, layout)[0]
    for (losses, more), (modules, _, again) in zip(others, CHOICES, strict=True):
        assert losses == plain, modules
        assert {name for name in runs if more[name] > runs[name]} == again, modules
        assert all(more[name] == runs[name] for name in runs.keys() - again), modules
