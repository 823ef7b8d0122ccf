"""The plugin's product with each request's own update, in Triton's interpreter against torch; prints the largest error.

Run by test_kernels.py.
"""

import sys
from pathlib import Path

import torch
from cases import largest, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src/serving"))
from inplace_ttt_vllm import products


def main():
    torch.manual_seed(0)
    errors = []
    for b, d, f, dtype in [(2, 64, 512, torch.float32), (5, 70, 700, torch.float32), (3, 33, 40, torch.bfloat16)]:
        updates, z = torch.randn(7, d, f, dtype=dtype), torch.randn(b, f, dtype=dtype)
        slots, out = torch.randint(0, 6, (b,)), torch.randn(b, d)
        slots[b // 2 :: 3] = 6  # the last slot is of requests without updates
        read = updates.clone()
        updates[6], read[6] = 0, torch.nan  # and is not read
        expected = out + torch.einsum("bdf,bf->bd", updates[slots].float(), z.float())
        products._launch(out, read, slots, z)
        errors.append(relative_error(out, expected))
    print(largest(errors))


if __name__ == "__main__":
    main()
