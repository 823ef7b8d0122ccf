"""The chunk-parallel operation against its definition, in outputs and in every gradient, fp64."""

import random

import pytest
import torch

from inplace_ttt.ttt import LayoutError, fast_weight_linear, naive, products
from inplace_ttt.ttt.backends.torch import TorchBackend
from inplace_ttt.ttt.window import Window
from numerics.cases import operands, random_documents, relative_error, update_norms, with_gradients


@pytest.mark.parametrize("seed", range(60))
def test_matches_definition(seed):
    rng = random.Random(seed)
    s, b, d, f = rng.randint(1, 50), rng.randint(1, 3), rng.randint(1, 10), rng.randint(1, 10)
    options = dict(eta=rng.uniform(-2, 2), chunk_size=rng.randint(1, 16), cu_seqlens=random_documents(rng, s))
    tensors = operands(seed, s, b, d, f)
    expected = with_gradients(naive.fast_weight_linear, *tensors, **options)
    for value, reference in zip(with_gradients(fast_weight_linear, *tensors, **options), expected, strict=True):
        assert relative_error(value, reference) < 1e-12


@pytest.mark.parametrize("seed", range(30))
def test_apply_is_a_product_for_each_chunk(seed):
    """Chunks of any lengths and distances; between them nothing is written."""
    rng = random.Random(seed)
    chunks, end = [], rng.randint(0, 3)
    for _ in range(rng.randint(1, 4)):
        length, gap = rng.randint(1, 4), rng.randint(0, 4)
        for _ in range(rng.randint(1, 5)):
            chunks.append((end, end + length))
            end += length + gap
    x, out, weights, _ = operands(seed, end + 3, 2, 3, 3)
    weights = torch.randn(len(chunks), 3, 3, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    transpose, alpha, add = rng.random() < 0.5, rng.uniform(-2, 2), rng.random() < 0.5
    expected = out.clone()
    for (start, stop), weight in zip(chunks, weights, strict=True):
        product = alpha * x[start:stop, 1] @ (weight.T if transpose else weight)
        expected[start:stop, 1] = product + (out[start:stop, 1] if add else 0)
    if not add:  # what is there is not read
        for start, stop in chunks:
            out[start:stop, 1] = torch.nan
    Window(tuple(chunks), weights).apply(x[:, 1], out[:, 1], transpose=transpose, alpha=alpha, add=add)
    torch.testing.assert_close(out, expected)


def test_gradcheck():
    z, v, weight, _ = (t.requires_grad_() for t in operands(0, 9, 2, 3, 4))
    cu_seqlens = torch.tensor([0, 5, 9])
    assert torch.autograd.gradcheck(
        lambda *inputs: fast_weight_linear(*inputs, eta=0.7, chunk_size=2, cu_seqlens=cu_seqlens), (z, v, weight)
    )


def test_chunk_never_sees_its_own_update():
    z, v, weight, _ = operands(1, 16, 1, 4, 4)
    out = fast_weight_linear(z, v, weight, eta=1.0, chunk_size=8)
    torch.testing.assert_close(out[:8], z[:8] @ weight.T)
    changed = v.clone()
    changed[3] += 1
    difference = (fast_weight_linear(z, changed, weight, eta=1.0, chunk_size=8) - out).abs().amax(dim=(1, 2))
    assert (difference[:8] == 0).all() and (difference[8:] > 0).all()


def test_documents_are_reset():
    z, v, weight, _ = operands(2, 24, 1, 4, 4)
    whole = fast_weight_linear(z, v, weight, eta=1.0, chunk_size=4, cu_seqlens=torch.tensor([0, 10, 24]))
    alone = fast_weight_linear(z[10:], v[10:], weight, eta=1.0, chunk_size=4)
    torch.testing.assert_close(whole[10:], alone, rtol=0, atol=0)


def test_empty_documents_change_nothing():
    z, v, weight, _ = operands(3, 12, 1, 4, 4)
    options = dict(eta=1.0, chunk_size=4)
    torch.testing.assert_close(
        fast_weight_linear(z, v, weight, cu_seqlens=torch.tensor([0, 0, 6, 6, 12, 12]), **options),
        fast_weight_linear(z, v, weight, cu_seqlens=torch.tensor([0, 6, 12]), **options),
    )


def test_zero_target_is_the_plain_linear_map():
    z, v, weight, _ = operands(4, 20, 2, 6, 8, torch.float32)
    out = fast_weight_linear(z, torch.zeros_like(v), weight, eta=1.0, chunk_size=7)
    torch.testing.assert_close(out, z @ weight.T)


@pytest.mark.parametrize("pairs", [1, 5, 8192])
@pytest.mark.parametrize("chunk_size", [2, 3, 5])
def test_update_norms_are_those_of_the_summed_updates(monkeypatch, chunk_size, pairs):
    monkeypatch.setattr(products, "GRAM_TOKENS", pairs)
    z, v, weight, _ = operands(5, 20, 2, 6, 8)
    bounds = torch.tensor([0, 7, 9, 11, 13, 18, 20])  # of one chunk, some equally long, and of several
    _, norms = fast_weight_linear(
        z, v, weight, eta=0.5, chunk_size=chunk_size, cu_seqlens=bounds, return_update_norms=True
    )
    torch.testing.assert_close(norms.sort().values, update_norms(z, v, bounds, 0.5))


def test_documents_of_one_chunk_cost_no_scan(monkeypatch):
    """They are read by the slow weight, all neighbours in one product."""
    monkeypatch.setattr(TorchBackend, "scan", None)
    inputs = operands(7, 20, 2, 6, 8)
    options = dict(eta=0.5, chunk_size=8, cu_seqlens=torch.tensor([0, 7, 15, 16, 20]))
    values = with_gradients(fast_weight_linear, *inputs, **options)
    for value, reference in zip(values, with_gradients(naive.fast_weight_linear, *inputs, **options), strict=True):
        torch.testing.assert_close(value, reference)


def test_bf16_sums_in_fp32():
    tensors = operands(6, 4096, 1, 16, 16)
    low = [t.to(torch.bfloat16) for t in tensors]
    reference = fast_weight_linear(*[t.double() for t in low[:3]], eta=0.01, chunk_size=1)
    out = fast_weight_linear(*low[:3], eta=0.01, chunk_size=1)
    assert out.dtype == torch.bfloat16
    # 4096 updates, each far below a bf16 state's resolution: rounding of the operands is all that may be lost
    assert relative_error(out.double(), reference) < 0.01


@pytest.mark.parametrize(
    ("documents", "message"),
    [([0, 8], "end at the length"), ([1, 12], "start at 0"), ([0, 9, 4, 12], "decreases from 9 to 4"), ([], "nothing")],
)
def test_impossible_documents_are_refused(documents, message):
    z, v, weight, _ = operands(7, 12, 1, 4, 4)
    with pytest.raises(LayoutError, match=message):
        fast_weight_linear(z, v, weight, eta=1.0, chunk_size=4, cu_seqlens=torch.tensor(documents, dtype=torch.int32))


def test_operands_that_do_not_fit_are_refused():
    z, v, weight, _ = operands(8, 12, 1, 4, 6)
    with pytest.raises(ValueError, match="do not fit"):
        fast_weight_linear(z, v, weight.T, eta=1.0, chunk_size=4)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        fast_weight_linear(z.float(), v, weight, eta=1.0, chunk_size=4)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        fast_weight_linear(z.int(), v.int(), weight.int(), eta=1.0, chunk_size=4)
    with pytest.raises(LayoutError, match="chunk_size=0"):
        fast_weight_linear(z, v, weight, eta=1.0, chunk_size=0)
