"""Provide RMSNorm for layers without Transformer Engine."""

import torch


class RMSNorm(torch.nn.RMSNorm):
    """Provide torch's RMSNorm with Megatron's interface and, unlike Megatron's wrapper, with sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps)
        # with sequence parallelism each rank processes some of the tokens: Megatron then sums the gradients
        self.weight.sequence_parallel = config.sequence_parallel
