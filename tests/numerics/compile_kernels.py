"""Compile the kernels for Hopper on a machine without a GPU; prints one line a kernel. Run by test_kernels.py."""

import torch
import triton.compiler.compiler as compiler
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class HopperByName:
    """A driver that knows its target and can launch nothing."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class CompiledError(Exception):
    """Raised where a launch would begin, with what was compiled."""


def stop(kernel):
    raise CompiledError(f"{kernel.metadata.name} {kernel.metadata.shared} {'cubin' in kernel.asm}")


def main():
    driver.set_active(HopperByName())
    compiler.CompiledKernel._init_handles = stop
    from inplace_ttt.ttt.kernels import chunk_conv, chunk_weights

    a, z, base = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((256, 192), (256, 320), (192, 320)))
    state, ids = torch.empty(192, 320), torch.empty(256, dtype=torch.int32)
    common = dict(chunk_size=64, chunks=4, accumulated=4, scale=0.5)
    u, weight = torch.empty(256, 1, 192, dtype=torch.bfloat16), torch.empty(192, 1, 5, dtype=torch.bfloat16)
    for launch in (
        lambda: chunk_weights.chunk_weights(a, z, base=base, after=state, **common),
        lambda: chunk_weights.chunk_weights(a, z, before=state, after=state, reverse=True, **common),
        lambda: chunk_conv.conv(u, weight, ids),
        lambda: chunk_conv.conv_backward(u, u, weight, ids),
    ):
        try:
            launch()
        except CompiledError as compiled:
            print(compiled)


if __name__ == "__main__":
    main()
