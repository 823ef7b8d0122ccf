"""Find settings with which a run fits in the memory of its GPUs, by the estimate."""

import itertools
import math
from dataclasses import replace

from inplace_ttt.config import ATTENTION_MODULES, PRODUCTS, Config, Model, UserError, with_recompute
from inplace_ttt.estimate import Gpu, memory
from inplace_ttt.models import has_qk_norm
from inplace_ttt.validation import validate

CHEAP = ("layernorm", "mlp_act", "rope")  # modules whose recompute has no matrix product


def choose_recompute(config: Config, world: int, gpu: Gpu) -> Config:
    """Return the configuration with the cheapest recompute that fits if train.recompute=auto, else unchanged.

    In order of cost: nothing; chunk weights (unless ttt.keep_chunk_weights is set); the outputs of norms, SwiGLU and
    RoPE; both; also fc1 and the QKV projection, in as many layers as needed; whole layers, without and with their
    attention. The last is returned if nothing fits.
    """
    if config.train.recompute != "auto":
        return config
    if config.model.attention != "softmax":  # the estimate knows no other
        return replace(config, train=with_recompute(config.train, "full"))
    layers = config.model.num_layers // config.parallel.pipeline_model_parallel_size
    modules = [name for name in (*CHEAP, *PRODUCTS) if _exists(name, config.model)]
    # without QK-norm rope frees nothing: the output of linear_qkv, from which it is recomputed, is as large
    cheap = [name for name in CHEAP if name in modules and (name != "rope" or has_qk_norm(config.model))]
    choices: list[tuple[bool | None, dict]] = []
    for recompute in (dict(recompute="none"), dict(recompute="selective", recompute_modules=cheap)):
        choices += [(keep, recompute) for keep in (True, False)]
    for count in range(1, layers + 1):
        again = dict(recompute="selective", recompute_modules=modules, recompute_num_layers=count)
        choices.append((False, again))
    choices += [(None, dict(recompute="full", recompute_core_attn=again)) for again in (False, True)]
    asked = config.ttt.keep_chunk_weights
    for keep, recompute in choices:
        ttt = replace(config.ttt, keep_chunk_weights=keep if asked is None else asked)
        found = replace(config, train=with_recompute(config.train, **recompute), ttt=ttt)
        if memory(found, world, gpu).needed <= gpu.memory:
            break
    return found


def _exists(module: str, model: Model) -> bool:
    return model.attention == "softmax" or module not in ATTENTION_MODULES


def describe_recompute(config: Config) -> str:
    """Return the settings of recompute that are in use, as overrides."""
    used = {"full": ["recompute_core_attn"], "selective": ["recompute_modules", "recompute_num_layers"]}
    keys = ["recompute", *used.get(config.train.recompute, [])]
    words = [_override("train", key, getattr(config.train, key)) for key in keys]
    if config.ttt.enabled:
        words.append(_override("ttt", "keep_chunk_weights", config.ttt.keep_chunk_weights))
    return " ".join(words)


def find_fitting_layout(config: Config, world: int, gpu: Gpu) -> list[str] | None:
    """Return the cheapest overrides with which the configuration fits on ``world`` GPUs, or None if none fits."""
    sizes = [2**power for power in range(world.bit_length()) if world % 2**power == 0]
    layouts = sorted(itertools.product(sizes, sizes, sizes), key=lambda sizes: (math.prod(sizes), *sizes[::-1]))
    for cp, tp, pp in layouts:
        parallel = replace(
            config.parallel,
            context_parallel_size=cp,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=tp > 1,
        )
        train = replace(with_recompute(config.train, "auto"), offload_layers=0)
        candidate = replace(config, train=train, parallel=parallel)
        try:
            validate(candidate, world)
        except UserError:
            continue
        if memory(choose_recompute(candidate, world, gpu), world, gpu).needed <= gpu.memory:
            return _differences(config, candidate)
    return None


def _differences(before: Config, after: Config) -> list[str]:
    return [
        _override(section, key, value)
        for section in ("parallel", "train")
        for key, value in vars(getattr(after, section)).items()
        if value != getattr(getattr(before, section), key)
    ]


def _override(section: str, key: str, value) -> str:
    if isinstance(value, list):
        value = f"[{','.join(value)}]"
    return f"{section}.{key}={'null' if value is None else str(value).lower()}"
