"""The kernels compile for Hopper on a machine without a GPU, also with a hook that gets their arguments as JSON."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs the CUDA build of torch, with Triton")

COMPILE = """
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


triton.runtime.driver.set_active(Driver())
names = []
triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: names.append(kwargs["repr"].partition("[")[0])
from inplace_ttt.ttt.backends.hopper import scan

kernel, compiled = scan._chunk_weights_kernel, []


class Launch:
    def __getitem__(self, grid):
        return lambda *args, **keys: compiled.append(kernel.warmup(*args, grid=grid, **keys))


scan._chunk_weights_kernel = Launch()
a, z = torch.zeros(1024, 2560, dtype=torch.bfloat16), torch.zeros(1024, 9728, dtype=torch.bfloat16)
out, base, state = z.new_zeros(2, 2560, 9728), z.new_zeros(2560, 9728), torch.zeros(2560, 9728)
table, numbers = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
for reverse, keys in ((False, dict(base=base, before=state, after=state)), (True, dict(total=state))):
    schedule = SimpleNamespace(
        reverse=reverse, steps_per_chunk=32, table=table, tokens=numbers, readers=[0, 1, 2], steps=[0, 32, 64]
    )
    scan.chunk_weights(a, z, schedule, range(2), out, scale=0.1, **keys)
assert all("wgmma" in one.asm["ptx"] for one in compiled) and len(compiled) == 2
assert names and set(names) == {"_chunk_weights_kernel"}, names
"""


def test_kernels_compile_with_a_hook(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env={"TRITON_CACHE_DIR": str(tmp_path)}
    )
    assert not done.returncode, done.stderr[-2000:]
