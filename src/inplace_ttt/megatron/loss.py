"""Cross-entropy of a vocabulary that is split over ranks, without ever holding the logits of all tokens.

Logits are made for some tokens at a time, in the forward for their log-sum-exp and again in the backward for their
softmax: memory is that of one part, for one matrix product more.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time, in numbers of fp32: 256 MB
PART_NUMEL = 2**26


def linear_cross_entropy(
    hidden: Tensor,  # (s, b, h); with sequence parallelism this rank's tokens
    weight: Tensor,  # (padded vocabulary / TP, h)
    labels: Tensor,  # (b, s)
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    sequence_parallel: bool,
    part_numel: int = PART_NUMEL,
) -> Tensor:  # (2, b, s) fp32
    """-log softmax(hidden W^T)[label] of each token, and 1 where no entry is likelier than the label, else 0.

    Entries of the vocabulary from ``vocab_size`` on are padding and take no part.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    s, b, h = hidden.shape
    loss, correct = _LinearCrossEntropy.apply(
        hidden.reshape(s * b, h), weight, labels.t().reshape(s * b), vocab_size, tp_group, part_numel
    )
    return torch.stack([loss.view(s, b).t(), correct.view(s, b).t()])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, group, part_numel):
        first = group.rank() * weight.shape[0]
        here = min(weight.shape[0], vocab_size - first)  # entries of this rank that are not padding
        mine = (labels >= first) & (labels < first + here)
        column = torch.where(mine, labels - first, 0)
        rows = max(1, part_numel // weight.shape[0])

        log_sum, picked, best = (torch.empty(labels.shape, dtype=torch.float32, device=hidden.device) for _ in range(3))
        for start in range(0, labels.shape[0], rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, here)
            log_sum[part] = torch.logsumexp(logits, dim=-1)
            best[part] = logits.amax(dim=-1)
            picked[part] = logits.gather(1, column[part, None]).squeeze(1) if here > 0 else 0.0
        picked = torch.where(mine, picked, 0.0)
        if group.size() > 1:
            top = log_sum.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            total = torch.exp(log_sum - top)
            dist.all_reduce(total, group=group)
            dist.all_reduce(picked, group=group)
            dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
            log_sum = total.log_().add_(top)
        ctx.save_for_backward(hidden, weight, column, mine, log_sum)
        ctx.here, ctx.rows = here, rows
        correct = (picked >= best).float()
        ctx.mark_non_differentiable(correct)
        return log_sum - picked, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, column, mine, log_sum = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, grad.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            softmax = _logits(hidden[part], weight, ctx.here).sub_(log_sum[part, None]).exp_()
            if ctx.here > 0:
                softmax.scatter_add_(1, column[part, None], -mine[part, None].float())
            dlogits = softmax.mul_(grad[part, None]).to(hidden.dtype)
            dhidden[part] = dlogits @ weight
            dweight += dlogits.t() @ hidden[part]
        return dhidden, dweight.to(weight.dtype), None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, here: int) -> Tensor:
    """(tokens, vocabulary / TP) fp32, -inf where the vocabulary is padding."""
    logits = (hidden @ weight.t()).float()
    if here < weight.shape[0]:
        logits[:, max(here, 0) :] = -torch.inf
    return logits
