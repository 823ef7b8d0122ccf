"""Compile the kernels for Hopper on a machine without a GPU; prints one line a kernel. Run by test_kernels.py.

EVERY=N compiles every Nth only. A hook on compilation is set, as vLLM does: Triton gives it all arguments as JSON.
"""

import itertools
import os
import subprocess
import tempfile
from functools import partial

import torch
import triton
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


HOOKED: list[str] = []  # kernels that the hook was told of


def stop(kernel):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"])
        ptx.flush()
        ptxas = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", ptx.name, "-o", "/dev/null"]
        said = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    # ptxas may give up on products that overlap, and on holding the state in registers: both slow, and silent
    overlaps, fits = "are serialized" not in said, ", 0 bytes spill stores" in said
    name, products = kernel.metadata.name, "wgmma" in kernel.asm["ptx"]
    known = any(one.startswith(name) for one in HOOKED) and products == (name == "_chunk_weights_kernel")
    raise CompiledError(f"{name} {'cubin' in kernel.asm} {overlaps} {fits} {known}")


def main():
    driver.set_active(HopperByName())
    compiler.CompiledKernel._init_handles = stop
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: HOOKED.append(kwargs["repr"])
    from inplace_ttt.megatron.kernels import heads, loss, norm, swiglu
    from inplace_ttt.ttt.backends import triton_conv
    from inplace_ttt.ttt.backends.hopper import scan
    from inplace_ttt.ttt.backends.hopper.schedule import make_schedule
    from inplace_ttt.ttt.plan import Segment

    a, z, base = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((2048, 192), (2048, 320), (192, 320)))
    state, ids = torch.empty(192, 320), torch.empty(256, dtype=torch.int32)
    norms = torch.empty(2, scan.programs(192, 320))
    u, weight = torch.empty(256, 1, 192, dtype=torch.bfloat16), torch.empty(192, 1, 5, dtype=torch.bfloat16)

    logits, row = torch.empty(2, 9216), torch.empty(2)
    qkv = torch.empty(64, 1, 8 * 128, dtype=torch.bfloat16)
    parts = tuple(torch.empty(64, 1, number, 128, dtype=torch.bfloat16) for number in (4, 2, 2))
    table, weights = torch.empty(64, 1, 1, 128), torch.empty(2, 128)
    heads_with = (table, weights), (table, None), (None, weights)

    def documents(chunk_size):
        """Two of two chunks, of which the second is cut short: in the order of the forward, and of the backward."""
        bounds = [(0, chunk_size), (chunk_size, chunk_size + 36)]
        forward = Segment(tuple(bounds)), Segment(tuple((start + 600, stop + 600) for start, stop in bounds))
        return forward, tuple(segment.reversed() for segment in reversed(forward))

    def launch_scan(segments, **operands):
        wanted = dict(carry_out_wanted=False, totals_wanted=True)
        given = dict(has_base="base" in operands, has_carry="before" in operands)
        schedule = make_schedule(segments, scan.BLOCK_T, **given, **wanted, stream=None)
        out = torch.empty(4, 192, 320, dtype=torch.bfloat16)
        return lambda: scan.chunk_weights(a, z, schedule, range(4), out, scale=0.5, **operands)

    def with_some(**operands):
        """All ways to leave some of them out."""
        for chosen in itertools.product([True, False], repeat=len(operands)):
            yield dict(itertools.compress(operands.items(), chosen))

    def scans(chunk_size):
        """Chunks of 64 tokens: a large tile of chunk weights leaves shared memory whole; of 512: in pieces."""
        forward, backward = documents(chunk_size)
        for some in with_some(before=state, after=state, norms=norms):
            yield launch_scan(forward, base=base, **some)
        for segments in (forward, backward):  # a single chunk counts as forward
            for some in with_some(before=state, after=state):
                yield launch_scan(segments, total=state, **some)

    def in_tiles(tile, launch):
        def run():
            scan.tile_of = lambda rows, f: tile
            launch()

        return run

    launches = [
        *(in_tiles(scan.LARGE, launch) for launch in (*scans(64), *scans(512))),
        *(in_tiles(scan.SMALL, launch) for launch in itertools.islice(scans(512), 0, None, 3)),
        lambda: triton_conv.conv(u, weight, ids),
        lambda: triton_conv.conv_backward(u, u, weight, ids),
        lambda: loss.best_and_sums(logits, 9000),
        lambda: loss.logit_gradients(logits, row, ids[:2], row > 0, 9000, torch.bfloat16),
        lambda: norm.rms_norm(z, base[0], 1e-6),
        lambda: norm.rms_norm_backward(z, base[0], row, z),
        lambda: swiglu.swiglu(z),
        lambda: swiglu.swiglu_backward(z, z[:, :160]),
        *(partial(heads.make_heads, qkv, *some, 2, 128, 1e-6) for some in heads_with),
        *(partial(heads.make_heads_backward, qkv, *some, parts, 1e-6) for some in heads_with),
    ]
    for launch in launches[:: int(os.environ.get("EVERY", 1))]:
        try:
            launch()
        except CompiledError as compiled:
            print(compiled)


if __name__ == "__main__":
    main()
