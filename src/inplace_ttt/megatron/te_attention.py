"""Transformer Engine's attention where it can do what is asked, document attention where it cannot.

Transformer Engine cuts packed sequences per document under context parallelism, and this project cuts the whole
sequence, so that chunks stay whole: packed samples with context parallelism gather keys and values instead, and so
do sliding windows. fp32 has no fused kernel.
"""

import itertools

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from inplace_ttt.megatron.attention import DocumentAttention
from inplace_ttt.megatron.layout import SequenceLayout


class TEDocumentAttention(DocumentAttention):
    """Core attention of a Megatron layer; see DocumentAttention for shapes."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **kwargs):
        super().__init__(config, layer_number, attn_mask_type, attention_type, **kwargs)
        self.fused = TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            softmax_scale=kwargs.get("softmax_scale"),
            cp_comm_type=kwargs.get("cp_comm_type"),
            pg_collection=kwargs["pg_collection"],
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout | None) -> Tensor:
        documents = layout.documents if layout is not None else None
        split = self.cp_group.size() > 1
        if query.dtype == torch.float32 or (split and (documents is not None or self.window is not None)):
            return super().attend(query, key, value, layout)
        if documents is None:
            return self.fused(query, key, value, None, AttnMaskType.causal)
        tokens = [t.squeeze(1) for t in (query, key, value)]  # a packed micro batch is one row
        out = self.fused(*tokens, None, AttnMaskType.causal, packed_seq_params=_packed(layout, query.device))
        return out.reshape(query.shape[0], 1, -1)


def _packed(layout: SequenceLayout, device: torch.device) -> PackedSeqParams:
    bounds = layout.on_device("cu_seqlens", lambda: layout.cu_seqlens, device)
    longest = max(b - a for a, b in itertools.pairwise(layout.documents))
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
