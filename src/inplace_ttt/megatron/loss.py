"""Vocabulary-parallel cross-entropy that never holds the logits of all tokens.

Logits are computed for a block of tokens at a time: in the forward for the log-sum-exp, and again in the backward for
the softmax. Memory is that of one block; the cost is one additional matrix product.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable


def default_part_numel(device: torch.device) -> int:
    """Return the number of fp32 logits in one block: 256 MB, or 1 GB on a GPU, where small products are slow."""
    return 2**28 if device.type == "cuda" else 2**26


def linear_cross_entropy(
    hidden: Tensor,  # (s, b, h); with sequence parallelism (s / TP, b, h), this rank's tokens
    weight: Tensor,  # (padded vocabulary / TP, h)
    labels: Tensor,  # (b, s)
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    sequence_parallel: bool,
    part_numel: int | None = None,  # logits in one block; None: default_part_numel
) -> Tensor:  # (2, b, s) fp32
    """Return for each token -log softmax(hidden W^T)[label], and 1 if the label has the highest logit, else 0.

    Vocabulary entries from ``vocab_size`` on are padding and are ignored.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    s, b, h = hidden.shape
    loss, correct = _LinearCrossEntropy.apply(
        hidden.reshape(s * b, h),
        weight,
        labels.t().reshape(s * b),
        vocab_size,
        tp_group,
        part_numel or default_part_numel(hidden.device),
    )
    return torch.stack([loss.view(s, b).t(), correct.view(s, b).t()])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, group, part_numel):
        """Return the loss and whether the label has the highest logit (1 or 0), both (tokens,) fp32.

        Args:
            hidden: (tokens, h).
            weight: (padded vocabulary / TP, h).
            labels: (tokens,) token IDs.
            vocab_size: vocabulary entries without padding.
            group: tensor-parallel group.
            part_numel: logits in one block.
        """
        first = group.rank() * weight.shape[0]
        here = min(weight.shape[0], vocab_size - first)  # vocabulary entries of this rank without padding
        mine = (labels >= first) & (labels < first + here)
        column = torch.where(mine, labels - first, 0)
        rows = max(1, part_numel // weight.shape[0])

        log_sum, picked, best = (torch.empty(labels.shape, dtype=torch.float32, device=hidden.device) for _ in range(3))
        for start in range(0, labels.shape[0], rows):
            tokens = slice(start, start + rows)
            logits = _logits(hidden[tokens], weight, here)
            picked[tokens] = logits.gather(1, column[tokens, None]).squeeze(1) if here > 0 else 0.0
            best[tokens] = logits.amax(dim=-1)
            # exp in place: torch.logsumexp would hold a second copy of the logits
            shift = best[tokens, None].clamp(min=-torch.finfo(torch.float32).max)  # all padding: -inf - -inf is NaN
            log_sum[tokens] = logits.sub_(shift).exp_().sum(dim=-1).log_().add_(shift.squeeze(1))
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
        """Return the gradients of hidden (tokens, h) and weight, given the gradient of the loss, (tokens,).

        The gradient of hidden is that of this rank's shard of the vocabulary. The backward of the copy or gather in
        ``linear_cross_entropy`` sums it over the group.
        """
        hidden, weight, column, mine, log_sum = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, grad.shape[0], ctx.rows):
            tokens = slice(start, start + ctx.rows)
            softmax = _logits(hidden[tokens], weight, ctx.here).sub_(log_sum[tokens, None]).exp_()
            if ctx.here > 0:
                softmax.scatter_add_(1, column[tokens, None], -mine[tokens, None].float())
            dlogits = softmax.mul_(grad[tokens, None]).to(hidden.dtype)
            del softmax
            dhidden[tokens] = dlogits @ weight
            dweight += _product(dlogits.t(), hidden[tokens])
        return dhidden, dweight.to(weight.dtype), None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, here: int) -> Tensor:
    """Return fp32 logits (tokens, vocabulary / TP), -inf for padding entries."""
    logits = _product(hidden, weight.t())
    if here < weight.shape[0]:
        logits[:, max(here, 0) :] = -torch.inf
    return logits


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a matrix product in fp32, on a GPU without rounding to the dtype of the operands first."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()
