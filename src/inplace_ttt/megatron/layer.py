"""Build Megatron's layer specs of transformer layers with and without fast weights."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from inplace_ttt.config import TTT
from inplace_ttt.megatron.attention import DocumentAttention
from inplace_ttt.megatron.mlp import TTTMLP, GatedMLP
from inplace_ttt.megatron.norm import RMSNorm
from inplace_ttt.megatron.recompute import recompute_outputs, recomputing
from inplace_ttt.megatron.self_attention import DocumentSelfAttention


@dataclass(frozen=True)
class BackendModules:
    """Name the layer modules of one backend (plain torch or Transformer Engine)."""

    column_linear: Any
    row_linear: Any
    core_attention: Any


def backend_modules(transformer_impl: str) -> BackendModules:
    """Return the layer modules of a backend: ``local`` (plain torch, on any device) or ``transformer_engine``.

    Norms, the gated product and the heads of attention have kernels of this package in both.
    """
    if transformer_impl == "local":
        return BackendModules(ColumnParallelLinear, RowParallelLinear, DocumentAttention)
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    from inplace_ttt.megatron.te_attention import TEDocumentAttention

    return BackendModules(TEColumnParallelLinear, TERowParallelLinear, TEDocumentAttention)


class RecomputingLayer(TransformerLayer):
    """Extend Megatron's layer: its backward computes the chosen activations again (train.recompute_modules)."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        number = self.layer_number - 1 - get_transformer_layer_offset(config, pp_rank=self.pg_collection.pp.rank())
        self.recomputes = config.recomputed.of_layer(number)
        if "layernorm" in self.recomputes:
            for norm in (self.input_layernorm, self.pre_mlp_layernorm):
                recompute_outputs(norm)
        if "mlp" in self.recomputes:
            recompute_outputs(self.mlp.linear_fc1)
        self.mlp.recomputes_activation = "mlp_act" in self.recomputes
        if isinstance(self.self_attention, DocumentSelfAttention):
            if "qkv" in self.recomputes:
                recompute_outputs(self.self_attention.linear_qkv)
            if "rope" in self.recomputes:
                self.self_attention.recomputes_heads = True

    def forward(self, *args, **kwargs):
        """Return (hidden states, context), like Megatron's layer."""
        with recomputing(self.training and bool(self.recomputes)):
            return self._layer(*args, **kwargs)

    def _layer(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class TTTTransformerLayer(RecomputingLayer):
    """Pass the embedding output and the context of the micro batch to the MLP.

    The embedding output arrives as ``context``. A decoder without cross-attention does not use this argument, and
    Megatron passes it through every layer and, as a tracked argument, through full recompute.
    """

    def _layer(self, *args, **kwargs):
        hidden_states, context = self._forward_attention(*args, **kwargs)
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        out = self.mlp(normed, kwargs["context"], batch_context=kwargs["packed_seq_params"])
        return self._forward_post_mlp(out, hidden_states), context


# Checkpoints use the parameter names of Transformer Engine's linears with a norm inside, as Megatron's own models do.
NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def _attention_spec(parts: BackendModules, qk_layernorm: bool) -> ModuleSpec:
    return ModuleSpec(
        module=DocumentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.column_linear,
            core_attention=parts.core_attention,
            linear_proj=parts.row_linear,
            q_layernorm=RMSNorm if qk_layernorm else IdentityOp,
            k_layernorm=RMSNorm if qk_layernorm else IdentityOp,
        ),
    )


def _linear_attention_spec(parts: BackendModules) -> ModuleSpec:
    from inplace_ttt.megatron.delta_net import DocumentDeltaNet, GatedDeltaNetSubmodules

    linears = GatedDeltaNetSubmodules(in_proj=parts.column_linear, out_norm=RMSNorm, out_proj=parts.row_linear)
    return ModuleSpec(module=DocumentDeltaNet, submodules=linears)


def layer_spec(
    parts: BackendModules, qk_layernorm: bool, ttt: TTT | None, linear_attention: bool = False
) -> ModuleSpec:
    """Return the spec of one transformer layer, with a TTT-MLP unless ``ttt`` is None.

    ``linear_attention``: Gated DeltaNet in place of softmax attention.
    """
    attention = _linear_attention_spec(parts) if linear_attention else _attention_spec(parts, qk_layernorm)
    names = dict(NORM_NAMES)
    if linear_attention:
        names["input_layernorm."] = "self_attention.in_proj.layer_norm_"
    linears = MLPSubmodules(linear_fc1=parts.column_linear, linear_fc2=parts.row_linear)
    return ModuleSpec(
        module=RecomputingLayer if ttt is None else TTTTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp_builder(linears, ttt),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def _mlp_builder(linears: MLPSubmodules, ttt: TTT | None):
    if ttt is None:
        return partial(GatedMLP.as_mlp_submodule, submodules=linears)

    def build(*, config, pg_collection, is_mtp_layer=False, name=None):
        return TTTMLP(config, linears, ttt, pg_collection=pg_collection)

    return build


def block_spec(
    config, parts: BackendModules, ttt: TTT, layers: list[int], pp_rank: int, linear_attention: bool = False
):
    """Return the spec of one pipeline stage. ``layers``: indices of the TTT layers in the whole model, from 0."""
    first = get_transformer_layer_offset(config, pp_rank=pp_rank)
    specs = [
        layer_spec(parts, config.qk_layernorm, ttt if number in layers else None, linear_attention)
        for number in range(first, first + get_num_layers_to_build(config, pp_rank=pp_rank))
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
