"""Run training and evaluation steps with Megatron's pipeline schedule, and sum their losses."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
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
from inplace_ttt.data.position import PositionRanges
from inplace_ttt.megatron.model import TTTGPTModel

Pairs = tuple[tuple[float, float], ...]


def _added(some: Pairs, others: Pairs) -> Pairs:
    pairs = itertools.zip_longest(some, others, fillvalue=(0.0, 0.0))
    return tuple((loss + more_loss, tokens + more_tokens) for (loss, tokens), (more_loss, more_tokens) in pairs)


@dataclass
class Totals:
    """Hold sums over the tokens that count in the loss, over all micro batches and ranks."""

    loss: float = 0.0
    tokens: float = 0.0
    correct: float = 0.0  # number of tokens whose label has the highest logit
    by_position: Pairs = ()  # (loss, tokens) of each position range; empty if not requested
    by_source: Pairs = ()  # (loss, tokens) of each data source; empty if not requested

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.loss + other.loss,
            self.tokens + other.tokens,
            self.correct + other.correct,
            _added(self.by_position, other.by_position),
            _added(self.by_source, other.by_source),
        )

    @property
    def mean_loss(self) -> float:
        """Return the mean loss in nats per token."""
        return self.loss / self.tokens if self.tokens else 0.0

    @property
    def accuracy(self) -> float:
        """Return the fraction of tokens whose label has the highest logit."""
        return self.correct / self.tokens if self.tokens else 0.0


class Stepper:
    """Run the model forward, or forward and backward, over the micro batches of a step."""

    def __init__(self, config: Config, model, megatron_config, pg_collection):
        self.config, self.model, self.groups = config, model, pg_collection
        megatron_config.finalize_model_grads_func = finalize_model_grads
        self.run = get_forward_backward_func(pp_size=pg_collection.pp.size(), vp_size=None)

    def train(self, batches: Iterator[MicroBatch], count: int) -> Totals:
        """Run forward and backward over ``count`` micro batches (collective).

        The gradient buffers then hold the gradient of the mean loss per token over all ranks.
        """
        self.model.zero_grad_buffer()
        return self._forward(batches, count, forward_only=False)

    def evaluate(
        self,
        batches: Iterator[MicroBatch],
        count: int,
        ranges: PositionRanges | None = None,
        *,
        sources: int = 0,
        fast_weights: bool = True,
    ) -> Totals:
        """Return loss and number of correct predictions over ``count`` micro batches, without gradients (collective).

        Args:
            ranges: position ranges whose losses are summed separately; None: none.
            sources: number of data sources whose losses are summed separately; 0: none.
            fast_weights: False: TTT layers run as plain MLPs.
        """
        with self._evaluating(fast_weights):
            return self._forward(batches, count, forward_only=True, ranges=ranges, sources=sources)

    def range_losses(
        self, batches: Sequence[MicroBatch], ranges: Sequence[PositionRanges], *, fast_weights: bool = True
    ) -> list[list[list[float]]]:
        """Return [loss, tokens] of each position range of each micro batch of this data-parallel rank.

        All tensor-, pipeline- and context-parallel ranks return the same. All micro batches must have equally many
        ranges.
        """
        with self._evaluating(fast_weights):
            reports = self._run(iter(batches), len(batches), iter(ranges), forward_only=True)
        shape = len(batches), 3 + 2 * len(ranges[0])
        sums = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for row, report in enumerate(reports):
            sums[row] = report["sums"]
        if self.groups.cp.size() > 1:
            dist.all_reduce(sums, group=self.groups.cp)
        self._tell_stages(sums)
        return [list(map(list, itertools.batched(row[3:], 2))) for row in sums.tolist()]

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def _evaluating(self, fast_weights: bool) -> Iterator[None]:
        modules, was_training = unwrap(self.model).ttt_modules.values(), self.model.training
        self.model.eval()
        for module in modules:
            module.is_plain = not fast_weights
        with torch.no_grad():
            yield
        for module in modules:
            module.is_plain = False
        self.model.train(was_training)

    def _run(
        self,
        batches: Iterator[MicroBatch],
        count: int,
        ranges: Iterator[PositionRanges | None],
        forward_only: bool,
        sources: int = 0,
    ) -> list[dict[str, Tensor]]:
        """Return the reports of all micro batches on the last pipeline stage, and [] on other stages."""
        return self.run(
            forward_step_func=partial(_forward_step, ranges=ranges, sources=sources),
            data_iterator=batches,
            model=[self.model],
            num_microbatches=count,
            forward_only=forward_only,
            **self._shapes(),
        )

    def _tell_stages(self, sums: Tensor) -> None:
        """Broadcast sums from the last pipeline stage to the other stages, in place."""
        if self.groups.pp.size() > 1:
            dist.broadcast(sums, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=self.groups.pp)

    def _forward(
        self,
        batches: Iterator[MicroBatch],
        count: int,
        forward_only: bool,
        ranges: PositionRanges | None = None,
        sources: int = 0,
    ) -> Totals:
        reports = self._run(batches, count, itertools.repeat(ranges), forward_only, sources)
        positions = len(ranges) if ranges else 0
        sums = torch.zeros(3 + 2 * (positions + sources), dtype=torch.float64, device=self.device)
        for report in reports:
            sums += report["sums"]
        dist.all_reduce(sums, group=self.groups.dp_cp)
        self._tell_stages(sums)
        loss, tokens, correct, *rest = sums.tolist()
        pairs = tuple(itertools.batched(rest, 2))
        return Totals(loss, tokens, correct, pairs[:positions], pairs[positions:])

    def _shapes(self) -> dict:
        """Return the shapes that pipeline stages send. Megatron divides the length by the ranks that split it."""
        data, rows = self.config.data, self.config.train.micro_batch_size
        shapes = dict(seq_length=data.seq_length, micro_batch_size=rows)
        if data.reset_at_documents:  # samples are packed into one row
            shapes = dict(seq_length=data.seq_length * rows, micro_batch_size=1)
        if self.groups.pp.size() > 1 and unwrap(self.model).carries_input_embed:
            shapes["adjust_tensor_shapes_fn"] = _twice_as_wide
        return shapes


def unwrap(model) -> TTTGPTModel:
    """Return the model without Megatron's wrappers for data parallelism and bf16."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _forward_step(batches: Iterator[MicroBatch], model, *, ranges: Iterator[PositionRanges | None], sources: int):
    batch = next(batches)
    counts = batch.loss_mask > 0
    out = model(batch.tokens, batch.position_ids, batch.layout, labels=batch.labels, counts=counts)
    return out, partial(_sums, batch, counts, next(ranges), sources)


def _sums(
    batch: MicroBatch,
    counts: Tensor,
    ranges: PositionRanges | None,
    sources: int,
    out: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what Megatron expects of a loss function: sum over tokens, number of tokens, and values to report.

    Tokens that do not count are masked by selection, not by a product, because their loss may be NaN.
    """
    total, losses, correct = out
    tokens = counts.sum()
    right = torch.where(counts, correct, 0.0).sum()
    sums = torch.stack([total.detach().double(), tokens.double(), right.double()])
    if ranges is not None:
        sums = torch.cat([sums, ranges.sums(batch.position_ids, losses, counts).flatten()])
    for number in range(sources):
        own = counts & (batch.sources == number)
        sums = torch.cat([sums, torch.stack([losses[own].double().sum(), own.sum().double()])])
    return total, tokens.int(), {"sums": sums}


def _twice_as_wide(receive, send):
    """Double the hidden size of all shapes, because the embedding output is sent together with the hidden states."""
    return tuple([(s, b, 2 * h) for s, b, h in shapes] for shapes in (receive, send))
