"""What values of a configuration fit together, checked before any process group forms and any work is done.

Each check raises UserError with one sentence: the key, its value, and what would work.
"""

import math
import os

import torch

from inplace_ttt import te
from inplace_ttt.config import VOCAB_MULTIPLE, Config, Model, UserError, ttt_layers
from inplace_ttt.ttt.function import PREFIXES

TARGETS = ("hidden_states", "input_embed")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")


def validate(config: Config, world_size: int) -> None:
    """Raise UserError for the first thing that cannot work on ``world_size`` processes."""
    check_model(config.model)
    _choices(config)
    _ttt(config)
    _parallel(config, world_size)
    _sequence(config)
    _batch(config, world_size)
    _numbers(config)


def transformer_engine_available() -> bool:
    return torch.cuda.is_available() and te.why_lacking() is None


def transformer_impl(config: Config) -> str:
    """``auto`` is Transformer Engine where CUDA and it are there."""
    chosen = config.model.transformer_impl
    if chosen == "auto":
        return "transformer_engine" if transformer_engine_available() else "local"
    return chosen


def precision(config: Config) -> torch.dtype:
    """``auto`` is bf16 with CUDA and fp32 without."""
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    names["auto"] = names["bf16"] if torch.cuda.is_available() else names["fp32"]
    return names[config.train.precision]


def _at_least(key: str, value, least) -> None:
    if value is not None and not (value >= least and math.isfinite(value)):
        raise UserError(f"{key}={value} is too small: use {least} or more")


def _one_of(key: str, value, choices) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} is not known: use one of {', '.join(choices)}")


def _divides(key: str, value: int, other: str, size: int) -> None:
    if size % value:
        fitting = [n for n in range(1, size + 1) if size % n == 0][:12]
        raise UserError(f"{key}={value} does not divide {other}={size}: use one of {fitting}")


def check_model(model: Model) -> None:
    """Raise UserError for the first thing that no model can be."""
    for key in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    ):
        _at_least(f"model.{key}", getattr(model, key), 1)
    _at_least("model.vocab_size", model.vocab_size, 1)
    _at_least("model.sliding_window", model.sliding_window, 1)
    _divides("model.num_query_groups", model.num_query_groups, "model.num_attention_heads", model.num_attention_heads)
    if model.kv_channels % 2:
        raise UserError(
            f"model.kv_channels={model.kv_channels} is odd: rotary embedding turns pairs, use an even number"
        )
    scaling = model.rope_scaling
    _one_of("model.rope_scaling.rope_type", scaling.rope_type, ROPE_TYPES)
    needed = {
        "linear": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings"),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    }
    for key in needed.get(scaling.rope_type, ()):
        if getattr(scaling, key) is None:
            raise UserError(
                f"model.rope_scaling.rope_type={scaling.rope_type} needs model.rope_scaling.{key}: it is null"
            )


def _choices(config: Config) -> None:
    _one_of("model.transformer_impl", config.model.transformer_impl, ("auto", "local", "transformer_engine"))
    _one_of("ttt.target", config.ttt.target, TARGETS)
    _one_of("ttt.prefix", config.ttt.prefix, PREFIXES)
    _one_of("ttt.comm_dtype", config.ttt.comm_dtype, ("fp32", "bf16"))
    _one_of("data.kind", config.data.kind, ("indexed", "recall"))
    _one_of("train.precision", config.train.precision, ("auto", "bf16", "fp32"))
    _one_of("train.recompute", config.train.recompute, ("none", "selective", "full"))
    _one_of("log.wandb", config.log.wandb, ("auto", "online", "offline", "disabled"))
    if config.model.transformer_impl == "transformer_engine" and not transformer_engine_available():
        raise UserError(
            "model.transformer_impl=transformer_engine needs CUDA and the package transformer-engine, which are not "
            "here: use auto or local"
        )
    if config.train.recompute != "full" and not config.train.recompute_core_attn:
        raise UserError(
            f"train.recompute_core_attn=false is about what train.recompute=full leaves out, but train.recompute="
            f"{config.train.recompute}: set it to full"
        )
    if config.train.recompute == "selective":
        for module in config.train.recompute_modules:
            _one_of("train.recompute_modules", module, RECOMPUTE_MODULES)
            if module == "layernorm" and transformer_impl(config) == "local":
                raise UserError(
                    "train.recompute_modules=[layernorm] needs Transformer Engine, which is not here: "
                    "use core_attn, mlp or both"
                )


def _ttt(config: Config) -> None:
    ttt = config.ttt
    ttt_layers(ttt, config.model.num_layers)
    _at_least("ttt.chunk_size", ttt.chunk_size, 1)
    _at_least("ttt.conv_kernel", ttt.conv_kernel, 1)
    if ttt.conv_kernel % 2 == 0:
        raise UserError(f"ttt.conv_kernel={ttt.conv_kernel} is even: use an odd number, as many taps before as after")
    _at_least("ttt.lr_multiplier", ttt.lr_multiplier, 0)
    if not math.isfinite(ttt.eta):
        raise UserError(f"ttt.eta={ttt.eta} is not a number to multiply with: use one such as 1.0")
    if ttt.max_update_ratio is not None and not ttt.max_update_ratio > 0:
        raise UserError(
            f"ttt.max_update_ratio={ttt.max_update_ratio} would stop every run: use a number above 0, or null"
        )


def _parallel(config: Config, world_size: int) -> None:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        _at_least(f"parallel.{key}", getattr(parallel, key), 1)
    if not parallel.timeout_minutes > 0:
        raise UserError(f"parallel.timeout_minutes={parallel.timeout_minutes}: use a number above 0")
    if world_size % (tp * pp * cp):
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp} x "
            f"context_parallel_size={cp} needs a multiple of {tp * pp * cp} processes, but there are {world_size}: "
            f"start torchrun with "
            f"--nproc-per-node {tp * pp * cp}, or choose smaller sizes"
        )
    for key in ("num_query_groups", "ffn_hidden_size"):
        _divides("parallel.tensor_model_parallel_size", tp, f"model.{key}", getattr(model, key))
    if VOCAB_MULTIPLE % tp:
        raise UserError(f"parallel.tensor_model_parallel_size={tp} does not divide the vocabulary: use a power of two")
    _divides("parallel.pipeline_model_parallel_size", pp, "model.num_layers", model.num_layers)
    if parallel.sequence_parallel and tp == 1:
        raise UserError(
            "parallel.sequence_parallel=true splits what tensor parallelism leaves whole: it needs "
            "parallel.tensor_model_parallel_size above 1; set it to false"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise UserError(
            "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true"
        )


def _sequence(config: Config) -> None:
    data, parallel = config.data, config.parallel
    s, cp = data.seq_length, parallel.context_parallel_size
    _at_least("data.seq_length", s, 1)
    unit = 1 if cp == 1 else 2 * cp
    why = f"2 x parallel.context_parallel_size={cp} equal slices"
    if config.ttt.enabled and cp > 1:
        unit *= config.ttt.chunk_size
        why += f" of whole chunks (ttt.chunk_size={config.ttt.chunk_size})"
    if s % unit:
        raise UserError(
            f"data.seq_length={s} cannot be cut into {why}, for slices must start on chunk boundaries: "
            f"use a multiple of {unit}, such as {math.ceil(s / unit) * unit}, or another chunk size"
        )
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and s % (cp * tp):
        raise UserError(
            f"data.seq_length={s} is not split evenly by context_parallel_size={cp} x tensor_model_parallel_size={tp} "
            f"with parallel.sequence_parallel=true: use a multiple of {cp * tp}"
        )


def _batch(config: Config, world_size: int) -> None:
    train, parallel = config.train, config.parallel
    for key in ("steps", "global_batch_size", "micro_batch_size"):
        _at_least(f"train.{key}", getattr(train, key), 1)
    dp = world_size // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if train.global_batch_size % (dp * train.micro_batch_size):
        unit = dp * train.micro_batch_size
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {dp} data-parallel ranks: "
            f"use {math.ceil(train.global_batch_size / unit) * unit}"
        )


def _numbers(config: Config) -> None:
    optim, train, checkpoint = config.optim, config.train, config.checkpoint
    for key, value, least in (
        ("optim.lr", optim.lr, 0),
        ("optim.weight_decay", optim.weight_decay, 0),
        ("optim.clip_grad", optim.clip_grad, 0),
        ("train.eval_interval", train.eval_interval, 0),
        ("train.eval_samples", train.eval_samples, 0),
        ("checkpoint.interval", checkpoint.interval, 0),
        ("checkpoint.keep", checkpoint.keep, 1),
        ("log.interval", config.log.interval, 1),
        ("data.num_workers", config.data.num_workers, 0),
        ("data.recall_pairs", config.data.recall_pairs, 1),
        ("data.recall_alphabet", config.data.recall_alphabet, 1),
    ):
        _at_least(key, value, least)
    for key in ("warmup_fraction", "decay_fraction", "min_lr_ratio", "adam_beta1", "adam_beta2"):
        value = getattr(optim, key)
        if not 0 <= value <= 1:
            raise UserError(f"optim.{key}={value} is not a fraction: use a number from 0 to 1")
    if not 0 <= config.data.validation_fraction < 1:
        raise UserError(f"data.validation_fraction={config.data.validation_fraction}: use a number from 0 to below 1")
    for source in config.data.sources:
        if not source.weight > 0:
            raise UserError(f"data.sources gives '{source.path}' the weight {source.weight}: use a number above 0")
    if checkpoint.load is not None and not os.path.isdir(checkpoint.load):
        raise UserError(
            f"checkpoint.load='{checkpoint.load}' is not a folder: name a run, one of its checkpoints, or what "
            "launch/import_hf.py made"
        )
