"""RMSNorm for layers without Transformer Engine."""

import torch


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's interface; unlike its own wrapper of torch's norms it knows sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps)
        # under sequence parallelism each rank sees some of the tokens: Megatron sums such gradients over the group
        self.weight.sequence_parallel = config.sequence_parallel
