"""The kernels against the definition in fp64, in outputs and gradients, with NaN wherever nothing may be read."""

import random

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from inplace_ttt.ttt import backends, fast_weight_linear, naive, target
from inplace_ttt.ttt.backends import triton_conv
from inplace_ttt.ttt.backends.hopper import scan
from inplace_ttt.ttt.backends.hopper.scan import HopperBackend
from inplace_ttt.ttt.rule import PAPER_RULE
from numerics.cases import operands, relative_error, update_norms


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever is allocated and not yet written is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def tile(request, monkeypatch):
    """Scan these states, which are small, in large tiles, too: all but those of even seeds."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("seed", 1) % 2:
        monkeypatch.setattr(scan, "tile_of", lambda rows, f: scan.LARGE)


def amid_nan(tensor):
    """The tensor as a view into a longer one with NaN before and after it."""
    padded = torch.full((tensor.shape[0] + 256, *tensor.shape[1:]), torch.nan, dtype=tensor.dtype, device="cuda")
    padded[128:-128] = tensor
    return padded[128:-128]


def random_case(seed):
    rng = random.Random(seed)
    chunk_size = rng.choice([64, 64, 128, 192, 256, 512])
    s, b = rng.randint(1, 2500), rng.randint(1, 2)
    d, f = 64 * rng.randint(1, 5), 64 * rng.randint(1, 9)
    cu_seqlens = None
    if rng.random() < 0.7:
        unit = rng.choice([1, 64, chunk_size])
        places = range(unit, s, unit)
        cuts = sorted(rng.sample(places, min(len(places), rng.randint(0, 4))))
        cu_seqlens = torch.tensor([0, *cuts, s], dtype=torch.int32)
    tensors = [t.to(torch.bfloat16) for t in operands(seed, s, b, d, f)]
    return tensors, dict(eta=rng.choice([0.003, -0.01, 0.25 / s]), chunk_size=chunk_size, cu_seqlens=cu_seqlens)


def gradients(operation, tensors, options):
    inputs = [t.detach().requires_grad_() for t in tensors[:3]]
    out = operation(*inputs, **options)
    return out, *torch.autograd.grad(out, inputs, tensors[3], materialize_grads=True)


@pytest.mark.parametrize("seed", range(100))
def test_kernels_equal_the_definition(seed, monkeypatch):
    rng = random.Random(seed)
    tensors, options = random_case(seed)
    exact = gradients(naive.fast_weight_linear, [t.double().cuda() for t in tensors], options)
    monkeypatch.setattr(HopperBackend, "window_bytes", rng.choice([0, 300_000, 2**30]))  # kernel windows of all sizes
    cuda = [amid_nan(t) if at != 2 else t.cuda() for at, t in enumerate(tensors)]
    values = gradients(fast_weight_linear, cuda, options | dict(keep_chunk_weights=rng.choice([True, False, None])))
    plain = gradients(fast_weight_linear, cuda, options | dict(backend="torch"))
    for value, of_plain, reference in zip(values, plain, exact, strict=True):
        error = relative_error(value.double(), reference)
        assert error < 1e-2
        assert error <= 1.1 * relative_error(of_plain.double(), reference) + 1e-6


@pytest.mark.parametrize("length", [64, 100, 128, 192])
def test_equal_documents(length):
    """Whose chunks go through one product where they are evenly spaced."""
    tensors = [t.to(torch.bfloat16).cuda() for t in operands(length, 10 * length, 2, 128, 320)]
    options = dict(eta=0.01, chunk_size=64, cu_seqlens=torch.arange(0, 10 * length + 1, length))
    exact = gradients(naive.fast_weight_linear, [t.double() for t in tensors], options)
    tensors = [amid_nan(t) if at != 2 else t for at, t in enumerate(tensors)]
    for value, reference in zip(gradients(fast_weight_linear, tensors, options), exact, strict=True):
        assert relative_error(value.double(), reference) < 5e-3


@pytest.mark.parametrize("seed", range(20))
def test_update_norms(seed, monkeypatch):
    (z, v, weight, _), options = random_case(seed)
    monkeypatch.setattr(HopperBackend, "window_bytes", random.Random(seed).choice([0, 300_000, 2**30]))
    _, norms = fast_weight_linear(amid_nan(z), amid_nan(v), weight.cuda(), **options, return_update_norms=True)
    expected = update_norms(z.double(), v.double(), options["cu_seqlens"], options["eta"])
    assert relative_error(norms.sort().values.double().cpu(), expected) < 1e-3


def test_update_norms_of_equal_documents():
    """Of one chunk, all in one product of pairs."""
    z, v, weight, _ = (t.to(torch.bfloat16) for t in operands(0, 640, 2, 128, 320))
    bounds = torch.arange(0, 641, 64, dtype=torch.int32)
    options = dict(eta=0.01, chunk_size=64, cu_seqlens=bounds)
    _, norms = fast_weight_linear(z.cuda(), v.cuda(), weight.cuda(), **options, return_update_norms=True)
    expected = update_norms(z.double(), v.double(), bounds, 0.01)
    assert relative_error(norms.sort().values.double().cpu(), expected) < 1e-4


def test_kernels_are_what_runs():
    z = torch.zeros(256, 1, 64, dtype=torch.bfloat16, device="cuda")
    assert isinstance(backends.choose_backend("auto", z, 64, 64, 0.1, PAPER_RULE), HopperBackend)


def test_hooks_on_compilation(monkeypatch):
    """A program may set a hook on Triton's compilation, as vLLM does: it gets all arguments as JSON."""
    from triton import knobs

    from inplace_ttt.ttt.backends.hopper import scan

    z, v, weight, _ = (t.to(torch.bfloat16).cuda() for t in operands(0, 300, 1, 64, 128))
    options = dict(eta=0.01, chunk_size=64)
    expected = fast_weight_linear(z, v, weight, **options)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *args, **kwargs: compiled.append(kwargs["repr"]))
    scan._chunk_weights_kernel.device_caches.clear()
    torch.testing.assert_close(fast_weight_linear(z, v, weight, **options), expected, rtol=0, atol=0)
    assert any("chunk_weights" in one for one in compiled)


def test_operands_that_lie_oddly_in_memory():
    """Rows that start at odd places, columns that are not neighbours."""
    z, v, weight, g = (t.to(torch.bfloat16).cuda() for t in operands(0, 300, 2, 64, 128))
    options = dict(eta=0.01, chunk_size=64)
    expected = gradients(fast_weight_linear, (z, v, weight, g), options)
    odd_z = torch.zeros(z.numel() + 3, dtype=z.dtype, device="cuda")[3:].view(z.shape).copy_(z)
    odd_v = torch.zeros(300, 2, 67, dtype=v.dtype, device="cuda")[..., 3:].copy_(v)
    odd_weight = weight.t().contiguous().t()
    odd_g = g[:, :1].expand(-1, 2, -1)
    for value, reference in zip(
        gradients(fast_weight_linear, (odd_z, odd_v, odd_weight, g), options), expected, strict=True
    ):
        torch.testing.assert_close(value, reference, rtol=0, atol=0)
    gradients(fast_weight_linear, (z, v, weight, odd_g), options)


@pytest.mark.parametrize("options", [dict(chunk_size=96), dict(eta=0.0)])
def test_what_the_kernels_cannot_do_falls_back_and_says_so_once(options):
    tensors = [t.to(torch.bfloat16).cuda() for t in operands(0, 256, 1, 64, 64)]
    options = dict(eta=0.01, chunk_size=64) | options
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="plain torch products"):
        out = fast_weight_linear(*tensors[:3], **options)
    exact = naive.fast_weight_linear(*[t.double() for t in tensors[:3]], **options)
    assert relative_error(out.double(), exact) < 1e-2


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_kernel(seed, dtype):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    s, b, d, taps = rng.randint(1, 700), rng.randint(1, 3), rng.randint(1, 300), rng.choice([1, 3, 5])
    u, g = (amid_nan(torch.randn(s, b, d).to(dtype)) for _ in range(2))
    weight, ids = torch.randn(d, 1, taps).to(dtype).cuda(), torch.randint(0, 9, (s,)).sort()[0].int().cuda()
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    exact = target.conv(u.double(), weight.double(), ids)
    assert relative_error(triton_conv.conv(u, weight, ids).double(), exact) < bound
    exact = target.conv_backward(g.double(), u.double(), weight.double(), ids)
    for value, reference in zip(triton_conv.conv_backward(g, u, weight, ids), exact, strict=True):
        assert relative_error(value.double(), reference) < bound
