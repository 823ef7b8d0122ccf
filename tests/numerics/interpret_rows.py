"""The row kernels against torch in Triton's interpreter; prints the largest error. Run by test_kernels.py."""

import torch
from cases import largest, relative_error

from inplace_ttt.ttt import clipping
from inplace_ttt.ttt.backends import triton_rows


def main():
    torch.manual_seed(0)
    errors = []
    for rows, width in [(5, 3), (7, 1024), (4, 2300)]:
        x, y, factors = torch.randn(rows, width), torch.randn(rows, width), torch.rand(rows)
        if width == 3:
            factors = factors[:1].expand(rows)  # without memory of its own
        scaled, scaled_twice, expected = x.clone(), x.clone(), x.clone()
        triton_rows.scale_rows(scaled, factors)
        dots = triton_rows.dot_and_scale_rows(scaled_twice, y, factors)
        expected_dots = clipping.dot_and_scale_rows(expected, y, factors)
        for value, reference in [(scaled, expected), (scaled_twice, expected), (dots, expected_dots)]:
            errors.append(relative_error(value, reference))
    print(largest(errors))


if __name__ == "__main__":
    main()
