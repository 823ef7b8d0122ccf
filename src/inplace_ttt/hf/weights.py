"""The weight map: which tensors of a Hugging Face checkpoint make which tensor of ours, and back.

One table, and the rows that a family adds. Every tensor on either side is in exactly one row: what is not, or has
another shape than the table says, is an error that names it.
"""

from dataclasses import dataclass

from inplace_ttt.config import TTT, Model, UserError, ttt_layers
from inplace_ttt.models import family_of
from inplace_ttt.models.mapping import GATE_AND_UP, QKV, SAME, VOCABULARY, Entry, Mapping

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One tensor of ours and those of Hugging Face that it is made of."""

    ours: str
    theirs: dict[str, Shape]  # by name
    mapping: Mapping


# ours under decoder.layers.N., theirs under model.layers.N., the sizes of each of theirs (see ``_sizes``)
LAYER = (
    Entry("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "d"}, SAME),
    Entry(
        "self_attention.linear_qkv.weight",
        {"self_attn.q_proj.weight": "q d", "self_attn.k_proj.weight": "k d", "self_attn.v_proj.weight": "k d"},
        QKV,
    ),
    Entry("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "d q"}, SAME),
    Entry("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "d"}, SAME),
    Entry("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "f d", "mlp.up_proj.weight": "f d"}, GATE_AND_UP),
    Entry("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "d f"}, SAME),
)
FAST = (Entry("mlp.ttt_conv.weight", {"mlp.ttt_conv.weight": "d 1 taps"}, SAME),)
FAST_PROJECTION = (Entry("mlp.ttt_proj.weight", {"mlp.ttt_proj.weight": "d d"}, SAME),)
MODEL = (
    Entry("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "words d"}, VOCABULARY),
    Entry("decoder.final_layernorm.weight", {"model.norm.weight": "d"}, SAME),
)
UNTIED = (Entry("output_layer.weight", {"lm_head.weight": "words d"}, VOCABULARY),)


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

    def row(entry: Entry, here: str = "", there: str = "") -> Row:
        shapes = {name: tuple(sizes[size] for size in letters.split()) for name, letters in entry.theirs.items()}
        return Row(here + entry.ours, {there + name: shape for name, shape in shapes.items()}, entry.mapping)

    rows = [row(entry) for entry in MODEL + (() if model.tie_word_embeddings else UNTIED)]
    fast_layers = ttt_layers(ttt, model.num_layers)
    for layer in range(model.num_layers):
        used = LAYER + family_of(model).rows
        if layer in fast_layers:
            used = used + FAST + (FAST_PROJECTION if ttt.project else ())
        rows += [row(entry, f"decoder.layers.{layer}.", f"model.layers.{layer}.") for entry in used]
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
