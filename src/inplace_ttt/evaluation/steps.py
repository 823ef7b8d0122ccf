"""Run greedy decode steps of a batch, one token per row and step, replayed from one CUDA graph.

For a small model, launching a step takes longer on the host than running it on the GPU. A graph needs fixed addresses
and shapes, so KV cache and mask are allocated at their final size, and the position of the next token is a device
tensor.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from inplace_ttt.hf import modeling_inplace_ttt as exported

ROUND = 64  # the cache length is a multiple of this many tokens, because GEMMs with odd sizes are slow


class SharedCache:
    """Hold KV caches and fast weights of separately prefilled prompts as one batch, with space for answers."""

    def __init__(self, like: DynamicCache, rows: int, width: int, room: int):
        """Allocate the caches.

        Args:
            like: cache of one prompt, for shapes, dtype and device.
            rows: number of prompts.
            width: tokens of the longest prompt.
            room: maximum tokens of an answer.
        """
        self.place = torch.tensor([width], device=like.layers[0].keys.device)  # index of the next token in the cache
        self.layers = [Layer(layer, rows, width, room, self.place) for layer in like.layers]
        self.fast_weights: list[exported.FastWeights] = []

    def put(self, number: int, cache: DynamicCache) -> None:
        """Copy the cache of a prompt into row ``number``. Call it for all prompts in order."""
        for layer, own in zip(self.layers, cache.layers, strict=True):
            layer.put(number, own)
        if isinstance(cache, exported.FastWeightCache):
            self.fast_weights.append(cache.fast_weights)

    def finished(self, network: PreTrainedModel) -> DynamicCache:
        """Return the cache for a forward pass of all rows."""
        cache = empty_cache(network)
        cache.layers, cache.place = self.layers, self.place
        if self.fast_weights:
            cache.fast_weights = exported.FastWeights.join(self.fast_weights)
            cache.fast_weights.static = True  # a CUDA graph needs fixed addresses
        return cache


class Layer(DynamicLayer):
    """Hold the KV cache of one layer at its final size; ``update`` returns all of it, a mask hides unused entries."""

    def __init__(self, like: DynamicLayer, rows: int, width: int, room: int, place: Tensor):
        super().__init__()
        _, heads, _, size = like.keys.shape
        length = -(-(width + room) // ROUND) * ROUND
        self.width, self.place = width, place
        self.keys = like.keys.new_zeros(rows, heads, length, size)
        self.values = like.values.new_zeros(rows, heads, length, like.values.shape[-1])
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True

    def put(self, number: int, own: DynamicLayer) -> None:
        """Copy keys and values of a prompt, (1, heads, t, size), into row ``number``; they end at column ``width``."""
        start = self.width - own.keys.shape[-2]
        self.keys[number, :, start : self.width] = own.keys[0]
        self.values[number, :, start : self.width] = own.values[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store keys and values of one token per row, (rows, heads, 1, size), at the index ``place``.

        Returns all keys and values, (rows, heads, length, size), with entries that are not used yet.
        """
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the length of the prompts. Steps pass their positions, and a graph could not count on the host."""
        return self.width


def empty_cache(network: PreTrainedModel) -> DynamicCache:
    """Return an empty cache of the type that the model needs: with fast weights if it has them."""
    fast = bool(getattr(network, "fast_mlps", None))
    return exported.FastWeightCache(config=network.config) if fast else DynamicCache(config=network.config)


class GreedySteps:
    """Decode the answers of a batch step by step into ``written`` (rows, new tokens); ``count`` tokens are done."""

    def __init__(self, network: PreTrainedModel, cache: DynamicCache, first: Tensor, lengths: Tensor, new_tokens: int):
        """Allocate the buffers.

        Args:
            cache: from ``SharedCache.finished``.
            first: (rows,) first token ID of each answer.
            lengths: (rows,) tokens of each prompt.
            new_tokens: maximum tokens of an answer.
        """
        self.network, self.cache, self.new_tokens, self.count = network, cache, new_tokens, 1
        self.written = first.new_zeros(len(first), new_tokens)
        self.written[:, 0] = first
        self.token, self.positions, self.next = first.clone(), lengths.clone(), torch.ones_like(cache.place)
        layer = cache.layers[0]
        place = torch.arange(layer.keys.shape[2], device=first.device)
        # (rows, 1, 1, cache length) bool: each row attends to its own prompt, to the right of the padding
        self.mask = ((place >= (layer.width - lengths)[:, None]) & (place < layer.width))[:, None, None]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.records = first.is_cuda

    def take(self) -> None:
        """Run one decode step."""
        if self.records and self.graph is None and self.count > 1:  # the first step is the warm-up for the graph
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
        except RuntimeError:  # models that read values on the host, such as mixture of experts, cannot be captured
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
