"""Transform between Hugging Face tensors and Megatron parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inplace_ttt.config import Model, padded_vocab_size


@dataclass(frozen=True)
class ParamTransform:
    """Merge Hugging Face tensors into one Megatron parameter, and split it again."""

    join: Callable[[Model, list[Tensor]], Tensor]
    split: Callable[[Model, Tensor], list[Tensor]]


class ParamMapping(NamedTuple):
    """Map one Megatron parameter to Hugging Face tensors, with shapes in letters (see ``hf/weights._sizes``)."""

    megatron_param: str
    hf_params: dict[str, str]
    transform: ParamTransform


def _same_join(model: Model, tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _same_split(model: Model, tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _pad_vocabulary(model: Model, tensors: list[Tensor]) -> Tensor:
    rows = padded_vocab_size(tensors[0].shape[0]) - tensors[0].shape[0]
    return torch.nn.functional.pad(tensors[0], (0, 0, 0, rows))


def _cut_vocabulary(model: Model, tensor: Tensor) -> list[Tensor]:
    return [tensor[: model.vocab_size]]


def _stack(model: Model, tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors)


def _halve(model: Model, tensor: Tensor) -> list[Tensor]:
    return list(tensor.chunk(2))


def _join_heads(model: Model, tensors: list[Tensor]) -> Tensor:
    """Concatenate Q, K and V as Megatron stores them: queries, key and value of each query group in turn."""
    parts = [tensor.unflatten(0, (model.num_query_groups, -1)) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _split_heads(model: Model, tensor: Tensor) -> list[Tensor]:
    queries = model.num_attention_heads // model.num_query_groups * model.kv_channels
    by_group = tensor.unflatten(0, (model.num_query_groups, -1))
    parts = by_group.split([queries, model.kv_channels, model.kv_channels], dim=1)
    return [part.flatten(0, 1) for part in parts]


DIRECT = ParamTransform(_same_join, _same_split)
VOCABULARY = ParamTransform(_pad_vocabulary, _cut_vocabulary)
GATED_MLP = ParamTransform(_stack, _halve)
QKV = ParamTransform(_join_heads, _split_heads)
