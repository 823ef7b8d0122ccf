"""Compare the kernels of norms, the gated product and heads with their definitions in fp64, in Triton's interpreter.

Prints the largest error. Run by test_kernels.py.
"""

import itertools

import torch
from cases import largest, relative_error

from inplace_ttt.megatron import heads as definition
from inplace_ttt.megatron.kernels import heads, norm, swiglu
from inplace_ttt.megatron.norm import rms_norm
from inplace_ttt.megatron.swiglu import swiglu as gated

EPS = 1e-2  # large enough to be seen


def expected(function, *inputs):
    """Return the outputs of a function in fp64, random gradients of them, and what they give for each input."""
    inputs = [one.double().requires_grad_() for one in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [torch.randn(one.shape) for one in outputs]
    return outputs, given, torch.autograd.grad(outputs, inputs, [one.double() for one in given])


def norms():
    for rows, width in [(5, 2560), (70, 128), (1, 7), (3, 4096), (2, 5000), (0, 64)]:
        x, weight = torch.randn(rows, width) * 3, torch.rand(width) + 0.5
        (y,), (dy,), gradients = expected(lambda x, w: rms_norm(x, w, EPS), x, weight)
        found, scales = norm.rms_norm(x, weight, EPS)
        yield found, y
        yield from zip(norm.rms_norm_backward(x, weight, scales, dy), gradients, strict=True)


def products():
    for rows, width in [(3, 5), (2, 1024), (4, 1500)]:
        x = torch.randn(rows, 2 * width) * 3
        (y,), (dy,), (dx,) = expected(gated, x)
        yield swiglu.swiglu(x), y
        yield swiglu.swiglu_backward(x, dy), dx


def all_heads():
    shapes = [(5, 1, 2, 2, 8), (3, 2, 4, 1, 128), (2, 1, 1, 3, 96), (1, 3, 3, 1, 16)]
    for (s, b, each, groups, channels), normed, rotated in itertools.product(shapes, [True, False], [True, False]):
        qkv = torch.randn(s, b, (each + 2) * groups * channels) * 2
        angles = torch.outer(1e4 + torch.arange(s), torch.rand(channels // 2))
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)[:, None, None, :] if rotated else None
        weights = torch.rand(2, channels) + 0.5 if normed else None
        sizes = dict(groups=groups, channels=channels, eps=EPS)

        def make(qkv, weights=(None, None), table=table, sizes=sizes):
            return definition.make_heads(qkv, table, *weights, **sizes)

        outputs, given, gradients = expected(make, *((qkv,) if weights is None else (qkv, weights)))
        yield from zip(heads.make_heads(qkv, table, weights, groups, channels, EPS), outputs, strict=True)
        found = heads.make_heads_backward(qkv if normed else None, table, weights, tuple(given), EPS)
        yield from zip(found[: len(gradients)], gradients, strict=True)


def main():
    torch.manual_seed(0)
    errors = []
    for found, right in itertools.chain(norms(), products(), all_heads()):
        assert found.shape == right.shape
        errors.append(relative_error(found, right) if right.numel() else 0.0)
    assert len(errors) > 80
    print(largest(errors))


if __name__ == "__main__":
    main()
