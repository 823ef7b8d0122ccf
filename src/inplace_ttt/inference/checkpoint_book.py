"""Create a book (saved fast weights) from a training checkpoint, over context, tensor and pipeline parallel ranks.

The update of a document is a sum over its complete chunks. Each rank sums its own chunks, then the sums are reduced
over the ranks. With a bound (ttt/bounded.py), the rank with the last chunk has the sum. The inputs of the incomplete
last chunk are collected from the ranks that have them.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from inplace_ttt.config import ttt_layers
from inplace_ttt.evaluation.checkpoint_reader import CheckpointReader, ScoredDocument
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.hf.config import TTT_KEYS
from inplace_ttt.hf.convert import CheckpointInfo
from inplace_ttt.hf.modeling_inplace_ttt import FastWeights, LayerState, fingerprint_of_weights
from inplace_ttt.hf.weights import weight_map
from inplace_ttt.megatron.mlp import TTTMLP
from inplace_ttt.megatron.step import unwrap
from inplace_ttt.megatron.tensors import TensorReader
from inplace_ttt.ttt.layout import take_local

# by layer: sum of updates (d, f) and its limit, inputs and embeddings of the incomplete chunk (t, d)
Written = dict[int, tuple[Tensor, float, Tensor, Tensor | None]]


def read_book(reader: CheckpointReader, reading: ScoredDocument, mode: FastWeightMode) -> FastWeights | None:
    """Process a text with the model of ``reader``; return its fast weights on rank 0 and None on other ranks.

    All ranks must call it.
    """
    recorder = _Recorder(reader, len(reading.document.tokens) - 1)
    reader.read([reading], mode)
    written = recorder.finish()
    if written is None:
        return None
    chunk = reader.config.ttt.chunk_size
    book = FastWeights()
    book.counts, book.chunks = [recorder.length % chunk], [recorder.length // chunk]
    for layer, (total, limit, tail, embeds) in sorted(written.items()):
        state = book.layers[layer] = LayerState(1)
        state.limits = [limit]
        if recorder.whole:
            state.sums[0] = total
            state.round(torch.bfloat16)
        if book.counts[0]:
            state.tails[0] = tail
            if embeds is not None:
                book.embeds = book.embeds or LayerState(1)
                book.embeds.tails[0] = embeds
    return book


def fingerprint_of_checkpoint(info: CheckpointInfo) -> str:
    """Return the fingerprint of the model that this checkpoint exports to."""
    model, reader = info.config.model, TensorReader(info.folder)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for row in weight_map(model, info.config.ttt):
            yield from zip(row.hf_params, row.transform.split(model, reader.read(row.megatron_param)), strict=True)

    ttt = info.config.ttt
    settings = {theirs: getattr(ttt, ours) for theirs, ours in TTT_KEYS.items()}
    return fingerprint_of_weights(tensors(), settings | {"ttt_layers": ttt_layers(ttt, model.num_layers)})


class _Recorder:
    """Record the updates of this rank's TTT layers during a forward pass, by forward pre-hooks."""

    def __init__(self, reader: CheckpointReader, length: int):
        self.groups, self.length = reader.groups, length
        self.chunk = reader.config.ttt.chunk_size
        self.whole = length - length % self.chunk  # tokens in complete chunks
        self.written: Written = {}
        self.hooks = [
            module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer, module in unwrap(reader.model).ttt_modules.items()
        ]

    def _hook(self, layer: int):
        def look(module: TTTMLP, args: tuple, kwargs: dict) -> None:
            if layer not in self.written:  # idle ranks may process the same text again
                self.written[layer] = self._look(module, *args)

        return look

    def _look(
        self, module: TTTMLP, hidden: Tensor, embeds: Tensor | None
    ) -> tuple[Tensor, float, Tensor, Tensor | None]:
        """Return a layer's sum of updates, its limit and the inputs of the incomplete chunk.

        ``hidden``, ``embeds``: this rank's inputs (s, 1, d).
        """
        cp = self.groups.cp
        places = take_local(torch.arange(len(hidden) * cp.size()), cp.size(), cp.rank(), dim=0).to(hidden.device)
        total, limit = module.sum_of_updates(hidden, embeds, self.whole)
        dist.all_reduce(total, group=cp)
        dist.all_reduce(limit, group=cp)
        parts = [torch.empty_like(total[0]) for _ in range(self.groups.tp.size())]
        dist.all_gather(parts, total[0], group=self.groups.tp)
        used = embeds if module.ttt.target == "input_embed" else None
        tails = [None if one is None else self._tail(one, places) for one in (hidden, used)]
        return torch.cat(parts, dim=1).cpu(), limit.item(), *tails

    def _tail(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Return the incomplete chunk (t, d), collected from the local tokens (s, 1, d) of all CP ranks."""
        tail = tokens.new_zeros(self.length - self.whole, tokens.shape[-1])
        own = (places >= self.whole) & (places < self.length)
        tail[places[own] - self.whole] = tokens[own, 0]
        dist.all_reduce(tail, group=self.groups.cp)
        return tail.cpu()

    def finish(self) -> Written | None:
        """Remove the hooks; return the records of all layers on rank 0, and None on other ranks."""
        for hook in self.hooks:
            hook.remove()
        groups, found = self.groups, [self.written]
        if any(group.rank() for group in (groups.tp, groups.cp, groups.dp)):
            return None
        if groups.pp.size() > 1:
            found = [None] * groups.pp.size() if groups.pp.rank() == 0 else None
            dist.gather_object(self.written, found, dst=dist.get_global_rank(groups.pp, 0), group=groups.pp)
        if groups.pp.rank():
            return None
        return {layer: state for stage in found for layer, state in stage.items()}
