"""Count a model's parameters, reject models that cannot fit before memory is allocated, and choose the recompute."""

import os
from dataclasses import replace

import psutil
import torch
import torch.distributed as dist

from inplace_ttt.config import Config, Parallel, UserError, with_recompute
from inplace_ttt.environment import World
from inplace_ttt.estimate import Gpu, RankShard
from inplace_ttt.fit import choose_recompute
from inplace_ttt.validation import precision, transformer_impl

# Lower bound of bytes per parameter: weight and gradient. Optimizer states are left out: ranks may share them.
MIN_BYTES_PER_PARAM = {"cuda": 2 + 4, "cpu": 4 + 4}


def total_parameters(config: Config) -> int:
    """Return the number of parameters of the whole model, including embedding rows of the padded vocabulary."""
    return RankShard(replace(config, parallel=Parallel()), 1).parameters(0)


def check_memory(config: Config, world: World) -> None:
    """Raise UserError if this rank's weights and gradients, or one layer's activations, exceed the machine's memory.

    This is a lower bound, which rejects only impossible sizes. ``launch/plan.py`` estimates the memory of a run.
    """
    on_gpu = torch.cuda.is_available()
    kind = "cuda" if on_gpu else "cpu"
    shard, here = RankShard(config, world.size), 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
    parameters = max(shard.parameters(stage) for stage in range(shard.pp))
    where = torch.cuda.get_device_name(0) if on_gpu else "this machine"
    if parameters * MIN_BYTES_PER_PARAM[kind] * here > memory:
        raise UserError(
            f"{parameters / 1e9:,.1f} billion parameters per rank (model.num_layers={config.model.num_layers}, "
            f"model.hidden_size={config.model.hidden_size}, model.ffn_hidden_size={config.model.ffn_hidden_size}, "
            f"model.vocab_size={config.model.vocab_size}) need "
            f"{parameters * MIN_BYTES_PER_PARAM[kind] * here / 2**30:,.0f} GiB or more, but {where} has "
            f"{memory / 2**30:,.0f}: use a smaller model, or more tensor or pipeline parallel ranks"
        )
    activations = (
        shard.tokens
        * (config.model.ffn_hidden_size // shard.tp + config.model.hidden_size)
        * MIN_BYTES_PER_PARAM[kind]
        / 3
    )
    if activations * here > memory:
        raise UserError(
            f"data.seq_length={config.data.seq_length} x train.micro_batch_size={config.train.micro_batch_size} needs "
            f"{activations * here / 2**30:,.0f} GiB for one layer's activations, but {where} has "
            f"{memory / 2**30:,.0f}: use shorter samples, smaller micro batches or more context-parallel ranks"
        )


def choose_recompute_here(config: Config) -> Config:
    """Return the configuration with train.recompute=auto replaced by a choice for the GPUs of this job (collective).

    It is made for the smallest GPU, so that all ranks make the same. On a CPU it is none. Without Transformer Engine or
    in fp32 it is full, because the estimate does not know these.
    """
    if config.train.recompute != "auto":
        return config
    if not torch.cuda.is_available():
        return replace(config, train=with_recompute(config.train, "none"))
    if transformer_impl(config) != "transformer_engine" or precision(config) != torch.bfloat16:
        return replace(config, train=with_recompute(config.train, "full"))
    total = torch.tensor(float(torch.cuda.mem_get_info()[1]), device="cuda")
    dist.all_reduce(total, op=dist.ReduceOp.MIN)
    return choose_recompute(config, dist.get_world_size(), Gpu(torch.cuda.get_device_name(), float(total)))
