"""Other update rules than the paper's: on the torch backend, over ranks, against their definitions."""

import itertools
import random
from functools import partial

import pytest
import torch
import torch.distributed as dist

from inplace_ttt.ttt import DecayedSum, fast_weight_linear, naive
from numerics.cases import largest, operands, random_documents, relative_error, with_gradients
from numerics.slices import error_of_slices, random_case, zigzag
from ranks import run_ranks

# a rule, and its definition: a further rule needs a line here
RULES = {
    "decayed sum": (DecayedSum(0.7), partial(naive.decayed_fast_weight_linear, decay=0.7)),
    "nearly forgotten": (DecayedSum(0.01), partial(naive.decayed_fast_weight_linear, decay=0.01)),
}
every_rule = pytest.mark.parametrize("name", RULES)


@every_rule
@pytest.mark.parametrize("seed", range(20))
def test_a_rule_matches_its_definition(seed, name):
    rng, (rule, definition) = random.Random(seed), RULES[name]
    s, b, d, f = rng.randint(1, 40), rng.randint(1, 3), rng.randint(1, 6), rng.randint(1, 6)
    options = dict(eta=rng.uniform(-1, 1), chunk_size=rng.randint(1, 9), cu_seqlens=random_documents(rng, s))
    inputs = operands(seed, s, b, d, f)
    expected = with_gradients(definition, *inputs, **options)
    keep = rng.choice([True, False])
    found = with_gradients(fast_weight_linear, *inputs, rule=rule, keep_chunk_weights=keep, **options)
    for value, reference in zip(found, expected, strict=True):
        assert relative_error(value, reference) < 1e-12


def worst_error_over_ranks(seeds, name):
    size, rank, errors = dist.get_world_size(), dist.get_rank(), []
    rule, definition = RULES[name]
    for seed in seeds:
        (z, v, weight, g), options = random_case(seed, size)
        expected = with_gradients(definition, z, v, weight, g, **options)
        local = *(zigzag(t, size, rank) for t in (z, v)), weight, zigzag(g, size, rank)
        options |= dict(rule=rule, cp_group=dist.group.WORLD)
        errors.append(error_of_slices(with_gradients(fast_weight_linear, *local, **options), expected))
    return largest(errors)


@every_rule
@pytest.mark.parametrize("cp_size", [2, 3])
def test_a_rule_over_ranks(cp_size, name):
    assert largest(run_ranks(cp_size, worst_error_over_ranks, range(25), name)) < 1e-12


@every_rule
@pytest.mark.parametrize("seed", range(10))
def test_norms_are_those_of_the_states(seed, name):
    """The guard against updates that run away reads the norm of S at the end of each document."""
    rng, (rule, _) = random.Random(seed), RULES[name]
    s, b, chunk_size = rng.randint(1, 40), rng.randint(1, 3), rng.randint(1, 9)
    z, v, weight, _ = operands(seed, s, b, 4, 5)
    cu_seqlens = random_documents(rng, s)
    options = dict(eta=0.7, chunk_size=chunk_size, rule=rule)
    _, norms = fast_weight_linear(z, v, weight, cu_seqlens=cu_seqlens, return_update_norms=True, **options)
    bounds = [0, s] if cu_seqlens is None else sorted(set(cu_seqlens.tolist()))
    expected = []
    for start, end in itertools.pairwise(bounds):
        for row in range(b):
            state = torch.zeros_like(weight)
            for first in range(start, end, chunk_size):
                here = slice(first, min(first + chunk_size, end))
                rule.update_state(state, v[here, row], z[here, row], 0.7)
            expected.append(state.square().sum().item())
    assert sorted(norms.tolist()) == pytest.approx(sorted(expected), rel=1e-9)


def test_the_kernels_refuse_other_rules_by_name():
    z, v, weight, _ = operands(0, 12, 1, 4, 4)
    with pytest.raises(ValueError, match="the paper's update rule, not 'decayed sum'"):
        fast_weight_linear(z, v, weight, eta=1.0, chunk_size=4, rule=DecayedSum(0.5), backend="hopper")
    with pytest.raises(ValueError, match="backend='cuda' is not known: use one of auto, torch, hopper"):
        fast_weight_linear(z, v, weight, eta=1.0, chunk_size=4, backend="cuda")


def test_state_of_a_decayed_sum():
    z, v, weight, _ = operands(1, 12, 1, 4, 4)
    options = dict(eta=0.5, chunk_size=4, rule=DecayedSum(0.5))
    first, state = fast_weight_linear(z[:6], v[:6], weight, output_final_state=True, **options)
    rest = fast_weight_linear(z[6:], v[6:], weight, initial_state=state, **options)
    torch.testing.assert_close(torch.cat([first, rest]), fast_weight_linear(z, v, weight, **options))
