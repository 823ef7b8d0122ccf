"""Compute the vocabulary-parallel cross-entropy without ever holding the logits of all tokens.

Logits are computed for a block of tokens at a time. In training their gradients are computed from them at once, while
they are in memory: the gradient of a sum of losses needs nothing of what follows but one factor, by which the backward
multiplies. The logits are computed once, where a backward of its own would compute them again.
"""

import sys

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from inplace_ttt.megatron import kernels


def default_part_numel(device: torch.device) -> int:
    """Return the number of fp32 logits in one block: 256 MB, or 1 GB on a GPU, where small products are slow."""
    return 2**28 if device.type == "cuda" else 2**26


def linear_cross_entropy(
    hidden: Tensor,  # (s, b, h); with sequence parallelism (s / TP, b, h), this rank's tokens
    weight: Tensor,  # (padded vocabulary / TP, h)
    labels: Tensor,  # (b, s)
    counts: Tensor | None = None,  # (b, s) bool: whether a token counts in the sum; None: all do
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    sequence_parallel: bool,
    part_numel: int | None = None,  # logits in one block; None: default_part_numel
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of losses, and the loss and the correctness of each token.

    The loss of a token is -log softmax(hidden W^T)[label]. It is correct (1, else 0) if the label has the highest
    logit. Vocabulary entries from ``vocab_size`` on are padding and are ignored.

    Returns:
        (), (b, s), (b, s), all fp32. Only the sum, of the losses of the tokens that count, has a gradient.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    s, b, h = hidden.shape
    counts = torch.ones_like(labels, dtype=torch.bool) if counts is None else counts
    total, losses, correct = _LinearCrossEntropy.apply(
        hidden.reshape(s * b, h),
        weight,
        labels.t().reshape(s * b),
        counts.t().reshape(s * b),
        vocab_size,
        tp_group,
        part_numel or default_part_numel(hidden.device),
        torch.is_grad_enabled(),
    )
    return total, losses.view(s, b).t(), correct.view(s, b).t()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, counts, vocab_size, group, part_numel, trains):
        """Return the sum of losses, the losses and the correctness; computes the gradients of the sum if ``trains``.

        Args:
            hidden: (tokens, h).
            weight: (padded vocabulary / TP, h).
            labels: (tokens,) token IDs.
            counts: (tokens,) bool.
            vocab_size: vocabulary entries without padding.
            group: tensor-parallel group.
            part_numel: logits in one block.
        """
        first = group.rank() * weight.shape[0]
        here = max(0, min(weight.shape[0], vocab_size - first))  # vocabulary entries of this rank without padding
        mine = (labels >= first) & (labels < first + here)
        column = torch.where(mine, labels - first, 0)
        rows = max(1, part_numel // weight.shape[0])
        parts = _kernels(hidden)

        losses, correct = (torch.empty(labels.shape, dtype=torch.float32, device=hidden.device) for _ in range(2))
        dhidden = torch.empty_like(hidden) if trains else None
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if trains else None
        for start in range(0, labels.shape[0], rows):
            tokens = slice(start, start + rows)
            logits = _product(hidden[tokens], weight.t())
            picked = torch.where(mine[tokens], logits.gather(1, column[tokens, None]).squeeze(1), 0.0)
            best, sums = parts.best_and_sums(logits, here)
            if group.size() > 1:
                top = best.clone()
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
                both = torch.stack([sums * torch.exp(best - top), picked])
                dist.all_reduce(both, group=group)
                best, (sums, picked) = top, both
            log_sum = sums.log() + best
            losses[tokens], correct[tokens] = log_sum - picked, (picked >= best).float()
            if not trains:
                continue
            # -1: no entry of this rank
            own = torch.where(mine[tokens], column[tokens], -1)
            dlogits = parts.logit_gradients(logits, log_sum, own, counts[tokens], here, hidden.dtype)
            del logits
            torch.mm(dlogits, weight, out=dhidden[tokens])
            _add_product(dweight, dlogits.t(), hidden[tokens])
            del dlogits
        ctx.gradients = dhidden, dweight
        ctx.mark_non_differentiable(losses, correct)
        return torch.where(counts, losses, 0.0).sum(), losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _losses, _correct):
        """Return the gradients of hidden (tokens, h) and weight, given that of the sum, ().

        The gradient of hidden is that of this rank's shard of the vocabulary. The backward of the copy or gather in
        ``linear_cross_entropy`` sums it over the group. Raises RuntimeError if it has run before.
        """
        if ctx.gradients is None:
            raise RuntimeError("the backward of linear_cross_entropy has run, which freed its gradients")
        (dhidden, dweight), ctx.gradients = ctx.gradients, None
        rounded = torch.mul(dweight, grad, out=torch.empty_like(dweight, dtype=dhidden.dtype))
        return dhidden.mul_(grad), rounded, *6 * [None]


def best_and_sums(logits: Tensor, here: int) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each row, and the sum of exp(logit - largest), both (rows,) fp32.

    Args:
        logits: (rows, vocabulary / TP) fp32.
        here: number of columns that are not padding; 0: the results are -inf and 0.
    """
    logits = logits[:, :here]
    if not here:
        return logits.new_full(logits.shape[:1], -torch.inf), logits.new_zeros(logits.shape[:1])
    best = logits.amax(dim=-1)
    return best, (logits - best[:, None]).exp_().sum(dim=-1)


def logit_gradients(
    logits: Tensor, log_sum: Tensor, label: Tensor, counts: Tensor, here: int, dtype: torch.dtype
) -> Tensor:
    """Return softmax - one-hot of the rows that count, else 0: (rows, vocabulary / TP). May overwrite ``logits``.

    Args:
        logits: (rows, vocabulary / TP) fp32.
        log_sum: (rows,) fp32, log of the sum of exp over the whole vocabulary.
        label: (rows,) column of the label, or -1 if another rank has it.
        counts: (rows,) bool.
        here: number of columns that are not padding. The gradient of padding is 0.
    """
    gradients = logits.sub_(log_sum[:, None]).exp_()
    gradients[:, here:] = 0.0
    gradients.scatter_add_(1, label.clamp(min=0)[:, None], -(label >= 0).float()[:, None])
    return torch.where(counts[:, None], gradients, 0.0).to(dtype)


def _kernels(hidden: Tensor):
    """Return the module that provides the two functions above for the device: kernels.loss or this one."""
    if kernels.fits(hidden):
        from inplace_ttt.megatron.kernels import loss

        return loss
    return sys.modules[__name__]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a matrix product in fp32, on a GPU without rounding to the dtype of the operands first."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a matrix product to ``total`` (fp32) in place, on a GPU in the product's own kernel."""
    if a.is_cuda and a.dtype.itemsize == 2:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
