"""Another update rule by the example of a decayed sum: on the torch backend, over ranks, against its definition."""

import random

import pytest
import torch
import torch.distributed as dist

from inplace_ttt.ttt import UpdateRule, fast_weight_linear, naive
from inplace_ttt.ttt.products import add_outer_sum
from numerics.cases import largest, operands, random_documents, relative_error, with_gradients
from numerics.slices import error_of_slices, random_case, zigzag
from ranks import run_ranks


class DecayedSum(UpdateRule):
    """``S <- decay * S + eta * sum_t v_t z_t^T``; the definition is ``naive.decayed_fast_weight_linear``."""

    name = "decayed sum"
    suffix_is_weight_gradient = False  # the suffix scan decays, dL/dW does not

    def __init__(self, decay: float):
        self.decay = decay

    def update_state(self, state, v, z, eta):
        add_outer_sum(state.mul_(self.decay), v, z, eta)

    def update_suffix(self, suffix, g, z):
        add_outer_sum(suffix.mul_(self.decay), g, z)


@pytest.mark.parametrize("seed", range(20))
def test_a_decayed_sum_matches_its_definition(seed):
    rng = random.Random(seed)
    s, b, d, f = rng.randint(1, 40), rng.randint(1, 3), rng.randint(1, 6), rng.randint(1, 6)
    options = dict(eta=rng.uniform(-1, 1), chunk_size=rng.randint(1, 9), cu_seqlens=random_documents(rng, s))
    decay, inputs = rng.uniform(0, 1), operands(seed, s, b, d, f)
    expected = with_gradients(naive.decayed_fast_weight_linear, *inputs, decay=decay, **options)
    keep = rng.choice([True, False])
    found = with_gradients(fast_weight_linear, *inputs, rule=DecayedSum(decay), keep_chunk_weights=keep, **options)
    for value, reference in zip(found, expected, strict=True):
        assert relative_error(value, reference) < 1e-12


def worst_error_over_ranks(seeds):
    size, rank, errors = dist.get_world_size(), dist.get_rank(), []
    for seed in seeds:
        (z, v, weight, g), options = random_case(seed, size)
        expected = with_gradients(naive.decayed_fast_weight_linear, z, v, weight, g, decay=0.7, **options)
        local = *(zigzag(t, size, rank) for t in (z, v)), weight, zigzag(g, size, rank)
        options |= dict(rule=DecayedSum(0.7), cp_group=dist.group.WORLD)
        errors.append(error_of_slices(with_gradients(fast_weight_linear, *local, **options), expected))
    return largest(errors)


@pytest.mark.parametrize("cp_size", [2, 3])
def test_a_decayed_sum_over_ranks(cp_size):
    assert largest(run_ranks(cp_size, worst_error_over_ranks, range(25))) < 1e-12


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
