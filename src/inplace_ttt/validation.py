"""Check combinations of configuration values, before a process group is created.

Each check raises UserError with one sentence: the key, its value, and what would work.
"""

import importlib.util
import math
import os

import torch

from inplace_ttt import te
from inplace_ttt.config import (
    ATTENTION_MODULES,
    PRODUCTS,
    VOCAB_MULTIPLE,
    Config,
    Model,
    UserError,
    check_ranges,
    ttt_layers,
    warmup_steps,
)
from inplace_ttt.models import FAMILIES

# Parameters of each type of RoPE scaling: required, optional
ROPE_SCALING = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (("factor", "original_max_position_embeddings"), ("attention_factor", "beta_fast", "beta_slow")),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
}


def validate(config: Config, world_size: int) -> None:
    """Raise UserError for the first setting that cannot work on ``world_size`` processes.

    ``check_hardware`` checks what depends on the machine.
    """
    check_ranges(config)
    check_model(config.model)
    _choices(config)
    _linear_attention(config)
    _fp8(config)
    _optimizer_precision(config)
    _offload(config)
    ttt_layers(config.ttt, config.model.num_layers)
    _parallel(config, world_size)
    _sequence(config)
    _batch(config, world_size)
    _warmup(config)
    if config.checkpoint.load is not None and not os.path.isdir(os.path.expanduser(config.checkpoint.load)):
        raise UserError(
            f"checkpoint.load='{config.checkpoint.load}' is not a folder: use the folder of a run, of one of its "
            "checkpoints, or of a model that launch/import_hf.py wrote"
        )


def _warmup(config: Config) -> None:
    optim = config.optim
    if optim.warmup_steps is not None and optim.warmup_tokens is not None:
        raise UserError(
            f"optim.warmup_steps={optim.warmup_steps} and optim.warmup_tokens={optim.warmup_tokens} both set "
            f"the warm-up: set one of them to null"
        )
    key = next((key for key in ("warmup_steps", "warmup_tokens") if getattr(optim, key) is not None), None)
    if key is not None and warmup_steps(config) > config.train.steps:
        raise UserError(
            f"optim.{key}={getattr(optim, key)} is {warmup_steps(config)} steps, more than train.steps="
            f"{config.train.steps}: use a shorter warm-up, because optim.lr would not be reached"
        )


def transformer_engine_available() -> bool:
    """Return True if CUDA and Transformer Engine can be used."""
    return torch.cuda.is_available() and te.unavailable_reason() is None


def transformer_impl(config: Config) -> str:
    """Return model.transformer_impl; ``auto`` is transformer_engine if it and CUDA are available, else local."""
    chosen = config.model.transformer_impl
    if chosen == "auto":
        return "transformer_engine" if transformer_engine_available() else "local"
    return chosen


def precision(config: Config) -> torch.dtype:
    """Return the dtype of train.precision; ``auto`` is bf16 with CUDA and fp32 without."""
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    names["auto"] = names["bf16"] if torch.cuda.is_available() else names["fp32"]
    return names[config.train.precision]


def _divides(key: str, value: int, other: str, size: int) -> None:
    if size % value:
        fitting = [n for n in range(1, size + 1) if size % n == 0][:12]
        raise UserError(f"{key}={value} does not divide {other}={size}: use one of {fitting}")


def check_model(model: Model) -> None:
    """Raise UserError for the first setting of ``model.*`` that is invalid."""
    check_ranges(model, "model.")
    if model.family not in FAMILIES:
        raise UserError(f"model.family={model.family} is not known: use one of {', '.join(FAMILIES)}")
    _divides("model.num_query_groups", model.num_query_groups, "model.num_attention_heads", model.num_attention_heads)
    if model.window_attn_skip_freq is not None and model.sliding_window is None:
        raise UserError(
            f"model.window_attn_skip_freq={model.window_attn_skip_freq} needs model.sliding_window, which "
            f"is null: set model.sliding_window, or set model.window_attn_skip_freq=null"
        )
    if (model.window_attn_skip_freq or 0) > model.num_layers:
        raise UserError(
            f"model.window_attn_skip_freq={model.window_attn_skip_freq} is more than model.num_layers="
            f"{model.num_layers}: use a smaller number, or null if no layer should have full attention"
        )
    linear = {key: value for key, value in vars(model).items() if key.startswith("linear_") and value is not None}
    for key, value in linear.items() if model.attention == "softmax" else ():
        raise UserError(f"model.{key}={value} is not used by model.attention=softmax: set it to null")
    if model.attention != "softmax" and model.sliding_window is not None:
        raise UserError(
            f"model.sliding_window={model.sliding_window} is not used by model.attention={model.attention}, which has "
            f"no window: set it to null"
        )
    if model.kv_channels % 2:
        raise UserError(f"model.kv_channels={model.kv_channels} is odd: use an even number, because RoPE rotates pairs")
    _rope(model)


def _rope(model: Model) -> None:
    scaling, key = model.rope_scaling, "model.rope_scaling"
    needed, allowed = ROPE_SCALING[scaling.rope_type]
    for name, value in vars(scaling).items():
        if value is None and name in needed:
            raise UserError(f"{key}.rope_type={scaling.rope_type} needs {key}.{name}, which is null: set it")
        if value is not None and name not in (*needed, *allowed, "rope_type"):
            users = [kind for kind, (must, may) in ROPE_SCALING.items() if name in must + may]
            raise UserError(
                f"{key}.{name}={value} is not used by {key}.rope_type={scaling.rope_type}: set it to null, or use "
                f"rope_type {' or '.join(users)}"
            )
    fast, slow = scaling.beta_fast or 32.0, scaling.beta_slow or 1.0
    if scaling.rope_type == "yarn" and fast <= slow:
        raise UserError(f"{key}.beta_fast={fast} is not above {key}.beta_slow={slow}: use 32 and 1, or null for both")
    if scaling.rope_type == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(
            f"{key}.high_freq_factor={scaling.high_freq_factor} is not above {key}.low_freq_factor="
            f"{scaling.low_freq_factor}: use numbers such as 4 and 1"
        )


def _fp8(config: Config) -> None:
    train = config.train
    if train.fp8 is None:
        return
    if config.model.transformer_impl == "local" or train.precision == "fp32":
        key = "model.transformer_impl=local" if config.model.transformer_impl == "local" else "train.precision=fp32"
        raise UserError(f"train.fp8={train.fp8} is not supported with {key}: set one of them to auto or null")
    check_fp8_sizes(config, 128 if train.fp8_recipe == "blockwise" else 16)


def _optimizer_precision(config: Config) -> None:
    key = _reduced_key(config)
    if key is not None and not config.parallel.use_distributed_optimizer:
        raise UserError(f"{key} needs parallel.use_distributed_optimizer=true")


def _reduced_key(config: Config) -> str | None:
    """Return the key and value of gradients or moments that are not fp32, or None."""
    keys = (key for key in ("main_grads_dtype", "moments_dtype") if getattr(config.optim, key) != "fp32")
    return next((f"optim.{key}={getattr(config.optim, key)}" for key in keys), None)


def _offload(config: Config) -> None:
    layers, number = config.train.offload_layers, config.model.num_layers
    if not layers:
        return
    said = f"train.offload_layers={layers}"
    if layers >= number:
        raise UserError(f"{said} must be less than model.num_layers={number}")
    if config.train.recompute != "none":
        raise UserError(f"{said} needs train.recompute=none, and it is {config.train.recompute}")
    stages = config.parallel.pipeline_model_parallel_size
    if stages > 1:
        raise UserError(f"{said} needs parallel.pipeline_model_parallel_size=1, and it is {stages}")


def check_hardware(config: Config) -> None:
    """Raise UserError for the first setting that this process's machine and packages cannot run.

    ``validate`` checks what does not depend on the machine, so that a run can be planned and submitted elsewhere.
    """
    if config.model.transformer_impl == "transformer_engine" and not transformer_engine_available():
        raise UserError(
            "model.transformer_impl=transformer_engine needs CUDA and the package transformer-engine, which are not "
            "available: use auto or local"
        )
    fp8, reduced, offload = config.train.fp8, _reduced_key(config), config.train.offload_layers
    wanted = [
        (fp8 is not None, f"train.fp8={fp8}", "set train.fp8=null"),
        (reduced is not None, reduced, "set it to fp32"),
        (offload > 0, f"train.offload_layers={offload}", "set it to 0"),
    ]
    runs = transformer_impl(config) == "transformer_engine" and precision(config) == torch.bfloat16
    for is_set, said, otherwise in wanted:
        if is_set and not runs:
            raise UserError(f"{said} needs CUDA, Transformer Engine's layers and train.precision=bf16: {otherwise}")
    if fp8 is not None:
        recipe, has = config.train.fp8_recipe, torch.cuda.get_device_capability()
        needed = (9, 0) if recipe == "blockwise" else (8, 9)
        if has < needed:
            raise UserError(
                f"train.fp8={fp8} with train.fp8_recipe={recipe} needs a GPU of compute capability "
                f"{'.'.join(map(str, needed))}, and {torch.cuda.get_device_name()} has {'.'.join(map(str, has))}: set "
                f"train.fp8=null"
            )


def check_fp8_sizes(config: Config, unit: int) -> None:
    """Raise UserError if a matrix of a linear layer has a side that is not a multiple of ``unit``."""
    model, parallel = config.model, config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    sides = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size / TP": model.ffn_hidden_size // tp,
        "model.num_attention_heads * model.kv_channels / TP": model.num_attention_heads * model.kv_channels // tp,
        "model.num_query_groups * model.kv_channels / TP": model.num_query_groups * model.kv_channels // tp,
        "data.seq_length / CP": config.data.seq_length // (cp * (tp if parallel.sequence_parallel else 1)),
    }
    for name, size in sides.items():
        if size % unit:
            raise UserError(f"train.fp8={config.train.fp8} needs multiples of {unit}, but {name} is {size}")


def _linear_attention(config: Config) -> None:
    model, parallel = config.model, config.parallel
    if model.attention == "softmax":
        return
    if importlib.util.find_spec("fla") is None:
        raise UserError(
            f"model.attention={model.attention} needs the package fla-core, which is not installed: pip install "
            f"'inplace-ttt[linear]'"
        )
    chosen = [name for name in config.train.recompute_modules if name in ATTENTION_MODULES]
    if config.train.recompute == "selective" and chosen:
        raise UserError(
            f"train.recompute_modules={config.train.recompute_modules} names {chosen[0]}, which model.attention="
            f"{model.attention} does not have: use modules of layernorm, mlp_act and mlp"
        )
    for key in ("tensor_model_parallel_size", "context_parallel_size"):
        if getattr(parallel, key) > 1:
            raise UserError(
                f"parallel.{key}={getattr(parallel, key)} is not supported with model.attention={model.attention}: "
                f"use 1, with data and pipeline parallelism"
            )


def _choices(config: Config) -> None:
    if config.train.recompute != "full" and not config.train.recompute_core_attn:
        raise UserError(
            f"train.recompute_core_attn=false needs train.recompute=full, but train.recompute="
            f"{config.train.recompute}: set it to full, or set train.recompute_core_attn=true"
        )
    if config.train.recompute == "selective" and not config.train.recompute_modules:
        raise UserError(
            "train.recompute=selective needs train.recompute_modules, which is empty: use modules such as "
            "[layernorm,mlp_act], or set train.recompute=none"
        )
    layers = config.train.recompute_num_layers
    if layers is not None:
        if config.train.recompute != "selective" or not set(config.train.recompute_modules) & set(PRODUCTS):
            raise UserError(
                f"train.recompute_num_layers={layers} needs train.recompute=selective with mlp or qkv in "
                f"train.recompute_modules, but they are {config.train.recompute} and {config.train.recompute_modules}: "
                f"set it to null"
            )
        stage = config.model.num_layers // config.parallel.pipeline_model_parallel_size
        if layers > stage > 0:
            raise UserError(f"train.recompute_num_layers={layers} is more than the {stage} layers of a pipeline stage")
    edges = config.train.eval_positions
    if edges is not None and (len(edges) < 2 or sorted(set(edges)) != edges):
        raise UserError(
            f"train.eval_positions={edges} are not edges of ranges: use two or more ascending positions, "
            f"such as [0,1024,4096]"
        )


def _parallel(config: Config, world_size: int) -> None:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    if world_size % (tp * pp * cp):
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp} x "
            f"context_parallel_size={cp} needs a multiple of {tp * pp * cp} processes, but there are {world_size}: "
            f"start torchrun with --nproc-per-node {tp * pp * cp}, or use smaller sizes"
        )
    for key in ("num_query_groups", "ffn_hidden_size"):
        _divides("parallel.tensor_model_parallel_size", tp, f"model.{key}", getattr(model, key))
    if VOCAB_MULTIPLE % tp:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp} does not divide the padded vocabulary: "
            f"use a power of two up to {VOCAB_MULTIPLE}"
        )
    _divides("parallel.pipeline_model_parallel_size", pp, "model.num_layers", model.num_layers)
    if parallel.sequence_parallel and tp == 1:
        raise UserError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size above 1, but it is 1: "
            "increase it, or set parallel.sequence_parallel=false"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise UserError(
            "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true: set both, or set parallel.overlap_param_gather=false"
        )


def _sequence(config: Config) -> None:
    data, parallel = config.data, config.parallel
    s, cp = data.seq_length, parallel.context_parallel_size
    if config.ttt.enabled and config.ttt.chunk_size > s:
        raise UserError(
            f"ttt.chunk_size={config.ttt.chunk_size} is larger than data.seq_length={s}: no chunk would be complete, "
            f"so fast weights would never change; use {s} or less"
        )
    if config.ttt.enabled and config.ttt.decay != 1 and config.ttt.clip is not None:
        raise UserError(
            f"ttt.clip={config.ttt.clip} does not support ttt.decay={config.ttt.decay}: set ttt.clip to null, or "
            f"ttt.decay to 1"
        )
    unit = 1 if cp == 1 else 2 * cp
    why = f"2 x parallel.context_parallel_size={cp} equal slices"
    if config.ttt.enabled and cp > 1:
        unit *= config.ttt.chunk_size
        why += f" of whole chunks (ttt.chunk_size={config.ttt.chunk_size})"
    if s % unit:
        raise UserError(
            f"data.seq_length={s} cannot be cut into {why}: "
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
