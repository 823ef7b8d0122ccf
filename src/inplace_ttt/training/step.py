"""One training step and one evaluation over Megatron's pipeline schedule, and what they measure."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from inplace_ttt.config import Config
from inplace_ttt.data.batch import MicroBatch


@dataclass
class Totals:
    """Sums over the tokens of a step on all ranks."""

    loss: float
    tokens: float  # that count in the loss
    correct: float  # of them predicted right; only evaluation counts them

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens if self.tokens else float("nan")


def _loss_sums(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What Megatron wants of a loss: the sum over tokens, how many there were, and what to report.

    Tokens that do not count are left out by selection, not by a product: their loss may be anything.
    """
    total = torch.where(mask > 0, losses * mask, 0.0).sum()
    count = mask.sum()
    return total, count.int(), {"sums": torch.stack([total.detach(), count])}


class Stepper:
    """Runs the model forward, or forward and backward, over the micro batches of a step."""

    def __init__(self, config: Config, model, megatron_config, pg_collection):
        self.config, self.model, self.groups = config, model, pg_collection
        megatron_config.finalize_model_grads_func = finalize_model_grads
        self.run = get_forward_backward_func(pp_size=pg_collection.pp.size(), vp_size=None)

    def forward(self, batches: Iterator[MicroBatch], count: int, backward: bool) -> Totals:
        """``count`` micro batches; with ``backward`` the gradients of the mean loss per token are left in place."""
        reports = self.run(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=count,
            forward_only=not backward,
            **self._shapes(),
        )
        return self.total(reports)

    def total(self, reports: list[dict[str, Tensor]]) -> Totals:
        """Sum over micro batches and over ranks; only the last pipeline stage knows a loss, and tells the others."""
        sums = torch.zeros(2, dtype=torch.float64)
        for report in reports:
            sums += report["sums"].double().cpu()
        sums = sums.to(next(self.model.parameters()).device)
        dist.all_reduce(sums, group=self.groups.dp_cp)
        if self.groups.pp.size() > 1:
            dist.broadcast(sums, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=self.groups.pp)
        loss, tokens = sums.tolist()
        return Totals(loss, tokens, 0.0)

    def _shapes(self) -> dict:
        """What pipeline stages send each other: Megatron divides the length by the ranks that split it."""
        data, rows = self.config.data, self.config.train.micro_batch_size
        shapes = dict(seq_length=data.seq_length, micro_batch_size=rows)
        if data.reset_at_documents:  # samples lie one after the other in one row
            shapes = dict(seq_length=data.seq_length * rows, micro_batch_size=1)
        if self.groups.pp.size() > 1 and _unwrap(self.model).carries_input_embed:
            shapes["adjust_tensor_shapes_fn"] = _twice_as_wide
        return shapes


def _forward_step(batches: Iterator[MicroBatch], model):
    batch = next(batches)
    losses = model(batch.tokens, batch.position_ids, batch.layout, labels=batch.labels)
    return losses, partial(_loss_sums, batch.loss_mask)


def _twice_as_wide(receive, send):
    """Hidden states travel with the embedding output beside them."""
    return tuple([(s, b, 2 * h) for s, b, h in shapes] for shapes in (receive, send))


def _unwrap(model):
    while hasattr(model, "module"):
        model = model.module
    return model
