"""Map weights: the Hugging Face tensors of each parameter of the Megatron model.

The map consists of one table and the parameters that a family adds. Every tensor on either side occurs exactly once.
Missing and unknown tensors and wrong shapes are errors that name the tensor.
"""

from dataclasses import dataclass

from inplace_ttt.config import TTT, Model, UserError, ttt_layers
from inplace_ttt.models import family_of
from inplace_ttt.models.mapping import DIRECT, GATED_MLP, QKV, VOCABULARY, ParamMapping, ParamTransform

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ResolvedParam:
    """Map one Megatron parameter to the Hugging Face tensors that it consists of."""

    megatron_param: str
    hf_params: dict[str, Shape]  # shape by tensor name
    transform: ParamTransform


# Megatron names below decoder.layers.N., Hugging Face names below model.layers.N. with their shapes (see ``_sizes``)
LAYER_PARAMS = (
    ParamMapping("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "d"}, DIRECT),
    ParamMapping(
        "self_attention.linear_qkv.weight",
        {"self_attn.q_proj.weight": "q d", "self_attn.k_proj.weight": "k d", "self_attn.v_proj.weight": "k d"},
        QKV,
    ),
    ParamMapping("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "d q"}, DIRECT),
    ParamMapping("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "d"}, DIRECT),
    ParamMapping("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "f d", "mlp.up_proj.weight": "f d"}, GATED_MLP),
    ParamMapping("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "d f"}, DIRECT),
)
FAST_WEIGHT_PARAMS = (ParamMapping("mlp.ttt_conv.weight", {"mlp.ttt_conv.weight": "d 1 taps"}, DIRECT),)
FAST_PROJECTION = (ParamMapping("mlp.ttt_proj.weight", {"mlp.ttt_proj.weight": "d d"}, DIRECT),)
MODEL = (
    ParamMapping("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "words d"}, VOCABULARY),
    ParamMapping("decoder.final_layernorm.weight", {"model.norm.weight": "d"}, DIRECT),
)
UNTIED_OUTPUT_PARAMS = (ParamMapping("output_layer.weight", {"lm_head.weight": "words d"}, VOCABULARY),)


def _sizes(model: Model, ttt: TTT) -> dict[str, int]:
    """Return the sizes that the letters of the table denote."""
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


def weight_map(model: Model, ttt: TTT) -> list[ResolvedParam]:
    """Return the mappings of all parameters of a model, including those of fast weights."""
    sizes = _sizes(model, ttt)

    def row(entry: ParamMapping, here: str = "", there: str = "") -> ResolvedParam:
        shapes = {name: tuple(sizes[size] for size in letters.split()) for name, letters in entry.hf_params.items()}
        return ResolvedParam(
            here + entry.megatron_param, {there + name: shape for name, shape in shapes.items()}, entry.transform
        )

    rows = [row(entry) for entry in MODEL + (() if model.tie_word_embeddings else UNTIED_OUTPUT_PARAMS)]
    fast_layers = ttt_layers(ttt, model.num_layers)
    for layer in range(model.num_layers):
        used = LAYER_PARAMS + family_of(model).rows
        if layer in fast_layers:
            used = used + FAST_WEIGHT_PARAMS + (FAST_PROJECTION if ttt.project else ())
        rows += [row(entry, f"decoder.layers.{layer}.", f"model.layers.{layer}.") for entry in used]
    return rows


def check_names(there: set[str], mapped: set[str], place: str) -> None:
    """Raise UserError if the tensors of a checkpoint (``there``) are not those of the map (``mapped``)."""
    missing, unknown = sorted(mapped - there), sorted(there - mapped)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{place} has no tensor '{missing[0]}'{more}, which the model's configuration requires")
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(
            f"{place} has an unknown tensor '{unknown[0]}'{more}: the model's configuration does not use it"
        )
