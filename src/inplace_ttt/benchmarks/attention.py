"""Benchmark of attention over packed documents: Transformer Engine's kernels and torch's, under context parallelism."""

import statistics
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from inplace_ttt.benchmarks.timing import milliseconds, ratio
from inplace_ttt.config import Config, UserError
from inplace_ttt.megatron import runtime
from inplace_ttt.megatron.attention import DocumentAttention
from inplace_ttt.megatron.batch_context import BatchContext
from inplace_ttt.megatron.model import build_model
from inplace_ttt.ttt.layout import SequenceLayout
from inplace_ttt.validation import transformer_impl


def measure(config: Config, documents: list[int], rounds: int) -> list[dict]:
    """Return one record per number of documents and implementation, of forward and backward.

    All ranks must call it. Raises UserError if Transformer Engine is not available, or if a number of documents does
    not divide data.seq_length, because documents have equal length.
    """
    if transformer_impl(config) != "transformer_engine":
        raise UserError("attention needs Transformer Engine, which is not available: use pip install -e '.[gpu]'")
    groups = runtime.start(config.parallel, config.train.seed)
    model = replace(config.model, num_layers=1, vocab_size=128)
    single = replace(
        config, model=model, ttt=replace(config.ttt, enabled=False), train=replace(config.train, recompute="none")
    )
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
        ways = {
            "transformer engine": partial(module.attend, *inputs, context),
            "torch": partial(DocumentAttention.attend, module, *inputs, context),
        }
        runs = {name: partial(_forward_backward, way, inputs, grad) for name, way in ways.items()}
        times = milliseconds(runs, rounds, dist.barrier)
        for name, found in times.items():
            records.append(
                dict(
                    documents=count,
                    implementation=name,
                    ranks=groups.cp.size(),
                    ms=statistics.median(found),
                    ratio=ratio(found, times["torch"]),
                )
            )
    runtime.stop()
    return records


def _forward_backward(attend, inputs, grad) -> None:
    torch.autograd.grad(attend(), inputs, grad)
