"""The weight map: which tensors of a Hugging Face checkpoint make which tensor of ours, and back.

One table for Qwen3 and Llama; a row is used where the model has what it names. Every tensor on either side is in
exactly one row: what is not, or has another shape than the table says, is an error that names it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inplace_ttt.config import TTT, Model, UserError, padded_vocab_size, ttt_layers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One tensor of ours and those of Hugging Face that it is made of."""

    ours: str
    theirs: dict[str, Shape]  # by name
    way: "Way"


@dataclass(frozen=True)
class Way:
    """Merge tensors into one, split the one again, and compute its shape from theirs."""

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

# ours under decoder.layers.N., theirs under model.layers.N., the sizes of each of theirs (see ``_sizes``)
LAYER = [
    ("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "d"}, SAME),
    (
        "self_attention.linear_qkv.weight",
        {"self_attn.q_proj.weight": "q d", "self_attn.k_proj.weight": "k d", "self_attn.v_proj.weight": "k d"},
        HEADS,
    ),
    ("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "d q"}, SAME),
    ("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "d"}, SAME),
    ("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "f d", "mlp.up_proj.weight": "f d"}, GATE_AND_UP),
    ("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "d f"}, SAME),
]
QK_NORM = [
    ("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "h"}, SAME),
    ("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "h"}, SAME),
]
FAST = [("mlp.ttt_conv.weight", {"mlp.ttt_conv.weight": "d 1 taps"}, SAME)]
FAST_PROJECTION = [("mlp.ttt_proj.weight", {"mlp.ttt_proj.weight": "d d"}, SAME)]
MODEL = [
    ("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "words d"}, VOCABULARY),
    ("decoder.final_layernorm.weight", {"model.norm.weight": "d"}, SAME),
]
UNTIED = [("output_layer.weight", {"lm_head.weight": "words d"}, VOCABULARY)]


def _sizes(model: Model, ttt: TTT) -> dict[str, int]:
    """Return the sizes that the letters of the table stand for."""
    return {
        "d": model.hidden_size,
        "f": model.ffn_hidden_size,
        "h": model.kv_channels,
        "q": model.num_attention_heads * model.kv_channels,
        "k": model.num_query_groups * model.kv_channels,
        "words": model.vocab_size,
        "taps": ttt.conv_kernel,
        "1": 1,
    }


def weight_map(model: Model, ttt: TTT) -> list[Row]:
    """The rows of a whole model; layers with fast weights have their tensors besides."""
    sizes = _sizes(model, ttt)

    def row(ours: str, theirs: dict[str, str], way: Way, here: str = "", there: str = "") -> Row:
        shapes = {there + name: tuple(sizes[size] for size in shape.split()) for name, shape in theirs.items()}
        return Row(here + ours, shapes, way)

    rows = [row(*entry) for entry in MODEL + ([] if model.tie_word_embeddings else UNTIED)]
    fast_layers = ttt_layers(ttt, model.num_layers)
    for layer in range(model.num_layers):
        used = LAYER + (QK_NORM if model.qk_layernorm else [])
        if layer in fast_layers:
            used = used + FAST + (FAST_PROJECTION if ttt.project else [])
        rows += [row(*entry, here=f"decoder.layers.{layer}.", there=f"model.layers.{layer}.") for entry in used]
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
