"""Greedy steps of a batch, one token of each row at a time: a CUDA graph that is recorded once and replayed.

For a small model the host takes longer to launch a step than the GPU to do it. Keys, values and masks therefore lie in
memory of their final size, and where the next token goes is a number on the device.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from inplace_ttt.hf import modeling_inplace_ttt as exported

ROUND = 64  # tokens; products with odd sizes are slow


class SharedCache:
    """Keys, values and fast weights of several prompts, each read alone, laid side by side with room for answers."""

    def __init__(self, like: DynamicCache, rows: int, width: int, room: int):
        """Args:
        like: the cache of one prompt, for shapes.
        width: tokens of the longest prompt.
        room: tokens of an answer.
        """
        self.place = torch.tensor([width], device=like.layers[0].keys.device)  # of the next token
        self.layers = [Layer(layer, rows, width, room, self.place) for layer in like.layers]
        self.fast_weights: list[exported.FastWeights] = []

    def put(self, number: int, cache: DynamicCache) -> None:
        """Copy what a prompt has left. Prompts come in order."""
        for layer, own in zip(self.layers, cache.layers, strict=True):
            layer.put(number, own)
        if isinstance(cache, exported.FastWeightCache):
            self.fast_weights.append(cache.fast_weights)

    def finished(self, network: PreTrainedModel) -> DynamicCache:
        """Return the cache for a forward of all rows."""
        cache = empty_cache(network)
        cache.layers, cache.place = self.layers, self.place
        if self.fast_weights:
            cache.fast_weights = exported.FastWeights.join(self.fast_weights)
            cache.fast_weights.static = True  # a graph must find everything where it was
        return cache


class Layer(DynamicLayer):
    """Keys and values of one layer, all of which are handed out: a mask leaves out what is not written yet."""

    def __init__(self, like: DynamicLayer, rows: int, width: int, room: int, place: Tensor):
        super().__init__()
        _, heads, _, size = like.keys.shape
        length = -(-(width + room) // ROUND) * ROUND
        self.width, self.place, self.filled = width, place, width
        self.keys = like.keys.new_zeros(rows, heads, length, size)
        self.values = like.values.new_zeros(rows, heads, length, like.values.shape[-1])
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True

    def put(self, number: int, own: DynamicLayer) -> None:
        start = self.width - own.keys.shape[-2]
        self.keys[number, :, start : self.width] = own.keys[0]
        self.values[number, :, start : self.width] = own.values[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        self.filled += 1
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.filled


def empty_cache(network: PreTrainedModel) -> DynamicCache:
    """Return a cache of the kind that a model reads prompts with."""
    fast = bool(getattr(network, "fast_mlps", None))
    return exported.FastWeightCache(config=network.config) if fast else DynamicCache(config=network.config)


class GreedySteps:
    """Write the answers of a batch, step by step, into ``written`` (rows, new tokens), of which ``count`` are there."""

    def __init__(self, network: PreTrainedModel, cache: DynamicCache, first: Tensor, lengths: Tensor, new_tokens: int):
        """Args:
        cache: of a SharedCache.
        first: (rows,), the first token of each answer.
        lengths: (rows,), tokens of each prompt.
        """
        self.network, self.cache, self.new_tokens, self.count = network, cache, new_tokens, 1
        self.written = first.new_zeros(len(first), new_tokens)
        self.written[:, 0] = first
        self.token, self.positions, self.next = first.clone(), lengths.clone(), torch.ones_like(cache.place)
        layer = cache.layers[0]
        place = torch.arange(layer.keys.shape[2], device=first.device)
        # what each row attends to: its own prompt, on the right of the padding
        self.mask = ((place >= (layer.width - lengths)[:, None]) & (place < layer.width))[:, None, None]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.records = first.is_cuda

    def take(self) -> None:
        """Do one more step."""
        if self.records and self.graph is None and self.count > 1:  # the first step makes what a graph needs
            self._record()
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
            if isinstance(self.cache, exported.FastWeightCache):
                self.cache.fast_weights.advance()
        self.count += 1

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a model that looks at numbers on the way, as experts do
            self.records = False
        else:
            self.graph = graph

    def _step(self) -> None:
        self.mask.index_fill_(3, self.cache.place, True)
        out = self.network(
            self.token[:, None],
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(out.logits[:, -1].argmax(dim=-1))
        self.written.index_copy_(1, self.next, self.token[:, None])
        for number in (self.positions, self.cache.place, self.next):
            number.add_(1)
