"""Initialise the parameters, equal at every parallel layout and on every device.

Each full parameter is drawn on the CPU, from a generator seeded with the run's seed and the parameter's name; every
rank keeps its shard. Megatron's own initialisation depends on the number of ranks.
"""

import hashlib

import torch
from torch import Tensor, nn

from inplace_ttt.config import Config
from inplace_ttt.ttt.target import identity_kernel


@torch.no_grad()
def initialize(model: nn.Module, config: Config, pg_collection) -> None:
    """Initialise all parameters in place.

    Weights: N(0, init_method_std), divided by sqrt(2 * num_layers) for projections into the residual stream. Norms: 1.
    Biases: 0. Fast-weight convolutions: 0. Fast-weight projections: diagonal with entries N(0, proj_init_std). With
    ttt.convolution=false: convolutions the identity, projections 0. So the first updates are 0, unless the model has
    neither. Linear attention: decay as in ``initial_decay``, convolutions as torch initialises them.
    """
    first_layer = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    for local_name, param in model.named_parameters():
        name = global_name(local_name, first_layer, config.model.tie_word_embeddings)
        full = _values(name, _full_shape(name, param, pg_collection.tp.size()), config)
        param.copy_(_shard(full, name, param, pg_collection.tp))


def global_name(name: str, first_layer: int, tied: bool) -> str:
    """Return a parameter's name in the whole model, where layers are numbered from the first pipeline stage.

    Args:
        name: the name in this pipeline stage.
        first_layer: index of the stage's first layer in the whole model, from 0.
        tied: the output layer shares the weight of the embedding.
    """
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    name = ".".join(parts)
    # the last stage has its own copy of tied embeddings
    return "embedding.word_embeddings.weight" if tied and name == "output_layer.weight" else name


def _values(name: str, shape: tuple[int, ...], config: Config) -> Tensor:
    digest = hashlib.sha256(f"{config.train.seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if name.endswith("ttt_conv.weight"):
        return torch.zeros(shape) if config.ttt.convolution else identity_kernel(shape)
    if name.endswith("ttt_proj.weight"):
        if not config.ttt.convolution:
            return torch.zeros(shape)
        return torch.diag(torch.randn(shape[0], generator=generator) * config.ttt.proj_init_std)
    if name.endswith(("A_log", "dt_bias")):
        from inplace_ttt.megatron.delta_net import initial_decay  # needs fla-core

        return initial_decay(shape, name, generator)
    if name.endswith("conv1d.weight"):  # as torch initialises it
        return (2 * torch.rand(shape, generator=generator) - 1) * shape[-1] ** -0.5
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    std = config.model.init_method_std
    if name.startswith("embedding."):
        std = config.model.embedding_init_method_std or std
    if name.endswith(("linear_proj.weight", "out_proj.weight", "linear_fc2.weight")):
        std /= (2 * config.model.num_layers) ** 0.5
    return torch.randn(shape, generator=generator) * std


def _split(name: str, param: Tensor) -> tuple[int, int]:
    """Return (dimension that tensor parallelism splits, parts per rank), or (-1, 1) if it does not split the parameter.

    Gate and up projection are one tensor; every rank holds a part of each.
    """
    if not getattr(param, "tensor_model_parallel", False):
        return -1, 1
    return param.partition_dim, 2 if name.endswith("linear_fc1.weight") else 1


def _full_shape(name: str, param: Tensor, tp_size: int) -> tuple[int, ...]:
    dim, _ = _split(name, param)
    return tuple(size * tp_size if axis == dim else size for axis, size in enumerate(param.shape))


def _shard(full: Tensor, name: str, param: Tensor, tp_group) -> Tensor:
    dim, parts_each = _split(name, param)
    if dim < 0 or tp_group.size() == 1:
        return full
    parts = full.chunk(parts_each * tp_group.size(), dim=dim)
    return torch.cat(parts[tp_group.rank() :: tp_group.size()], dim=dim)
