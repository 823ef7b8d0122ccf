"""Compute attention by Transformer Engine where it supports the case, and by DocumentAttention otherwise.

With context parallelism Transformer Engine cuts packed sequences per document. This project cuts the whole sequence, so
that chunks stay whole. Packed samples and sliding windows with context parallelism therefore gather keys and values.
The queries of a slice and the keys they attend to are then sequences of different lengths with a common end, which
Transformer Engine supports (bottom-right causal mask). fp32 has no fused kernel and uses DocumentAttention.
"""

import itertools

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from inplace_ttt.megatron.attention import DocumentAttention
from inplace_ttt.megatron.batch_context import BatchContext
from inplace_ttt.megatron.query_spans import query_runs
from inplace_ttt.megatron.recompute import recomputed


class TEDocumentAttention(DocumentAttention):
    """Compute the core attention of a Megatron layer with Transformer Engine; see DocumentAttention for shapes."""

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
        tp_size = kwargs["pg_collection"].tp.size()
        self.of_documents = DotProductAttention(
            config.num_attention_heads // tp_size,
            config.kv_channels,
            num_gqa_groups=config.num_query_groups // tp_size,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            window_size=None if self.window is None else (self.window - 1, 0),
            softmax_scale=self.scale,
            layer_number=layer_number,
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: BatchContext | None) -> Tensor:
        """Compute ``DocumentAttention.attend`` with Transformer Engine.

        Left to DocumentAttention: fp32, and several rows whose keys must be gathered (documents or a sliding window
        with context parallelism).
        """
        documents = context.documents if context is not None else None
        rows, split = query.shape[1], self.cp_group.size() > 1
        gathered = split and (documents is not None or self.window is not None)
        if query.dtype == torch.float32 or (gathered and rows > 1):
            return super().attend(query, key, value, context)
        if gathered:
            return self._with_gathered_keys(query, key, value, context)
        if documents is None:
            return self.fused(query, key, value, None, AttnMaskType.causal)
        tokens = [t.squeeze(1) for t in (query, key, value)]  # a packed micro batch has one row
        out = self.fused(*tokens, None, AttnMaskType.causal, packed_seq_params=_packed(context, query.device))
        return out.reshape(query.shape[0], 1, -1)

    def _with_gathered_keys(self, query: Tensor, key: Tensor, value: Tensor, context: BatchContext) -> Tensor:
        key, value = self.gather(key), self.gather(value)
        outputs = []
        for number, run in enumerate(
            query_runs(key.shape[0], context.documents, self.cp_group.size(), self.cp_group.rank())
        ):
            local, keys = (
                slice(getattr(run[0], name).start, getattr(run[-1], name).stop) for name in ("local", "keys")
            )
            bounds = {}
            for name in ("local", "keys"):
                lengths = [getattr(span, name).stop - getattr(span, name).start for span in run]
                cumulated = list(itertools.accumulate(lengths, initial=0))
                on_device = context.table(
                    (name, number), lambda c=cumulated: torch.tensor(c, dtype=torch.int32), query.device
                )
                bounds[name] = on_device, max(lengths)
            # Transformer Engine needs storage_offset() == 0
            outputs.append(
                self.of_documents(
                    recomputed(torch.clone, query[local, 0]),
                    key[keys, 0].clone(),
                    value[keys, 0].clone(),
                    cu_seqlens_q=bounds["local"][0],
                    cu_seqlens_kv=bounds["keys"][0],
                    max_seqlen_q=bounds["local"][1],
                    max_seqlen_kv=bounds["keys"][1],
                )
            )
        return torch.cat(outputs)[:, None]


def _packed(context: BatchContext, device: torch.device) -> PackedSeqParams:
    bounds = context.table("cu_seqlens", lambda: context.layout.cu_seqlens, device)
    longest = max(b - a for a, b in itertools.pairwise(context.documents))
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
