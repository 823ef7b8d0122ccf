"""What can be known of the kernels without a GPU: they compile for Hopper, one of them runs in Triton's interpreter,
and what surrounds the other is right with its product done by torch. tests/gpu/test_kernels.py runs them."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from inplace_ttt.ttt import fast_weight_linear, naive, ops
from numerics.cases import largest, operands, random_documents, relative_error, update_norms, with_gradients
from ranks import run_ranks

kernels = pytest.importorskip("inplace_ttt.ttt.backends.hopper.scan", reason="needs Triton with Gluon")


def run_script(name: str, **environment: str) -> str:
    script = Path(__file__).parent / name
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_kernels_compile_for_hopper():
    lines = run_script("compile_kernels.py").splitlines()
    assert len(lines) == 52 and all(line.endswith("True True True True") for line in lines), lines


def test_some_kernels_compile_for_hopper():
    """Scans of both directions, and one of a layer's other kernels."""
    lines = run_script("compile_kernels.py", EVERY="15").splitlines()
    assert len(lines) == 4 and all(line.endswith("True True True True") for line in lines), lines


@pytest.mark.parametrize(
    "script",
    ["interpret_conv.py", "interpret_layers.py", "interpret_loss.py", "interpret_rows.py", "interpret_updates.py"],
)
def test_kernels_in_the_interpreter(script):
    assert float(run_script(script, TRITON_INTERPRET="1")) < 1e-5


def chunk_weights_in_torch(
    a, z, schedule, window, out, *, scale, base=None, before=None, after=None, total=None, norms=None
):
    """What the kernel computes from its tables, and no more than it is given memory for."""
    shape = a.shape[1], z.shape[1]
    made = schedule.readers[window.stop] - schedule.readers[window.start]
    weights = out[:made].fill_(torch.nan)
    steps = iter(schedule.tokens[schedule.steps[window.start] : schedule.steps[window.stop]].tolist())
    state = torch.zeros(shape) if before is None else before.clone()
    rows = schedule.table[window.start : window.stop].tolist()
    places = iter(range(made)[::-1] if schedule.reverse else range(made))
    for number, (whole, left, reads, ends) in enumerate(rows):
        if number > 0 and rows[number - 1][-1] != kernels.CONTINUES:
            state = torch.zeros(shape)
        if reads:
            weights[next(places)] = state if base is None else base + state
        for count in [kernels.BLOCK_T] * whole + [left] * (left > 0):
            first = next(steps)
            assert first + count <= len(a)
            state += scale * a[first : first + count].T @ z[first : first + count]
        if ends >= 0 and total is not None:
            total += state
        if ends >= 0 and norms is not None:
            norms[ends] = state.square().sum() / norms.shape[1]
    assert next(steps, None) is None and next(places, None) is None
    if after is not None:
        after.copy_(state)


def documents_that_end_oddly(rng, length, slices):
    """Some go over the edge of a slice and end, at any token, in the next one; the one after them ends with it."""
    cuts = {0, slices * length}
    for index in range(1, slices):
        if rng.random() < 0.5:
            cuts |= {index * length + rng.randint(1, length - 1), (index + 1) * length}
    return torch.tensor(sorted(cuts), dtype=torch.int32)


def worst_error(seeds):
    """Of values, gradients and norms of updates, over random layouts, windows and ways to keep weights."""
    size, rank, errors = dist.get_world_size(), dist.get_rank(), []
    kernels.chunk_weights = chunk_weights_in_torch
    ops.choose_backend = lambda *_: kernels.HopperBackend()
    ops._free_bytes = lambda device: 0
    from numerics.slices import error_of_slices, norms_of_all_ranks, zigzag

    for seed in seeds:
        rng = random.Random(seed)
        s = 128 * size * rng.randint(1, 4) if size > 1 else rng.randint(1, 600)
        z, v, weight, g = operands(seed, s, rng.randint(1, 2), rng.choice([4, 300]), 5)
        documents = random_documents(rng, s, 64 if size > 1 else rng.choice([1, 64]))
        if size > 1 and rng.random() < 0.5:
            documents = documents_that_end_oddly(rng, s // (2 * size), 2 * size)
        options = dict(eta=0.01, chunk_size=64, cu_seqlens=documents)
        expected = with_gradients(naive.fast_weight_linear, z, v, weight, g, **options)
        window_bytes = rng.choice([0, 2 * v.shape[2] * 5 * 3, 2**30])
        kernels.HopperBackend.window_bytes = window_bytes
        kernels.HopperBackend.exchange_window_bytes = window_bytes * rng.choice([1, 4])
        keep = dict(keep_chunk_weights=rng.choice([True, False]))
        group = dict(cp_group=dist.group.WORLD) if size > 1 else {}
        local = [t.float() for t in (zigzag(z, size, rank), zigzag(v, size, rank), weight, zigzag(g, size, rank))]
        values = with_gradients(fast_weight_linear, *local, **options, **keep, **group)
        _, norms = fast_weight_linear(*local[:3], **options, **group, return_update_norms=True)
        norms, expected_norms = norms_of_all_ranks(norms).double(), update_norms(z, v, documents, 0.01)
        errors += [error_of_slices(values, expected), relative_error(norms, expected_norms)]
    return largest(errors)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_windows_and_row_blocks_around_the_kernel(size):
    assert largest(run_ranks(size, worst_error, range(40))) < 1e-5


@pytest.mark.parametrize(("kept_layers", "made"), [(1, 2), (2, 3)])
def test_weights_are_kept_where_those_of_all_layers_fit_an_eighth_of_free_memory(monkeypatch, kept_layers, made):
    """Kept, they are made once, and the suffix sums once; else a second time in the backward."""
    calls = []
    monkeypatch.setattr(
        kernels, "chunk_weights", lambda *args, **how: calls.append(how) or chunk_weights_in_torch(*args, **how)
    )
    monkeypatch.setattr(ops, "choose_backend", lambda *_: kernels.HopperBackend())
    z, v, weight, g = (t.float() for t in operands(0, 4 * 64, 1, 8, 16))
    monkeypatch.setattr(ops, "_free_bytes", lambda device: 8 * 4 * weight.numel() * 4)
    with_gradients(fast_weight_linear, z, v, weight, g, eta=0.1, chunk_size=64, kept_layers=kept_layers)
    assert len(calls) == made
