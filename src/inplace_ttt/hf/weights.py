"""The weight map: which tensors of a Hugging Face checkpoint make which tensor of ours, and back.

One table for Qwen3 and Llama; a row is used where the model has what it names. Every tensor on either side is in
exactly one row: what is not is an error that names it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inplace_ttt.config import Model, UserError, padded_vocab_size

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One tensor of ours and those of Hugging Face that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    way: "Way"


@dataclass(frozen=True)
class Way:
    """How tensors become one, how the one becomes them again, and the shape of the one from theirs."""

    join: Callable[[Model, list[Tensor]], Tensor]
    split: Callable[[Model, Tensor], list[Tensor]]


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
    """Megatron keeps the heads by group: the queries of a group, its key, its value, then the next group's."""
    parts = [tensor.unflatten(0, (model.num_query_groups, -1)) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _split_heads(model: Model, tensor: Tensor) -> list[Tensor]:
    queries = model.num_attention_heads // model.num_query_groups * model.kv_channels
    by_group = tensor.unflatten(0, (model.num_query_groups, -1))
    parts = by_group.split([queries, model.kv_channels, model.kv_channels], dim=1)
    return [part.flatten(0, 1) for part in parts]


SAME = Way(_same_join, _same_split)
VOCABULARY = Way(_pad_vocabulary, _cut_vocabulary)
GATE_AND_UP = Way(_stack, _halve)
HEADS = Way(_join_heads, _split_heads)

# ours under decoder.layers.N., theirs under model.layers.N.
LAYER = [
    ("self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], SAME),
    (
        "self_attention.linear_qkv.weight",
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        HEADS,
    ),
    ("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], SAME),
    ("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], SAME),
    ("mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], GATE_AND_UP),
    ("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], SAME),
]
QK_NORM = [
    ("self_attention.q_layernorm.weight", ["self_attn.q_norm.weight"], SAME),
    ("self_attention.k_layernorm.weight", ["self_attn.k_norm.weight"], SAME),
]
TTT = [("mlp.ttt_conv.weight", ["mlp.ttt_conv.weight"], SAME)]
TTT_PROJECTION = [("mlp.ttt_proj.weight", ["mlp.ttt_proj.weight"], SAME)]
MODEL = [
    ("embedding.word_embeddings.weight", ["model.embed_tokens.weight"], VOCABULARY),
    ("decoder.final_layernorm.weight", ["model.norm.weight"], SAME),
]
UNTIED = [("output_layer.weight", ["lm_head.weight"], VOCABULARY)]


def weight_map(model: Model, ttt_layers: list[int], project: bool) -> list[Row]:
    """The rows of a whole model; ``ttt_layers`` have the tensors of fast weights besides."""
    rows = [Row(ours, tuple(theirs), way) for ours, theirs, way in MODEL]
    if not model.tie_word_embeddings:
        rows += [Row(ours, tuple(theirs), way) for ours, theirs, way in UNTIED]
    for layer in range(model.num_layers):
        used = LAYER + (QK_NORM if model.qk_layernorm else [])
        if layer in ttt_layers:
            used = used + TTT + (TTT_PROJECTION if project else [])
        rows += [
            Row(f"decoder.layers.{layer}.{ours}", tuple(f"model.layers.{layer}.{name}" for name in theirs), way)
            for ours, theirs, way in used
        ]
    return rows


def check_names(there: set[str], mapped: set[str], place: str) -> None:
    """Raise UserError where the tensors of a checkpoint are not those of the map."""
    missing, unknown = sorted(mapped - there), sorted(there - mapped)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{place} has no tensor '{missing[0]}'{more}, which the model's configuration asks for")
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(f"{place} has a tensor '{unknown[0]}'{more} that has no place in the model: it would be lost")
