"""Replace softmax attention by Gated DeltaNet (arXiv 2412.06464): Megatron-core's module, for packed documents.

It is a baseline for models that are trained from scratch (``model.attention=gated_delta_net``). Its kernels are those
of fla-core. On a CPU, Megatron's torch code for deterministic runs is used.
"""

import copy
import itertools
import warnings

import torch
from megatron.core.packed_seq_params import PackedSeqParams

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Triton is not supported")  # fla-core, on a CPU
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from inplace_ttt.megatron.batch_context import BatchContext

__all__ = ["DocumentDeltaNet", "GatedDeltaNetSubmodules", "initial_decay"]


def _torch_rule(q: Tensor, k: Tensor, *args, **keys) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule in torch, with queries and keys of norm 1, (b, s, heads, channels)."""
    q, k = (one * torch.rsqrt(one.square().sum(-1, keepdim=True) + 1e-6) for one in (q, k))
    return torch_chunk_gated_delta_rule(q, k, *args, **keys)


class DocumentDeltaNet(GatedDeltaNet):
    """Run Megatron-core's Gated DeltaNet, whose state starts anew at each document."""

    def __init__(self, config, submodules, layer_number, *, pg_collection, name=None, **_):
        self.on_gpu = torch.cuda.is_available()
        if not self.on_gpu:  # fla-core's kernels need a GPU
            config = copy.copy(config)
            config.deterministic_mode = True
        super().__init__(
            config, submodules, layer_number, use_qk_l2norm=self.on_gpu, pg_collection=pg_collection, name=name
        )
        if not self.on_gpu:
            self.gated_delta_rule = _torch_rule

    def forward(
        self, hidden_states: Tensor, attention_mask=None, packed_seq_params: BatchContext | None = None, **_
    ) -> tuple[Tensor, None]:
        """Return the output (s, b, d) for hidden states of the same shape, and None for Megatron's bias."""
        bounds = None if packed_seq_params is None else packed_seq_params.documents
        if self.on_gpu:
            packed = None
            if bounds is not None:
                lengths = packed_seq_params.table(
                    "delta_net", lambda: torch.tensor(bounds, dtype=torch.int32), hidden_states.device
                )
                packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
            return super().forward(hidden_states, None, packed_seq_params=packed)[0], None
        with torch.compiler.set_stance("force_eager"):  # Megatron compiles parts of it
            parts = [
                super(DocumentDeltaNet, self).forward(hidden_states[start:stop], None)[0]
                for start, stop in itertools.pairwise(bounds or (0, len(hidden_states)))
                if stop > start
            ]
        return torch.cat(parts), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, tp_group=None) -> dict:
        """Return the entries for Megatron's checkpoint; see MegatronModule for the arguments.

        Each parameter is one tensor: tensor parallelism, for which Megatron splits them by their parts, is rejected.
        """
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)


def initial_decay(shape: tuple[int, ...], name: str, generator: torch.Generator) -> Tensor:
    """Return initial values of the decay's parameters, as Mamba 2 and Gated DeltaNet use them.

    ``A_log``: log of U(1, 16). ``dt_bias``: the inverse softplus of a step that is log-uniform in 0.001 to 0.1.
    """
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("A_log"):
        return (1 + 15 * uniform).log()
    step = 0.001 * 100**uniform
    return step + torch.log(-torch.expm1(-step))
