"""The convolution kernels against torch in Triton's interpreter; prints the largest error. Run by test_kernels.py."""

import torch
from cases import largest, relative_error

from inplace_ttt.ttt import target
from inplace_ttt.ttt.backends import triton_conv


def main():
    torch.manual_seed(0)
    errors = []
    for s, b, d, taps in [(300, 2, 70, 5), (33, 1, 64, 3), (3, 1, 8, 5)]:
        u, g, weight = torch.randn(s, b, d), torch.randn(s, b, d), torch.randn(d, 1, taps)
        ids = torch.randint(0, 6, (s,)).sort()[0].int()
        values = triton_conv.conv(u, weight, ids), *triton_conv.conv_backward(g, u, weight, ids)
        expected = target.conv(u, weight, ids), *target.conv_backward(g, u, weight, ids)
        for value, reference in zip(values, expected, strict=True):
            errors.append(relative_error(value, reference))
    print(largest(errors))


if __name__ == "__main__":
    main()
