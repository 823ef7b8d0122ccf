"""A sequence that is read in parts, and clipping: outputs, states and gradients against the definition, fp64."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist

from inplace_ttt.ttt import CarryCache, FastWeightState, LayoutError, fast_weight_linear, naive
from inplace_ttt.ttt.layer import LayerState, continue_layer
from inplace_ttt.ttt.plan import make_plan
from numerics.cases import largest, operands, relative_error, with_gradients
from numerics.slices import zigzag
from ranks import run_ranks


def documents_with_empty_ones(rng: random.Random, s: int) -> torch.Tensor | None:
    cuts = sorted(rng.choices(range(s + 1), k=rng.randint(0, 4)))
    return torch.tensor([0, *cuts, s]) if rng.random() < 0.6 else None


def values_and_gradients(function, inputs, weights_of, **options):
    """All outputs, and the gradients of all inputs, for random gradients of the outputs."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    state = FastWeightState(*inputs[3:]) if len(inputs) > 3 else None
    out = function(*inputs[:3], initial_state=state, **options)
    outputs = [out] if isinstance(out, torch.Tensor) else [out[0], *out[1]]
    loss = sum((value * weight).sum() for value, weight in zip(outputs, weights_of(outputs), strict=True))
    return [*outputs, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]


def random_weights(outputs):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in outputs]


@pytest.mark.parametrize("seed", range(80))
def test_states_and_clipping_match_the_definition(seed):
    rng = random.Random(seed)
    s, b, d, f, chunk_size = (
        rng.randint(1, 40),
        rng.randint(1, 3),
        rng.randint(1, 6),
        rng.randint(1, 6),
        rng.randint(1, 12),
    )
    pending = rng.choice([0, rng.randint(0, chunk_size - 1)])
    inputs = list(operands(seed, s, b, d, f)[:3])
    if rng.random() < 0.7:
        z, v, _, _ = operands(seed + 1, pending, b, d, f)
        inputs += [torch.randn(b, d, f, dtype=torch.float64), z, v]
    options = dict(
        eta=rng.uniform(-1, 1),
        chunk_size=chunk_size,
        cu_seqlens=documents_with_empty_ones(rng, s),
        output_final_state=rng.random() < 0.7,
        clip=rng.choice([None, 0.05, 0.5, 5.0]),
    )
    expected = values_and_gradients(naive.fast_weight_linear, inputs, random_weights, **options)
    keep = rng.choice([True, False, None])
    found = values_and_gradients(fast_weight_linear, inputs, random_weights, keep_chunk_weights=keep, **options)
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape and relative_error(value, reference) < 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_a_sequence_cut_anywhere_equals_the_whole(seed):
    rng = random.Random(seed)
    s, b, chunk_size = rng.randint(2, 50), rng.randint(1, 2), rng.randint(1, 12)
    inputs = operands(seed, s, b, 4, 5)[:3]
    cuts = sorted({0, s, *rng.sample(range(1, s), min(s - 1, rng.randint(1, 4)))})
    bounds = documents_with_empty_ones(rng, s)
    options = dict(eta=0.3, chunk_size=chunk_size, clip=rng.choice([None, 0.3]))

    def in_parts(z, v, weight, initial_state=None):
        outputs, state = [], initial_state
        for start, stop in itertools.pairwise(cuts):
            documents = None
            if bounds is not None:  # where a document ends with the part before, the next part's first is empty
                inner = [b - start for b in bounds[1:-1].tolist() if start <= b < stop or b == stop == s]
                documents = torch.tensor([0, *inner, stop - start])
            out, state = fast_weight_linear(
                z[start:stop], v[start:stop], weight, cu_seqlens=documents,
                initial_state=state, output_final_state=True, **options,
            )  # fmt: skip
            outputs.append(out)
        return torch.cat(outputs), state

    def at_once(z, v, weight, initial_state=None):
        return fast_weight_linear(z, v, weight, cu_seqlens=bounds, output_final_state=True, **options)

    expected = values_and_gradients(at_once, inputs, random_weights)
    for value, reference in zip(values_and_gradients(in_parts, inputs, random_weights), expected, strict=True):
        assert relative_error(value, reference) < 1e-12


def test_gradcheck_through_clipping_and_states():
    z, v, weight, _ = operands(0, 7, 1, 3, 4)
    z, v = z.requires_grad_(), v.requires_grad_()
    state = FastWeightState(torch.randn(1, 3, 4, dtype=torch.float64), *(t[:1].detach().clone() for t in (z, v)))
    state = FastWeightState(*(t.requires_grad_() for t in state))
    limit = 0.05  # below some updates, above others

    def function(z, v, *state):  # the norm of the weight is a constant by definition: no finite differences in weight
        out, final = fast_weight_linear(
            z, v, weight, eta=0.1, chunk_size=3, clip=limit,
            initial_state=FastWeightState(*state), output_final_state=True,
        )  # fmt: skip
        return out, *final

    assert torch.autograd.gradcheck(function, (z, v, *state))


@pytest.mark.parametrize("shape", [(9, 3, 4), (9, 16, 24)])  # norms from the sum, and from Gram matrices
def test_a_graph_is_walked_twice(shape):
    s, d, f = shape
    z, v, weight, g = operands(4, s, 1, d, f)
    inputs = [t.clone().requires_grad_() for t in (z, v, weight)]
    for keep in (False, True):
        out = fast_weight_linear(*inputs, eta=0.3, chunk_size=3, clip=0.1, keep_chunk_weights=keep)
        first = torch.autograd.grad(out, inputs, g, retain_graph=True)
        for value, again in zip(first, torch.autograd.grad(out, inputs, g), strict=True):
            assert relative_error(again, value) < 1e-14


def test_clipping_rescales_large_updates_alone():
    z, v, weight, _ = operands(1, 12, 1, 4, 5)
    v[4:8] *= 100
    ratio = [(0.1 * v[c, 0].T @ z[c, 0]).norm() / weight.norm() for c in (slice(0, 4), slice(4, 8))]
    clip = (ratio[0] * ratio[1]).sqrt().item()
    out, state = fast_weight_linear(z, v, weight, eta=0.1, chunk_size=4, clip=clip, output_final_state=True)
    plain = fast_weight_linear(z, v, weight, eta=0.1, chunk_size=4)
    torch.testing.assert_close(out[:8], plain[:8])
    update = 0.1 * v[4:8, 0].T @ z[4:8, 0]
    expected = z[8:, 0] @ (weight + 0.1 * v[:4, 0].T @ z[:4, 0] + update * (clip * weight.norm() / update.norm())).T
    torch.testing.assert_close(out[8:, 0], expected)
    assert state.z.shape[0] == 0


def test_update_ratios_are_those_of_chunks_that_are_read():
    z, v, weight, _ = operands(2, 20, 2, 6, 8)
    bounds = torch.tensor([0, 7, 9, 20])
    options = dict(eta=-0.5, chunk_size=3, cu_seqlens=bounds, return_update_ratios=True)
    chunks = [(0, 3), (3, 6), (9, 12), (12, 15), (15, 18)]
    expected = torch.stack(
        [torch.stack([(0.5 * v[a:b, row].T @ z[a:b, row]).norm() for a, b in chunks]) for row in range(2)]
    )
    for clip in (None, 1e-3):  # those before clipping
        _, ratios = fast_weight_linear(z, v, weight, clip=clip, **options)
        torch.testing.assert_close(ratios, expected / weight.norm())


def test_states_that_do_not_fit_are_refused():
    z, v, weight, _ = operands(3, 12, 1, 4, 5)
    options = dict(eta=1.0, chunk_size=4)
    _, state = fast_weight_linear(z[:11], v[:11], weight, output_final_state=True, **options)
    assert state.unfinished == 3
    with pytest.raises(ValueError, match=r"updates is \(1, 4, 5\) torch.float64: these operands need \(2, 4, 5\)"):
        fast_weight_linear(z.repeat(1, 2, 1), v.repeat(1, 2, 1), weight, initial_state=state, **options)
    with pytest.raises(ValueError, match="holds 3 tokens of an unfinished chunk, but chunk_size=3"):
        fast_weight_linear(z, v, weight, initial_state=state, eta=1.0, chunk_size=3)
    with pytest.raises(ValueError, match=r"clip=0\.0"):
        fast_weight_linear(z, v, weight, clip=0.0, **options)
    with pytest.raises(ValueError, match="plan is for 12 tokens on rank 0 of 1 and chunk_size=4; this call has 6"):
        fast_weight_linear(z[:6], v[:6], weight, plan=make_plan(12, 4), **options)


def errors_over_ranks(seeds):
    """Return the largest error of outputs, states and gradients over ranks, of sequences that begin with a state."""
    size, rank, errors = dist.get_world_size(), dist.get_rank(), []
    for seed in seeds:
        rng = random.Random(seed)
        chunk_size = rng.randint(1, 5)
        s, b = 2 * size * chunk_size * rng.randint(1, 3), rng.randint(1, 2)
        d, f = rng.randint(2, 5), rng.randint(2, 5)  # where both are 1, all gradients through clipping are zero
        z, v, weight, g = operands(seed, s, b, d, f)
        generator = torch.Generator().manual_seed(seed)
        updates, g_state = torch.randn(2, b, d, f, generator=generator, dtype=torch.float64)
        cuts = sorted(rng.sample(range(0, s, chunk_size), k=rng.randint(0, 3)))
        options = dict(
            eta=0.5, chunk_size=chunk_size, clip=rng.choice([None, 0.2]),
            cu_seqlens=None if rng.random() < 0.4 else torch.tensor([0, *cuts, s]), output_final_state=True,
        )  # fmt: skip

        def run(function, z, v, g, has_state, rest, weight=weight, updates=updates, g_state=g_state, options=options):
            inputs = [t.clone().requires_grad_() for t in (z, v, weight, updates)]
            empty = FastWeightState(inputs[3], z[:0], v[:0])
            out, state = function(*inputs[:3], initial_state=empty, **options, **rest)
            assert (state is not None) == has_state
            loss = (out * g).sum() + ((state.updates * g_state).sum() if has_state else 0)
            grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            return out, state.updates if has_state else None, *grads

        expected = run(naive.fast_weight_linear, z, v, g, True, {})
        cache = {} if rng.random() < 0.5 else dict(keep_chunk_weights=True)
        local = [zigzag(t, size, rank) for t in (z, v, g)]
        out, final, dz, dv, dweight, dupdates = run(
            fast_weight_linear, *local, rank == 0, dict(cp_group=dist.group.WORLD, **cache)
        )
        dist.all_reduce(dweight)
        pairs = [(out, zigzag(expected[0], size, rank)), (dweight, expected[4])]
        pairs += [(a, zigzag(b, size, rank)) for a, b in ((dz, expected[2]), (dv, expected[3]))]
        if rank == 0:
            pairs += [(final, expected[1]), (dupdates, expected[5])]
        errors += [relative_error(a, b) for a, b in pairs]
    return largest(errors)


@pytest.mark.parametrize("cp_size", [2, 3])
def test_states_enter_and_leave_on_the_first_rank(cp_size):
    assert largest(run_ranks(cp_size, errors_over_ranks, range(25))) < 1e-12


def refused_over_ranks():
    z, v, weight, _ = operands(0, 8, 1, 4, 4)
    options = dict(eta=1.0, chunk_size=4, cp_group=dist.group.WORLD)
    state = FastWeightState(torch.zeros(1, 4, 4, dtype=torch.float64), z[:1], v[:1])
    with pytest.raises(LayoutError, match="continues at a chunk boundary"):
        fast_weight_linear(z, v, weight, initial_state=state, **options)
    bounds = torch.tensor([0, 8, 12, 14, 16])
    with pytest.raises(LayoutError, match="ends inside a chunk"):
        fast_weight_linear(z, v, weight, cu_seqlens=bounds, output_final_state=True, **options)


def test_unfinished_chunks_are_refused_over_ranks():
    run_ranks(2, refused_over_ranks)


def clipped_over_columns(seeds):
    """Return the largest error where f is split over ranks, as under tensor parallelism."""
    size, rank, errors = dist.get_world_size(), dist.get_rank(), []
    for seed in seeds:
        rng = random.Random(seed)
        s, b, d, f = rng.randint(1, 40), rng.randint(1, 2), rng.randint(1, 20), 2 * size
        z, v, weight, g = operands(seed, s, b, d, f)
        options = dict(eta=0.5, chunk_size=rng.randint(1, 9), clip=rng.choice([0.02, 0.2]))
        inputs = [t.clone().requires_grad_() for t in (z, v, weight)]
        expected = naive.fast_weight_linear(*inputs, **options)
        expected = expected, *torch.autograd.grad(expected, inputs, g, materialize_grads=True)
        columns = slice(rank * 2, (rank + 1) * 2)
        inputs = [t.clone().requires_grad_() for t in (z[..., columns], v, weight[:, columns])]
        out = fast_weight_linear(*inputs, tp_group=dist.group.WORLD, **options)
        dz, dv, dweight = torch.autograd.grad(out, inputs, g)
        out = out.detach().clone()
        for partial_sum in (out, dv):
            dist.all_reduce(partial_sum)
        pairs = [
            (out, expected[0]),
            (dz, expected[1][..., columns]),
            (dv, expected[2]),
            (dweight, expected[3][:, columns]),
        ]
        errors += [relative_error(a, b) for a, b in pairs]
    return largest(errors)


def test_clipping_sums_norms_over_columns():
    assert largest(run_ranks(2, clipped_over_columns, range(25))) < 1e-12


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", ["hidden_states", "input_embed"])
def test_a_layer_read_in_parts_equals_the_whole(seed, target):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    s, b, d, f, chunk_size = rng.randint(2, 60), rng.randint(1, 2), 4, 5, rng.randint(1, 9)
    x, up, weight = normal(s, b, d), normal(f, d), normal(d, f)
    conv, projection = normal(d, 1, 5), normal(d, d) if rng.random() < 0.7 else None
    embeddings = normal(s, b, d) if target == "input_embed" else None
    inputs = [t for t in (x, up, weight, conv, projection, embeddings) if t is not None]
    options = dict(
        eta=0.3, chunk_size=chunk_size, conv_weight=conv, projection=projection, clip=rng.choice([None, 0.3])
    )

    def down_input(x):
        return torch.tanh(x @ up.T)

    v = naive.target(x if embeddings is None else embeddings, conv, projection, chunk_size=chunk_size)
    expected, final = naive.fast_weight_linear(
        down_input(x), v, weight, eta=0.3, chunk_size=chunk_size, clip=options["clip"], output_final_state=True
    )
    state, outputs, start = LayerState.empty(weight, b, embeddings is not None), [], 0
    while start < s:
        stop = min(s, start + rng.choice([1, 1, 2, rng.randint(1, s)]))
        part = None if embeddings is None else embeddings[start:stop]
        out, state = continue_layer(x[start:stop], weight, state, down_input=down_input, embeddings=part, **options)
        outputs.append(out)
        start = stop
    assert relative_error(torch.cat(outputs), expected) < 1e-12
    assert relative_error(state.updates, final.updates) < 1e-12
    assert torch.equal(state.inputs, x[s - final.unfinished :])
    g = torch.randn(s, b, d, generator=generator, dtype=torch.float64)
    options = dict(allow_unused=True, materialize_grads=True)
    for value, reference in zip(
        torch.autograd.grad(torch.cat(outputs), inputs, g, **options),
        torch.autograd.grad(expected, inputs, g, **options),
        strict=True,
    ):
        assert relative_error(value, reference) < 1e-11


@pytest.mark.parametrize("tokens", [2, 12], ids=["update itself", "Gram matrices"])
def test_gradients_are_finite_where_clipping_leaves_nothing(tokens):
    """Check a weight that is zero, and an update whose norm overflows in a chunk that nothing reads."""
    z, v, weight, g = operands(0, 3 * tokens, 2, 30, 30) if tokens > 2 else operands(0, 6, 2, 1, 1)
    options = dict(eta=0.5, chunk_size=tokens, clip=0.1)
    found = with_gradients(fast_weight_linear, z, v, weight * 0, g, **options)
    expected = with_gradients(naive.fast_weight_linear, z, v, weight * 0, g, **options)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    huge = 1e160 if tokens == 2 else 1e100  # products of two targets must be finite in Gram matrices
    v[2 * tokens :] *= huge
    for value in with_gradients(fast_weight_linear, z, v, weight, g, **options):
        assert value.isfinite().all()
    z, v, weight, g = (tensor.float() for tensor in (z, v / huge, weight * 1e-25, g))
    assert all(value.isfinite().all() for value in with_gradients(fast_weight_linear, z, v, weight, g, **options))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(eta=float("nan")), "eta=nan is not a finite number"),
        (dict(eta=None), "eta=None"),
        (dict(clip=float("inf")), "clip=inf"),
        (dict(clip=True), "clip=True"),
        (dict(clip="x"), "clip='x'"),
        (dict(chunk_size=2.5), r"chunk_size=2\.5 is not a whole number"),
        (dict(cu_seqlens=[0, 12]), "cu_seqlens is a list"),
        (dict(cu_seqlens=torch.tensor([0.0, 12.0])), "cu_seqlens is a Tensor"),
        (dict(cu_seqlens=torch.tensor([0])), "cu_seqlens spans 0 to 0"),
        (dict(initial_state=(1, 2, 3)), "initial_state is a tuple"),
        (dict(prefix=None), "prefix=None"),
        (dict(plan=make_plan(12, 3, (0, 5, 12))), "plan is for documents that end at"),
        (dict(plan=make_plan(12, 3), cu_seqlens=torch.tensor([0, 5, 12])), "of cu_seqlens end at"),
    ],
)
def test_arguments_that_cannot_be(change, said):
    z, v, weight, _ = operands(0, 12, 1, 4, 5)
    with pytest.raises((ValueError, LayoutError), match=said):
        fast_weight_linear(z, v, weight, **(dict(eta=0.5, chunk_size=3) | change))


def test_a_cache_of_carries_and_a_state_exclude_each_other():
    z, v, weight, _ = operands(0, 12, 1, 4, 5)
    _, state = fast_weight_linear(z[:5], v[:5], weight, eta=0.5, chunk_size=3, output_final_state=True)
    with pytest.raises(ValueError, match="carry_cache cannot be combined"):
        fast_weight_linear(z, v, weight, eta=0.5, chunk_size=3, initial_state=state, carry_cache=CarryCache())
