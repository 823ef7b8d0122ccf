"""Measure attention over packed documents: Transformer Engine's kernels and torch's, under context parallelism."""

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from inplace_ttt.benchmarks.layer import relative_error
from inplace_ttt.benchmarks.timing import milliseconds, ratio
from inplace_ttt.config import Config, UserError, with_recompute
from inplace_ttt.flops import forward_flops
from inplace_ttt.megatron import runtime
from inplace_ttt.megatron.attention import DocumentAttention
from inplace_ttt.megatron.batch_context import BatchContext
from inplace_ttt.megatron.model import build_model
from inplace_ttt.ttt.layout import SequenceLayout
from inplace_ttt.validation import transformer_impl


def measure(config: Config, documents: list[int], rounds: int, each_kernel: bool = False) -> list[dict]:
    """Return one record per number of documents and implementation, of forward and backward.

    ``error`` is the largest RMS difference from torch's result, in bf16, among the output and the three gradients:
    0.005 is rounding.

    All ranks must call it. Raises UserError if Transformer Engine is not available, or if a number of documents does
    not divide data.seq_length, because documents have equal length.

    Args:
        each_kernel: also measure each kernel that Transformer Engine and torch can be made to use. A kernel that
            refuses the case is left out.
    """
    if transformer_impl(config) != "transformer_engine":
        raise UserError("attention needs Transformer Engine, which is not available: use pip install -e '.[gpu]'")
    groups = runtime.start(config.parallel, config.train.seed)
    model = replace(config.model, num_layers=1, vocab_size=128)
    train = with_recompute(config.train, "none")
    single = replace(config, model=model, ttt=replace(config.ttt, enabled=False), train=train)
    layer = build_model(single, torch.bfloat16, "transformer_engine", 128, groups).decoder.layers[0]
    module, s = layer.self_attention.core_attention, config.data.seq_length
    local, channels = s // groups.cp.size(), model.kv_channels
    heads = [model.num_attention_heads, model.num_query_groups, model.num_query_groups]
    inputs = [torch.randn(local, 1, n, channels, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in heads]
    grad = torch.randn(local, 1, model.num_attention_heads * channels, device="cuda", dtype=torch.bfloat16)
    records = []
    for count in documents:
        if s % count:
            raise UserError(f"--documents {count} does not divide data.seq_length={s}: use a divisor of it")
        context = BatchContext(layout=SequenceLayout(tuple(range(0, s + 1, s // count))))
        ways: dict[str, Callable] = {
            "transformer engine": partial(module.attend, *inputs, context),
            "torch": partial(DocumentAttention.attend, module, *inputs, context),
        }
        if each_kernel:
            ways |= {name: way for name, way in _kernels(*ways.values()).items() if _runs(way, inputs, grad)}
        runs = {name: partial(_forward_backward, way, inputs, grad) for name, way in ways.items()}
        times = milliseconds(runs, rounds, dist.barrier)
        expected = _results(ways["torch"], inputs, grad)
        errors = {name: _error(_results(way, inputs, grad), expected) for name, way in ways.items()}
        del expected
        one_document = replace(config, model=model, data=replace(config.data, seq_length=s // count))
        flops = 3 * count * forward_flops(one_document).attention / groups.cp.size()
        for name, found in times.items():
            ms = statistics.median(found)
            records.append(
                dict(
                    documents=count,
                    implementation=name,
                    ranks=groups.cp.size(),
                    ms=ms,
                    tflops=flops / ms / 1e9,
                    error=errors[name],
                    ratio=ratio(found, times["torch"]),
                )
            )
    runtime.stop()
    return records


def _forward_backward(attend, inputs, grad) -> None:
    torch.autograd.grad(attend(), inputs, grad)


def _results(attend, inputs, grad) -> list[torch.Tensor]:
    """Return the output and the gradients of query, key and value."""
    out = attend()
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def _error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest RMS difference of two results, relative to the RMS of the expected one, over all ranks."""
    errors = [relative_error(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    largest = torch.stack(errors).max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def _kernels(ours: Callable, torchs: Callable) -> dict[str, Callable]:
    """Return attention by each kernel, by name."""
    chosen = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention 2": SDPBackend.FLASH_ATTENTION}
    ways = {f"torch, {name}": partial(_within, partial(sdpa_kernel, kernel), torchs) for name, kernel in chosen.items()}
    cudnn = partial(_transformer_engine_kernel, NVTE_FLASH_ATTN="0", NVTE_FUSED_ATTN="1", NVTE_UNFUSED_ATTN="0")
    flash = partial(_transformer_engine_kernel, NVTE_FLASH_ATTN="1", NVTE_FUSED_ATTN="0", NVTE_UNFUSED_ATTN="0")
    for name, scope in {"cuDNN": cudnn, "FlashAttention": flash, "cuDNN in FP8": partial(_in_fp8, cudnn)}.items():
        ways[f"transformer engine, {name}"] = partial(_within, scope, ours)
    return ways


def _within(scope: Callable[[], contextlib.AbstractContextManager], attend: Callable) -> torch.Tensor:
    with scope():
        return attend()


@contextlib.contextmanager
def _transformer_engine_kernel(**variables: str) -> Iterator[None]:
    """Make Transformer Engine choose its kernel anew under these environment variables, and again after it."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    backends, before = dot_product_attention._attention_backends, dict(os.environ)
    os.environ.update(variables)
    backends["backend_selection_requires_update"] = True
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        backends["backend_selection_requires_update"] = True


@contextlib.contextmanager
def _in_fp8(kernel: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Run Transformer Engine's attention in FP8, with scaling factors of the calls before."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch import autocast

    with kernel(), autocast(enabled=True, recipe=DelayedScaling(fp8_dpa=True)):
        yield


def _runs(attend, inputs, grad) -> bool:
    """Return True on all ranks if a kernel takes the case on all ranks."""
    try:
        _forward_backward(attend, inputs, grad)
        torch.cuda.synchronize()
        fails = 0.0
    except (RuntimeError, ValueError, AssertionError):
        fails = 1.0
    failed = torch.tensor(fails, device="cuda")
    dist.all_reduce(failed)
    return not failed.item()
