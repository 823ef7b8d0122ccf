"""Run Qwen3, Qwen2.5 and Llama with In-Place Test-Time Training: MLP down-projections that are updated while reading.

This file is part of every exported folder. It needs only torch, transformers and safetensors:

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**tokenizer("Once", return_tensors="pt"))

    book = model.read(**tokenizer(text, return_tensors="pt"))      # read once ...
    book.save("book.safetensors")                                   # model.load_fast_weights("book.safetensors")
    model.generate(**question, fast_weights=book)                   # ... ask many times

In a TTT layer (arXiv 2604.06169) each document starts from ``W_down`` and is processed in chunks of ``ttt_chunk``
tokens. A chunk uses ``W_down`` plus the updates of earlier chunks. When it is complete, it adds
``ttt_lr * sum_t v_t z_t^T``. Here z is the input of the down-projection. The targets v are a convolution of the MLP's
input inside the chunk, followed by a projection.

``ttt_clip`` limits the norm of one chunk's update, relative to the norm of ``W_down``; larger updates are scaled down.
It is one number, or one per TTT layer. ``ttt_update_norms`` holds quantiles of this relative norm in training, per
layer. ``ttt_bound`` limits the sum of updates beyond the first ``ttt_trained_length`` tokens of a text: after each
chunk the sum is scaled down to at most ``ttt_bound`` times the norm that it had at that length.

Between forwards a layer stores the sum of updates of each text and the MLP inputs of its unfinished chunk. It computes
z and v from these inputs when the chunk is complete. If the package ``inplace_ttt`` is installed, its operation
processes the chunks; it has kernels for Hopper GPUs.
"""

import copy
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from inplace_ttt.ttt import ChunkTargets, FastWeightState, fast_weight_linear
except ImportError:
    fast_weight_linear = None

# argument of the cache: transformers 5.24 renamed it, and accepts the old name
CACHE = "cache" if "cache" in inspect.signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"
BOOK = "in-place-ttt fast weights 1"  # format name in files of saved fast weights
# grouped_attention splits keys into spans until it has this many products; static caches are padded to a multiple of it
KEY_BLOCK = 256
MAX_EXACT_NUMEL = 2**26  # elements of exact sums that a layer holds while it reads several texts
REAL = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# configuration keys that, with the weights, determine the updates; ttt_clip and ttt_bound may be changed later
FINGERPRINT_KEYS = ("ttt_layers", "ttt_chunk", "ttt_lr", "ttt_proj", "ttt_target", "ttt_conv_kernel")
CONTEXT_KWARG = "fast_weight_reading"  # keyword argument that passes the ForwardContext to the decoder layers


def _outside_graph(function):
    """Exclude a function with data-dependent control flow from torch.compile graphs."""
    return torch.compiler.disable(function, reason="fast weights run prefill and the start of a text outside of graphs")


def _in_graph() -> bool:
    """Return True while torch.compile traces this code or a CUDA graph captures it."""
    return torch.compiler.is_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


class LayerState:
    """Hold the state of one TTT layer for the texts of a batch.

    The state of a text is the sum of its updates (d, f) and the inputs (t, d) of its unfinished chunk. Sums are exact:
    fp32 (fp64 for fp64 models), or the model's dtype plus the remaining bits in host memory until the next chunk is
    complete. Sums and remaining bits are replaced, never modified in place, so copies may share them. For decoding,
    sums and inputs are stored in buffers of fixed shape.
    """

    def __init__(self, rows: int):
        self.sums: list[Tensor | None] = [None] * rows  # (d, f); None: no update yet, or the sum is in `update`
        self.rests: list[Tensor | None] = [None] * rows  # (d, f) remaining bits, see split_sum; None: `sums` is exact
        self.tails: list[Tensor | None] = [None] * rows  # (t, d) inputs of the unfinished chunk, t < chunk
        self.limits = [math.inf] * rows  # largest norm of the sum (ttt_bound); inf: not known yet
        self.update: Tensor | None = None  # (rows, d, f) rounded sums, in the model's dtype
        self.inputs: Tensor | None = None  # (rows, chunk, d) inputs of the unfinished chunks
        self.count: Tensor | None = None  # (rows,) tokens in `inputs`; on the device, so graphs do not fix it

    def rounded_sum_of(self, row: int) -> Tensor | None:
        """Return the sum of updates (d, f) of a text, rounded to the dtype in which it is stored."""
        return self.sums[row] if self.update is None else self.update[row]

    def sum_of(self, row: int, device: torch.device) -> Tensor | None:
        """Return the exact sum of updates (d, f) of a text on a device."""
        rounded, rest = self.rounded_sum_of(row), self.rests[row]
        if rounded is None:
            return None
        rounded = rounded.to(device)
        return _to_sum_dtype(rounded) if rest is None else join_sum(rounded, rest.to(device, non_blocking=True))

    def put_sum(self, row: int, total: Tensor) -> None:
        """Replace the sum of updates of a text by an exact one, (d, f)."""
        if self.update is None:
            self.sums[row], self.rests[row] = total, None
        elif self.update.dtype == total.dtype:
            self.update[row] = total
        else:
            rounded, rest = split_sum(total, self.update.dtype)
            self.update[row] = rounded
            kept = torch.empty(rest.shape, dtype=rest.dtype, pin_memory=rest.is_cuda)
            self.rests[row] = kept.copy_(rest, non_blocking=True)

    def tail_of(self, row: int, count: int) -> Tensor | None:
        """Return the inputs (count, d) of the unfinished chunk of a text."""
        if self.inputs is None:
            return self.tails[row]
        return self.inputs[row, :count]

    def put_tail(self, row: int, tail: Tensor | None) -> None:
        """Replace the inputs (t, d) of the unfinished chunk of a text."""
        if self.inputs is None:
            self.tails[row] = None if tail is None else tail.detach().clone()
        elif tail is not None:
            self.inputs[row, : len(tail)] = tail.detach()

    def fix(self, chunk: int, counts: list[int], like: Tensor, shape: tuple[int, int] | None, always: bool) -> None:
        """Move the state into buffers of fixed shape.

        Args:
            chunk: tokens per chunk.
            counts: tokens in the unfinished chunk of each text.
            like: (rows, t, d), an input of the layer.
            shape: (d, f) of the sums of updates; None: this state has none.
            always: allocate the buffer for sums also before the first update; a graph cannot allocate it later.
        """
        rows = len(counts)
        if self.inputs is None:
            self.inputs = like.new_zeros(rows, chunk, like.shape[-1])
            for row, tail in enumerate(self.tails):
                if tail is not None:
                    self.inputs[row, : len(tail)] = tail
            self.tails = [None] * rows
            self.count = torch.tensor(counts, device=like.device)
            self._mark()
        if self.update is None and shape is not None and (always or any(total is not None for total in self.sums)):
            sums, self.sums = self.sums, [None] * rows
            exact = LayerState(rows)
            exact.sums, exact.rests = sums, self.rests
            self.update, self.rests = like.new_zeros(rows, *shape), [None] * rows
            for row, total in enumerate(sums):
                if total is not None and total.dtype == like.dtype:
                    self.update[row], self.rests[row] = total, exact.rests[row]
                elif total is not None:
                    self.put_sum(row, exact.sum_of(row, like.device))
                sums[row] = None
            self._mark()

    def round(self, dtype: torch.dtype) -> None:
        """Round fp32 sums to bfloat16 on their device and move the remaining bits to host memory."""
        for row, total in enumerate(self.sums):
            if total is not None and total.dtype == torch.float32 and dtype == torch.bfloat16:
                self.sums[row], rest = split_sum(total, dtype)
                self.rests[row] = rest.cpu()

    def _mark(self) -> None:
        self.rows = torch.arange(len(self.count), device=self.count.device)
        _mark_static(*(one for one in (self.inputs, self.count, self.rows, self.update) if one is not None))

    def select(self, counts: list[int], indices: list[int]) -> "LayerState":
        """Return copies of the texts with these indices; an index may occur more than once."""
        chosen = LayerState(len(indices))
        chosen.sums, chosen.rests = [self.sums[i] for i in indices], [self.rests[i] for i in indices]
        chosen.limits = [self.limits[i] for i in indices]
        if self.update is not None:
            chosen.update = self.update[indices]
        if self.inputs is None:
            chosen.tails = [self.tails[i] for i in indices]
        else:
            chosen.inputs, chosen.count = self.inputs[indices], self.count[indices]
            chosen._mark()
        return chosen

    def check(self, counts: list[int]) -> None:
        """Raise ValueError if the tensors of a loaded state are inconsistent."""
        kinds = dict(update=self.sums, rest=self.rests, inputs=self.tails)
        for what, tensors in kinds.items():
            for tensor in (one for one in tensors if one is not None):
                if tensor.dim() != 2 or (tensor.dtype in REAL) != (what != "rest"):
                    raise ValueError(f"unexpected dtype or shape of '{what}': {tensor.dtype}, {tuple(tensor.shape)}")
        for rounded, rest in zip(self.sums, self.rests, strict=True):
            fits = rounded is not None and rest is not None and rounded.shape == rest.shape
            if rest is not None and not (fits and rounded.dtype == torch.bfloat16 and rest.dtype == torch.int16):
                raise ValueError("'rest' does not match 'update'")
        for count, tail in zip(counts, self.tails, strict=True):
            if count < 0 or count != (0 if tail is None else len(tail)):
                raise ValueError("'count' does not match 'inputs'")

    @classmethod
    def join(cls, several: list["LayerState"], counts: list[list[int]]) -> "LayerState":
        """Concatenate the texts of several states."""
        joined = cls(0)
        for state, own in zip(several, counts, strict=True):
            for row, count in enumerate(own):
                rounded = state.rounded_sum_of(row)
                joined.sums.append(rounded if state.update is None else rounded.clone())
                joined.rests.append(state.rests[row])
                joined.limits.append(state.limits[row])
                tail = state.tail_of(row, count)
                joined.tails.append(None if tail is None or not count else tail.clone())
        return joined

    def step(self, x: Tensor) -> None:
        """Append one input per text, (rows, 1, d), to the unfinished chunks."""
        with torch.no_grad():
            torch._assert_async(
                (self.count < self.inputs.shape[1]).all(),
                "a chunk of fast weights is complete: call past_key_values.fold() before each compiled step",
            )
            self.inputs.index_put_((self.rows, self.count), x[:, 0].to(self.inputs.dtype))
            self.count.add_(1)

    def recount(self, counts: list[int]) -> None:
        """Set the number of tokens in the unfinished chunks."""
        if self.count is not None:
            self.count.copy_(torch.tensor(counts))


def _mark_static(*tensors: Tensor) -> None:
    """Mark buffers as static for torch.compile, so that CUDA graphs neither copy nor reject them."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


class FastWeights:
    """Hold the fast weights of all TTT layers for the texts of a batch, between forwards."""

    def __init__(self):
        self.layers: dict[int, LayerState] = {}
        self.counts: list[int] = []  # tokens in the unfinished chunk of each text
        self.chunks: list[int] = []  # complete chunks of each text
        self.embeds: LayerState | None = None  # embeddings of the unfinished chunks, if ttt_target is input_embed
        self.mlps: list = []  # the FastWeightMLP layers that use this state
        self.mask: Tensor | None = None  # (rows, t) padding mask of the next forward, if that gets a 4D mask
        self.static = False  # move the state into buffers of fixed shape after the first forward, for graphs
        self.fixed = False  # the buffers have their fixed shape
        self.steps = 0  # forwards counted so far
        self.asked: int | None = None  # `steps` when generate prepared the last forward
        self.model: str | None = None  # fingerprint of the model that read the texts; None: not known
        self.tokenizer: str | None = None  # fingerprint of the tokenizer; None: not known
        self.texts: list[list[dict]] = []  # texts that each row has read: name, tokens, sha256 of the token IDs

    def __deepcopy__(self, memo: dict) -> "FastWeights":
        copied = memo[id(self)] = FastWeights()
        copied.__dict__.update(
            {key: value if key == "mlps" else copy.deepcopy(value, memo) for key, value in self.__dict__.items()}
        )
        return copied

    def __getstate__(self) -> dict:
        return {**self.__dict__, "mlps": []}  # set again by the next forward

    @property
    def rows(self) -> int:
        """Return the number of texts in the batch."""
        return len(self.counts)

    def states(self) -> list[LayerState]:
        """Return the states of all layers, and of the embeddings if they are stored."""
        return [state for _, state in self._named()]

    def fold(self) -> None:
        """Apply the updates of complete chunks. Call between forwards, outside of any graph."""
        full = [row for row, count in enumerate(self.counts) if self.mlps and count == self.mlps[0].chunk]
        if not full:
            return
        for mlp in self.mlps:
            mlp.fold(self, full)
        self.counts = [0 if row in full else count for row, count in enumerate(self.counts)]
        self.chunks = [count + (row in full) for row, count in enumerate(self.chunks)]
        for state in self.states():
            state.recount(self.counts)

    def advance(self) -> None:
        """Count one more token per text and apply the updates of complete chunks."""
        self.counts = [count + 1 for count in self.counts]
        self.steps += 1
        self.fold()

    def recount(self) -> None:
        """Copy the counts from the device; this synchronizes."""
        counts = [state.count for state in self.layers.values() if state.count is not None]
        if counts:
            self.counts = counts[0].tolist()

    def select(self, indices: list[int]) -> "FastWeights":
        """Return copies of the texts with these indices; an index may occur more than once."""
        chosen = FastWeights()
        chosen.mlps = self.mlps
        chosen.fixed, chosen.steps, chosen.asked = self.fixed, self.steps, self.asked
        chosen.model, chosen.tokenizer = self.model, self.tokenizer
        chosen.counts, chosen.chunks = [self.counts[i] for i in indices], [self.chunks[i] for i in indices]
        chosen.texts = [list(self.texts[i]) for i in indices] if self.texts else []
        chosen.layers = {layer: state.select(self.counts, indices) for layer, state in self.layers.items()}
        if self.embeds is not None:
            chosen.embeds = self.embeds.select(self.counts, indices)
        return chosen

    @classmethod
    def join(cls, several: list["FastWeights"]) -> "FastWeights":
        """Concatenate the texts of several batches."""
        joined, counts = cls(), [one.counts for one in several]
        joined.counts = [count for own in counts for count in own]
        joined.chunks = [count for one in several for count in one.chunks]
        for layer in several[0].layers:
            joined.layers[layer] = LayerState.join([one.layers[layer] for one in several], counts)
        if several[0].embeds is not None:
            joined.embeds = LayerState.join([one.embeds for one in several], counts)
        return joined

    def save(self, path: str, dtype: torch.dtype | None = None) -> None:
        """Write a safetensors file.

        Args:
            path: file to write; an existing file is replaced atomically.
            dtype: bfloat16 halves the size; None is exact: 4 bytes per element of W_down, layer and text.

        Raises ValueError for any other dtype.
        """
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype={dtype} is not supported: use torch.bfloat16, or None (exact)")
        tensors = {"count": torch.tensor(self.counts)}
        for layer, state in self._named():
            for row, count in enumerate(self.counts):
                rounded, rest = state.rounded_sum_of(row), state.rests[row]
                if rounded is not None:
                    if rest is not None and rest.dtype != torch.int16:  # fp16: `rest` holds the exact sum
                        rounded, rest = rest, None
                    tensors[f"{layer}.{row}.update"] = rounded.to("cpu", dtype or rounded.dtype)
                if rest is not None and dtype is None:
                    tensors[f"{layer}.{row}.rest"] = rest
                if count:
                    tensors[f"{layer}.{row}.inputs"] = state.tail_of(row, count).cpu()
        about = dict(format=BOOK, model=self.model, tokenizer=self.tokenizer, texts=self.texts, chunks=self.chunks)
        limits = {name: [None if math.isinf(one) else one for one in state.limits] for name, state in self._named()}
        about["limits"] = {name: row for name, row in limits.items() if any(one is not None for one in row)}
        # safetensors rejects tensors that share memory
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        partial = f"{path}.{os.getpid()}.partial"  # readers of the old file keep it
        try:
            save_file(tensors, partial, metadata={"about": json.dumps(about)})
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(partial, 0o666 & ~mask)  # safetensors writes files with mode 0600
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    def _named(self) -> list[tuple[str, LayerState]]:
        named = [(str(layer), state) for layer, state in self.layers.items()]
        return named + ([] if self.embeds is None else [("embeds", self.embeds)])

    @classmethod
    def load(cls, path: str) -> "FastWeights":
        """Read a file that ``save`` wrote. Sums stay memory-mapped until they are used.

        Raises ValueError if the file is damaged or has another format.
        """
        found = cls()
        try:
            with safe_open(path, framework="pt") as file:
                limits = found._take_description((file.metadata() or {}).get("about"))
                names = set(file.keys())
                if "count" not in names:
                    raise ValueError("no tensor 'count'")
                count = file.get_tensor("count")
                if count.dim() != 1 or count.dtype not in (torch.int64, torch.int32) or not len(count):
                    raise ValueError("'count' is not a list of integers")
                found.counts = [int(one) for one in count.tolist()]
                if found.texts and len(found.texts) != found.rows:
                    raise ValueError("'texts' does not match 'count'")
                found.chunks = found.chunks or [0] * found.rows
                if len(found.chunks) != found.rows:
                    raise ValueError("'chunks' does not match 'count'")
                for name in sorted(names - {"count"}):
                    found._take(name, file.get_tensor(name))
                found._take_limits(limits)
            for _, state in found._named():
                state.check(found.counts)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
            raise ValueError(f"'{path}' is not a valid file of fast weights ({error})") from error
        return found

    def check_fits(self, path: str, shapes: dict[int, tuple[int, int]], chunk: int, embeddings: bool) -> None:
        """Raise ValueError if these fast weights, loaded from a file, have other shapes than a model's.

        Layers without updates get an empty state.

        Args:
            shapes: (d, f) of each TTT layer's down-projection, by the number of the layer.
            chunk: tokens per chunk.
            embeddings: True if targets are made from embeddings.
        """
        if not set(self.layers) <= set(shapes):
            raise ValueError(f"'{path}' holds fast weights of layers {sorted(self.layers)}, not those of this model")
        if self.embeds is not None and not embeddings:
            raise ValueError(f"'{path}' holds fast weights of another model: its ttt_target is input_embed")
        states = [(self.layers.setdefault(layer, LayerState(self.rows)), shape) for layer, shape in shapes.items()]
        if embeddings:
            self.embeds = self.embeds or LayerState(self.rows)
            states.append((self.embeds, next(iter(shapes.values()))))
        for state, shape in states:
            for total, tail in zip(state.sums, state.tails, strict=True):
                pairs = [(total, shape), (tail, None if tail is None else (len(tail), shape[0]))]
                if any(tensor is not None and tuple(tensor.shape) != tuple(right) for tensor, right in pairs):
                    raise ValueError(f"'{path}' holds fast weights of another model: their shapes differ")
            try:
                state.check(self.counts)
            except ValueError as error:
                raise ValueError(f"'{path}' does not fit this model ({error})") from error
        if max(self.counts) >= chunk:
            raise ValueError(f"'{path}' holds fast weights of another model: its ttt_chunk is larger")

    def check_made_with(self, path: str, model: Callable[[], str], tokenizer=None) -> None:
        """Raise ValueError if the model or the tokenizer that made these fast weights has another fingerprint.

        ``model`` returns a model's fingerprint; ``tokenizer`` None: not compared.
        """
        others = [(self.model, model, "model")]
        if tokenizer is not None:
            others.append((self.tokenizer, lambda: fingerprint_of_tokenizer(tokenizer), "tokenizer"))
        for theirs, fingerprint, what in others:
            if theirs is not None and theirs != fingerprint():
                raise ValueError(
                    f"'{path}' was made with another {what} (fingerprint {theirs[:12]}; this one has "
                    f"{fingerprint()[:12]}): read the texts again with this one"
                )

    def _take_description(self, written: str | None) -> dict:
        """Read the metadata of a file and return its limits; older files have no metadata."""
        if written is None:
            return {}
        about = json.loads(written)
        if not isinstance(about, dict) or about.get("format") != BOOK:
            raise ValueError(f"its format is not '{BOOK}'")
        self.model, self.tokenizer, self.texts = (about.get(key) for key in ("model", "tokenizer", "texts"))
        named = all(isinstance(one, str | None) for one in (self.model, self.tokenizer))
        rows = self.texts if isinstance(self.texts, list) else [None]
        lists = all(isinstance(row, list) and all(isinstance(text, dict) for text in row) for row in rows)
        self.chunks = about.get("chunks", [])  # missing in older files
        counts = isinstance(self.chunks, list) and all(type(one) is int and 0 <= one < 2**48 for one in self.chunks)
        if not named or not lists or not counts:
            raise ValueError("damaged metadata")
        return about.get("limits", {})

    def _take_limits(self, limits: dict) -> None:
        """Set the largest norms of the sums from the metadata of a file."""
        states = dict(self._named())
        if not isinstance(limits, dict) or not limits.keys() <= states.keys():
            raise ValueError("'limits' names unknown layers")
        for name, row in limits.items():
            numbers = [math.inf if one is None else one for one in row] if isinstance(row, list) else []
            # those above are no norms of fp32 numbers
            valid = all(type(one) in (int, float) and (0 <= one < 3e38 or one == math.inf) for one in numbers)
            if len(numbers) != self.rows or not valid:
                raise ValueError("damaged 'limits'")
            states[name].limits = numbers

    def _take(self, name: str, tensor: Tensor) -> None:
        """Store a tensor of a file in the state of its layer."""
        layer, row, what = name.split(".") if name.count(".") == 2 else ("", "", "")
        if not (layer == "embeds" or layer.isdecimal()) or not row.isdecimal() or not 0 <= int(row) < self.rows:
            raise ValueError(f"unexpected tensor '{name}'")
        if layer == "embeds":
            self.embeds = state = self.embeds or LayerState(self.rows)
        else:
            state = self.layers.setdefault(int(layer), LayerState(self.rows))
        places = dict(inputs=state.tails) | (dict(update=state.sums, rest=state.rests) if layer != "embeds" else {})
        if what not in places or places[what][int(row)] is not None:
            raise ValueError(f"unexpected tensor '{name}'")
        places[what][int(row)] = tensor


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor, which may be memory-mapped, to a device; for GPUs through pinned memory, which is faster."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def split_sum(total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split fp32 numbers into bf16 and the remaining bits as int16; for fp16 return the fp32 numbers as second part."""
    if dtype != torch.bfloat16:
        return total.to(dtype), total
    bits = total.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_sum(rounded: Tensor, rest: Tensor) -> Tensor:
    """Return the fp32 numbers that ``split_sum`` split."""
    if rest.dtype != torch.int16:
        return rest
    rest = rest.to(torch.int32)
    rest = torch.where(rounded == 0, rest.clamp(min=0), rest)  # split_sum writes no negative bits at zero: NaN
    bits = (rounded.contiguous().view(torch.int16).to(torch.int32) << 16) + rest
    return bits.view(torch.float32)


class _FastWeightsInCache:
    """Add fast weights to a transformers cache."""

    fast_weights: FastWeights

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._choose(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._choose(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._choose([row for row in range(self.fast_weights.rows) for _ in range(repeats)])

    def _choose(self, rows: list[int]) -> None:
        if self.fast_weights.rows:
            self.fast_weights = self.fast_weights.select(rows)

    def reset(self) -> None:
        """Clear keys, values and fast weights."""
        super().reset()
        self.fast_weights = FastWeights()

    def fold(self) -> None:
        """Apply the updates of complete chunks. Call it before each step of your own compiled decoding loop.

        Example::

            >>> step, cache = torch.compile(model, backend="eager"), StaticCache(model.config, max_cache_len=64)
            >>> token = model(torch.tensor([[1, 2, 3]]), past_key_values=cache).logits[:, -1:].argmax(-1)
            >>> for place in range(3, 6):
            ...     cache.fold()
            ...     out = step(token, past_key_values=cache, position_ids=torch.tensor([[place]]))
            ...     token = out.logits.argmax(-1)
        """
        self.fast_weights.recount()
        self.fast_weights.fold()

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError(ASSISTED)


class FastWeightCache(_FastWeightsInCache, DynamicCache):
    """Store keys, values and fast weights."""

    def __init__(self, *args, fast_weights: FastWeights | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.fast_weights = fast_weights or FastWeights()

    def reset(self) -> None:
        """Clear keys, values and fast weights. (DynamicCache.reset zeroes keys and values but keeps their length.)"""
        for layer in self.layers:
            layer.keys, layer.values, layer.is_initialized = None, None, False
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = 0
        self.fast_weights = FastWeights()


class FastWeightStaticCache(_FastWeightsInCache, StaticCache):
    """Store keys, values and fast weights in buffers of fixed shape, for torch.compile and CUDA graphs."""

    def __init__(self, *args, fast_weights: FastWeights | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.fast_weights = fast_weights or FastWeights()
        self.fast_weights.static = True

    def _choose(self, rows: list[int]) -> None:
        super()._choose(rows)
        self.fast_weights.static = True

    def reset(self) -> None:
        super().reset()
        self.fast_weights.static = True


_WITH_FAST_WEIGHTS = {DynamicCache: FastWeightCache, StaticCache: FastWeightStaticCache}


def _convert_cache(cache) -> None:
    """Convert an empty transformers cache to a fast-weight cache in place, so the caller's reference stays valid."""
    kind = _WITH_FAST_WEIGHTS.get(type(cache))
    if kind is None or (cache.is_initialized and int(cache.get_seq_length()) > 0):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}{'' if kind is None else ' filled without fast weights'}: "
            f"pass an empty DynamicCache or StaticCache, or omit it"
        )
    for layer in cache.layers:
        if type(layer) is StaticLayer and not layer.is_initialized and layer.max_cache_len >= KEY_BLOCK * 8:
            layer.max_cache_len += -layer.max_cache_len % KEY_BLOCK  # so that grouped_attention can split it
    cache.__class__ = kind
    cache.fast_weights = FastWeights()
    cache.fast_weights.static = kind is FastWeightStaticCache


def _cache_in(arguments: dict):
    """Return the cache among the arguments of a forward or of ``generate``, under its old or new name; None: none."""
    found = arguments.get(CACHE)
    return arguments.get("past_key_values") if found is None else found


def _checkpoints(model: nn.Module) -> bool:
    """Return whether gradient checkpointing is on; transformers 5.24 renamed the property."""
    new = "is_activation_checkpointing"
    return getattr(model, new if hasattr(type(model), new) else "is_gradient_checkpointing")


def _align_module_device(module: nn.Module, *device):
    """Return accelerate's context that brings offloaded weights of a module to a device.

    It is not an import statement, because transformers demands all packages that a file like this one imports.
    """
    return importlib.import_module("accelerate.utils").align_module_device(module, *device)


@dataclass
class ForwardContext:
    """Hold the arguments that one forward passes to its TTT layers."""

    weights: FastWeights | None = None  # state to continue and update; None: no cache
    valid: list[Tensor] | None = None  # per row, indices of the tokens that are not padding; None: no padding
    documents: list[list[int]] | None = None  # per row, document bounds from 0 to t; None: one document per row
    embedded: Tensor | None = None  # (rows, t, d) input embeddings; None unless ttt_target is input_embed


class ChunkConvolution(nn.Module):
    """Convolve the inputs of each chunk depthwise, (chunks, t, d) -> (chunks, t, d).

    Not an nn.Conv1d: adapters and quantizers that replace those modules would not reach the updates.
    """

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 1, kernel))

    def forward(self, u: Tensor) -> Tensor:  # (chunks, t, d)
        d, _, kernel = self.weight.shape
        return F.conv1d(u.transpose(1, 2), self.weight, padding=kernel // 2, groups=d).transpose(1, 2)


class TargetProjection(nn.Module):
    """Multiply targets by P (not by its transpose), (..., d) -> (..., d).

    Not an nn.Linear: adapters and quantizers that replace those modules assume the transpose.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, v: Tensor) -> Tensor:
        return v @ self.weight


def grouped_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """Compute attention like transformers' ``sdpa``, but read grouped keys and values once when decoding one token.

    With a mask, which static caches need, ``sdpa`` repeats keys and values for every query head. Keys are split into
    spans, so that a batch of one long text also fills a GPU.

    Args:
        query: (rows, heads, tokens, size).
        key, value: (rows, key-value heads, length, size).
        attention_mask: (rows, 1, tokens, length), True where a token attends.

    Returns:
        The output (rows, tokens, heads, size), and None for the attention weights.
    """
    plain = options.get("position_bias") is None and not options.get("dropout")
    groups = getattr(module, "num_key_value_groups", 1)
    if query.shape[2] > 1 or groups == 1 or attention_mask is None or attention_mask.dtype != torch.bool or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if torch.compiler.is_compiling() and key.shape[2] >= 8 * KEY_BLOCK and not _differentiates(query, key, value):
        return _attend_grouped_opaquely(query, key, value, attention_mask, scale), None
    return _attend_grouped(query, key, value, attention_mask, scale), None


def _attend_grouped(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scale: float) -> Tensor:
    """Compute ``grouped_attention`` for one token per row; return (rows, 1, heads, size)."""
    rows, heads, _, size = query.shape
    length, pairs, groups = key.shape[2], rows * key.shape[1], heads // key.shape[1]
    spans = 1  # grows until there are several products per SM; a power of two keeps the number of graphs small
    while pairs * spans < KEY_BLOCK:
        spans *= 2
    if length < 8 * KEY_BLOCK or length % spans:
        spans = 1
    asked = (query * scale).reshape(pairs, 1, groups, size).expand(-1, spans, -1, -1).reshape(-1, groups, size)
    keys, values = (one.reshape(pairs * spans, length // spans, -1) for one in (key, value))
    scores = _product_in_sum_dtype(asked, keys.transpose(1, 2)).view(rows, -1, spans, groups, length // spans)
    allowed = attention_mask.view(rows, -1, spans, 1, length // spans)
    weights = scores.masked_fill(~allowed, float("-inf")).transpose(2, 3).flatten(3).softmax(dim=-1)
    weights = weights.view(rows, -1, groups, spans, length // spans).transpose(2, 3).to(value.dtype)
    parts = _product_in_sum_dtype(weights.reshape(pairs * spans, groups, -1), values)
    out = parts.view(rows, -1, spans, groups, value.shape[-1]).sum(2).to(value.dtype)
    return out.reshape(rows, heads, 1, -1).transpose(1, 2).contiguous()


def _registered(function):
    """Register a function on tensors as an opaque torch operation, which torch.compile does not trace.

    All copies of this file in a process share the operation.
    """
    name = f"{function.__name__.strip('_')}_1"
    if not hasattr(torch.ops.inplace_ttt, name):
        operation = torch.library.custom_op(f"inplace_ttt::{name}", function, mutates_args=())
        operation.register_fake(lambda query, key, value, attention_mask, scale: value.new_empty(
            query.shape[0], 1, query.shape[1], value.shape[-1]))  # fmt: skip
    return getattr(torch.ops.inplace_ttt, name)


# Opaque because torch.compile makes the key length dynamic at the second length that it sees; it then needs minutes
# to prove for each layer that the spans divide the length
_attend_grouped_opaquely = _registered(_attend_grouped)


def _differentiates(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _product_in_sum_dtype(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two batches of matrices; accumulate and return in fp32 (fp64 for fp64 inputs)."""
    half = a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
    if half and hasattr(torch.ops.aten.bmm, "dtype") and not _differentiates(a, b):
        return torch.ops.aten.bmm.dtype(a, b, torch.float32)
    return torch.bmm(_to_sum_dtype(a), _to_sum_dtype(b))


GROUPED = "inplace_ttt_grouped"  # name of grouped_attention in transformers
AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class FastWeightMLP(nn.Module):
    """Run a gated MLP whose down-projection is updated while reading, (rows, t, d) -> (rows, t, d)."""

    def __init__(self, mlp: nn.Module, config, layer: int):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        self.layer, self.chunk, self.eta, self.clip = layer, config.ttt_chunk, config.ttt_lr, config.ttt_clip
        if isinstance(self.clip, list | tuple):  # one clip per TTT layer, calibrated from training
            self.clip = self.clip[list(config.ttt_layers).index(layer)]
        self.trained = (config.ttt_trained_length or 0) // self.chunk  # training length in complete chunks
        self.bound = config.ttt_bound if self.trained else None
        self.shape = config.hidden_size, config.intermediate_size  # (d, f), the shape of W_down
        self.ttt_conv = ChunkConvolution(config.hidden_size, config.ttt_conv_kernel)
        self.ttt_proj = TargetProjection(config.hidden_size) if config.ttt_proj else None
        self.reads_embeddings = config.ttt_target == "input_embed"
        self.computes_in = torch.float32  # the dtype of the last forward
        self.context: ForwardContext | None = None  # set for each forward by the attention's hook

    def forward(self, x: Tensor) -> Tensor:
        context, self.context = self.context or ForwardContext(), None
        z = self._inner(x)
        self.computes_in = z.dtype
        if context.weights is None:
            return self._pieces(z, context.embedded if self.reads_embeddings else x, context)
        if x.shape[1] == 1 and context.valid is None:
            return self._step(x, z, context.weights)
        return self._read(x, z, context)

    def _inner(self, x: Tensor) -> Tensor:
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def _step(self, x: Tensor, z: Tensor, weights: FastWeights) -> Tensor:
        """Decode one token per text; may run inside a graph. Fast weights change only at the end of a chunk."""
        state = weights.layers[self.layer]
        if not _in_graph():
            state.fix(self.chunk, weights.counts, x, self.shape, weights.static)
        out = self.down_proj(z)
        if state.update is not None:
            out = out + torch.bmm(z, state.update.transpose(1, 2).to(z.dtype))
        state.step(x)
        return out

    @_outside_graph
    def _pieces(self, z: Tensor, u: Tensor, context: ForwardContext) -> Tensor:
        """Process texts without a cache."""
        if context.valid is None and context.documents is None:
            return self._chunks(z, u, None, 0, [math.inf] * len(z))[0]
        out = torch.zeros_like(u, dtype=z.dtype)
        for row in range(len(z)):
            here = slice(None) if context.valid is None else context.valid[row]
            bounds = [0, len(z[row, here])] if context.documents is None else context.documents[row]
            parts = [
                self._chunks(z[row : row + 1, here][:, a:b], u[row : row + 1, here][:, a:b], None, 0, [math.inf])[0]
                for a, b in itertools.pairwise(bounds)
            ]
            out[row, here] = torch.cat(parts, dim=1)[0].to(out.dtype)
        return out

    @_outside_graph
    def _read(self, x: Tensor, z: Tensor, context: ForwardContext) -> Tensor:
        """Prefill: process the next tokens of texts with a cache."""
        weights = context.weights
        alike = context.valid is None and len(set(zip(weights.counts, weights.chunks, strict=True))) == 1
        # texts per batched product; exact sums limit the number
        size = max(1, MAX_EXACT_NUMEL // (self.shape[0] * self.shape[1]))
        if size < len(x) and max(weights.counts) + x.shape[1] >= self.chunk:  # round each sum at once
            weights.layers[self.layer].fix(self.chunk, weights.counts, x, self.shape, True)
        size, parts = size if alike else 1, []
        for start in range(0, len(x), size):
            rows = list(range(start, min(start + size, len(x))))
            here = slice(None) if context.valid is None else context.valid[start]
            own = (None if one is None else one[rows[0] : rows[-1] + 1, here] for one in (x, z, context.embedded))
            parts.append(self._read_rows(rows, *own, weights))
        if context.valid is None:
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            out = torch.zeros_like(x, dtype=z.dtype)
            for row, here in enumerate(context.valid):
                out[row, here] = parts[row][0].to(out.dtype)
        if weights.static or len(x) > 1:  # exact sums of a batch take twice the memory
            lengths = [x.shape[1]] * len(x) if context.valid is None else list(map(len, context.valid))
            counts = [(count + more) % self.chunk for count, more in zip(weights.counts, lengths, strict=True)]
            weights.layers[self.layer].fix(self.chunk, counts, x, self.shape, weights.static)
        return out

    def _read_rows(
        self, rows: list[int], x: Tensor, z: Tensor, embedded: Tensor | None, weights: FastWeights
    ) -> Tensor:
        """Process the same number of tokens of several texts that have the same number of earlier tokens."""
        state, pending = weights.layers[self.layer], weights.counts[rows[0]]
        writes = pending + x.shape[1] >= self.chunk
        total = self._sums(state, rows, z, writes)
        u = embedded if self.reads_embeddings else x
        if pending:
            before = torch.stack([state.tail_of(row, pending) for row in rows]).to(x)
            z = torch.cat([self._inner(before).to(z.dtype), z], dim=1)
            x = torch.cat([before, x], dim=1)
            u = x
            if self.reads_embeddings:
                tails = torch.stack([weights.embeds.tail_of(row, pending) for row in rows]).to(embedded)
                u = torch.cat([tails, embedded], dim=1)
        limits = [state.limits[row] for row in rows]
        out, total, limits = self._chunks(z, u, total, weights.chunks[rows[0]], limits)
        left = x.shape[1] % self.chunk
        for place, row in enumerate(rows):
            state.limits[row] = limits[place]
            if writes:
                state.put_sum(row, total[place].detach())
            state.put_tail(row, x[place, x.shape[1] - left :] if left else None)
        return out[:, pending:]

    def _sums(self, state: LayerState, rows: list[int], z: Tensor, exact: bool) -> Tensor | None:
        """Return the sums of updates (rows, d, f); if not ``exact``, in the dtype of z where they are stored in it."""
        found = [state.rounded_sum_of(row) for row in rows]
        if all(one is None for one in found):
            return None
        rounded = not exact and all(one is None or one.dtype == z.dtype for one in found)
        if not rounded:
            found = [state.sum_of(row, z.device) for row in rows]
        zero = z.new_zeros(self.shape, dtype=z.dtype if rounded else _sum_dtype(z))
        return torch.stack([zero if one is None else one.to(zero) for one in found])

    def _chunks(
        self, z: Tensor, u: Tensor, total: Tensor | None, before: int, limits: list[float]
    ) -> tuple[Tensor, Tensor | None, list[float]]:
        """Apply the current weight, then update it, chunk by chunk; bound the sums of updates (``ttt_bound``).

        Args:
            z: (rows, t, f), inputs of the down-projection; t starts at a chunk boundary.
            u: (rows, t, d), inputs of the convolution.
            total: (rows, d, f), sums of earlier updates; None: there are none.
            before: number of earlier chunks.
            limits: per row, the largest norm of the sum; inf: not known yet.

        Returns:
            The output (rows, t, d), the new sums of updates and the new limits.
        """
        length = z.shape[1]
        if self.bound is None or before + length // self.chunk < self.trained:
            return *self._free_chunks(z, u, total), limits
        parts, start = [], 0
        while start < length:  # in one piece up to the training length, then chunk by chunk
            stop = min(start + self.chunk * max(1, self.trained - before), length)
            out, total = self._free_chunks(z[:, start:stop], u[:, start:stop], total)
            parts.append(out)
            before += (stop - start) // self.chunk
            if (stop - start) % self.chunk == 0:
                total, limits = self._bounded(total, before, limits)
            start = stop
        return torch.cat(parts, dim=1), total, limits

    def _bounded(self, total: Tensor, chunks: int, limits: list[float]) -> tuple[Tensor, list[float]]:
        """Scale sums of updates (rows, d, f) after this many chunks down to their limits; return both."""
        if self.bound is None or chunks < self.trained:
            return total, limits
        norms = total.flatten(1).norm(dim=1)
        if not all(map(math.isfinite, limits)):  # at the training length, or the text had no bound before
            share = self.bound if chunks == self.trained else 1.0
            known = zip(limits, norms.tolist(), strict=True)
            limits = [limit if math.isfinite(limit) else share * norm for limit, norm in known]
        scales = norms.new_tensor(limits) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        return total * scales.clamp(max=1)[:, None, None], limits

    def _free_chunks(self, z: Tensor, u: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run ``_chunks`` without a bound; return the output and the new sums of updates."""
        weight, length = self._plain_weight(z, u), z.shape[1]
        if length < self.chunk:
            return self._product(z, total, weight), total
        if fast_weight_linear is not None and weight is not None:
            return self._by_operation(z, u, total, weight)
        whole = length - length % self.chunk
        rows, d = u.shape[0], u.shape[2]
        v = self.ttt_conv(u[:, :whole].reshape(-1, self.chunk, d))
        v = (v if self.ttt_proj is None else self.ttt_proj(v)).reshape(rows, whole, d)
        parts, limit = [], None if self.clip is None else self.clip * self.weight_norm()
        for start in range(0, length, self.chunk):
            here = slice(start, start + self.chunk)
            parts.append(self._product(z[:, here], total, weight))
            if start < whole:
                written = self._written(v[:, here], z[:, here], limit)
                total = written if total is None else total + written
        return torch.cat(parts, dim=1), total

    def _by_operation(self, z: Tensor, u: Tensor, total: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Run ``_free_chunks`` with ``fast_weight_linear`` of the package inplace_ttt."""
        rows = len(z)
        if total is None:
            total = weight.new_zeros(rows, *weight.shape, dtype=_sum_dtype(weight))
        z, u = z.transpose(0, 1), u.transpose(0, 1)
        ids = torch.arange(len(z), dtype=torch.int32, device=z.device) // self.chunk
        targets = ChunkTargets(u, self.ttt_conv.weight, None if self.ttt_proj is None else self.ttt_proj.weight, ids)
        out, state = fast_weight_linear(
            z,
            targets,
            weight,
            eta=self.eta,
            chunk_size=self.chunk,
            clip=self.clip,
            initial_state=FastWeightState(total, z[:0], u[:0]),
            output_final_state=True,
        )
        return out.transpose(0, 1), state.updates

    def _product(self, z: Tensor, total: Tensor | None, weight: Tensor | None) -> Tensor:
        """Multiply z (rows, t, f) by W_down plus the sums of updates (rows, d, f); return (rows, t, d)."""
        if total is None:
            return self.down_proj(z)
        if weight is not None and len(z) == 1 and z.shape[1] > 1:
            return F.linear(z, (_to_sum_dtype(weight) + total[0]).to(weight.dtype))
        return self.down_proj(z) + torch.bmm(z, total.transpose(1, 2).to(z.dtype))

    def _written(self, v: Tensor, z: Tensor, limit: Tensor | None) -> Tensor:
        """Return the clipped update (rows, d, f) of a complete chunk."""
        written = self.eta * _product_in_sum_dtype(v.transpose(1, 2), z)
        if limit is not None:
            norms = written.flatten(1).norm(dim=1)[:, None, None]
            written = written * (limit.to(written) / norms).clamp(max=1)
        return written

    @torch.no_grad()
    def fold(self, weights: FastWeights, rows: list[int]) -> None:
        """Apply the updates of the complete chunks of these texts."""
        state = weights.layers[self.layer]
        limit = None if self.clip is None else self.clip * self.weight_norm()
        for row in rows:
            x = state.tail_of(row, self.chunk)[None]
            u = weights.embeds.tail_of(row, self.chunk)[None] if self.reads_embeddings else x
            v = self.ttt_conv(u)
            written = self._written(v if self.ttt_proj is None else self.ttt_proj(v), self._inner(x), limit)[0]
            total = state.sum_of(row, x.device)
            total = written if total is None else total + written
            total, state.limits[row : row + 1] = self._bounded(
                total[None], weights.chunks[row] + 1, state.limits[row : row + 1]
            )
            state.put_sum(row, total[0])

    def weight_norm(self) -> Tensor:
        """Return the Frobenius norm of W_down, also if it is offloaded, quantized or has an adapter."""
        if self.down_proj.weight.is_meta:
            with _align_module_device(self.down_proj):
                return self._weight_norm()
        return self._weight_norm()

    def _weight_norm(self) -> Tensor:
        base = getattr(self.down_proj, "base_layer", self.down_proj)
        weight = base.weight.detach() if type(base.weight) is nn.Parameter else self._dequantised(base)
        for name in getattr(self.down_proj, "active_adapters", ()):
            if not getattr(self.down_proj, "merged", False):
                weight = weight + self.down_proj.get_delta_weight(name).detach().to(weight)
        return _to_sum_dtype(weight).norm()

    @torch.no_grad()
    def _dequantised(self, module: nn.Module, block: int = 1024) -> Tensor:
        """Return the weight (d, f) of a quantized layer, by multiplying unit vectors; this works for any quantizer."""
        d, f = self.shape
        weight = torch.empty(d, f, dtype=torch.float32, device=module.weight.device)
        for start in range(0, f, block):
            size = min(block, f - start)
            rows = torch.zeros(1, size, f, dtype=self.computes_in, device=weight.device)
            rows[0, range(size), range(start, start + size)] = 1
            weight[:, start : start + size] = module(rows)[0].t()
        return weight

    def _plain_weight(self, z: Tensor, u: Tensor) -> Tensor | None:
        """Return W_down if its module is a plain nn.Linear without bias, hooks or adapters, else None."""
        module = self.down_proj
        plain = type(module) is nn.Linear and module.bias is None and type(module.weight) is nn.Parameter
        hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        if not plain or hooked or not z.dtype == u.dtype == module.weight.dtype or module.weight.device != z.device:
            return None
        return module.weight


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _to_sum_dtype(tensor: Tensor) -> Tensor:
    """Convert a tensor to the dtype of sums: fp32, or fp64 for fp64 tensors."""
    return tensor.to(_sum_dtype(tensor))


def check_keys(config) -> None:
    """Raise ValueError for the first key of a configuration that fast weights cannot use."""
    clip, layers, chunk, kernel = config.ttt_clip, config.ttt_layers, config.ttt_chunk, config.ttt_conv_kernel
    number = config.num_hidden_layers
    if not isinstance(layers, list | tuple) or any(type(one) is not int or not 0 <= one < number for one in layers):
        raise ValueError(f"ttt_layers={layers} must be a list of numbers below num_hidden_layers={number}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"ttt_layers={layers} names a layer twice")
    if type(chunk) is not int or chunk < 1:
        raise ValueError(f"ttt_chunk={chunk} must be 1 or more tokens")
    if type(kernel) is not int or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"ttt_conv_kernel={kernel} must be an odd number")
    if config.ttt_target not in ("hidden_states", "input_embed"):
        raise ValueError(f"ttt_target={config.ttt_target} is not known: use hidden_states or input_embed")
    if isinstance(clip, list | tuple) and len(clip) != len(layers):
        raise ValueError(f"ttt_clip={clip} must be one number, or one for each of ttt_layers={layers}")
    if config.ttt_bound is not None and not config.ttt_trained_length:
        raise ValueError(f"ttt_bound={config.ttt_bound} needs ttt_trained_length, in tokens: set both or none")


class FastWeightsMixin:
    """Replace the MLPs in ``ttt_layers`` of a transformers causal language model by ``FastWeightMLP``."""

    def __init__(self, config):
        super().__init__(config)
        self.fast_mlps = []
        check_keys(self.config)
        for layer in self.config.ttt_layers if self.config.ttt_mode else ():
            mlp = FastWeightMLP(self.model.layers[layer].mlp, self.config, layer)
            self.model.layers[layer].mlp = mlp
            self.fast_mlps.append(mlp)
        self._book: FastWeights | None = None  # fast weights for the generation that starts
        if self.fast_mlps:
            self.model.register_forward_pre_hook(self._before, with_kwargs=True)
            self.model.register_forward_hook(self._after, with_kwargs=True)
            for layer in self.model.layers:
                layer.self_attn.register_forward_pre_hook(partial(_hand_over, layer.mlp), with_kwargs=True)
        self.post_init()

    def _init_weights(self, module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChunkConvolution):
            nn.init.zeros_(module.weight)
        elif isinstance(module, TargetProjection):
            nn.init.eye_(module.weight)

    def _before(self, model, args, kwargs):
        """Add the ForwardContext to the keyword arguments that the model passes on to its layers."""
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, ()
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs["input_ids"] if tokens is None else tokens
        embedded = None
        if any(mlp.reads_embeddings for mlp in self.fast_mlps):
            embeds = kwargs.get("inputs_embeds")
            embedded = model.embed_tokens(kwargs["input_ids"]) if embeds is None else embeds
        weights = getattr(_cache_in(kwargs), "fast_weights", None)
        compiled = _in_graph()
        if compiled and tokens.shape[1] == 1 and weights is not None and weights.fixed:
            kwargs[CONTEXT_KWARG] = ForwardContext(weights, embedded=embedded)
        else:
            kwargs = self._begin(model, kwargs, embedded, compiled)
        return args, kwargs

    @_outside_graph
    def _begin(self, model, kwargs: dict, embedded: Tensor | None, compiled: bool) -> dict:
        """Return the arguments of a forward with its ForwardContext, and with a new cache if one is needed.

        ``compiled``: the layers run in a graph, which cannot allocate buffers, so allocate them here.
        """
        tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        rows, length = tokens.shape[:2]
        self._check(model, kwargs)
        context = ForwardContext(documents=_documents(kwargs, rows, length), embedded=embedded)
        cache = self._cache_of(model, kwargs, context.documents is not None)
        if cache is not None:
            context.weights = self._open(cache, rows)
        context.valid = self._valid(kwargs.get("attention_mask"), length, context.weights)
        if context.weights is not None and length == 1 and context.valid is None:
            weights, chunk = context.weights, self.config.ttt_chunk
            if embedded is not None:
                weights.embeds.fix(chunk, weights.counts, embedded, None, False)
            for mlp in self.fast_mlps if compiled else ():
                like = torch.zeros(rows, 1, self.config.hidden_size, dtype=self.dtype, device=tokens.device)
                weights.layers[mlp.layer].fix(chunk, weights.counts, like, mlp.shape, True)
            weights.fixed = weights.fixed or compiled
        kwargs[CONTEXT_KWARG] = context
        return kwargs

    def _cache_of(self, model, kwargs: dict, packed: bool):
        """Return the cache of a forward; create it if none was given. Return None without ``use_cache``."""
        cache, use = _cache_in(kwargs), kwargs.get("use_cache")
        if cache is None:
            if packed and use:
                raise ValueError("a row with several documents cannot be cached: pass use_cache=False")
            wanted = self.config.use_cache and not packed if use is None else use
            recomputes = _checkpoints(model) and model.training
            kwargs["use_cache"] = bool(wanted) and not recomputes
            if not kwargs["use_cache"]:
                return None
            kwargs.pop("past_key_values", None)  # None; transformers accepts one of the two names
            cache = kwargs[CACHE] = FastWeightCache(config=self.config)
        elif not isinstance(cache, _FastWeightsInCache):
            _convert_cache(cache)
        return cache

    def _open(self, cache, rows: int) -> FastWeights:
        """Return the fast weights of a cache; repeat saved ones if the batch has a multiple of their rows."""
        weights = cache.fast_weights
        if weights.asked is not None and weights.asked == weights.steps and weights.fixed:
            weights.recount()  # the last forward of a generation may not have been counted
        if not weights.rows:
            weights.counts, weights.chunks = [0] * rows, [0] * rows
        elif weights.rows != rows:
            fresh = not cache.is_initialized or int(cache.get_seq_length()) == 0
            if rows % weights.rows or not fresh:
                raise ValueError(f"fast_weights hold {weights.rows} texts, but the batch has {rows} rows")
            mask, static, repeats = weights.mask, weights.static, rows // weights.rows
            weights = cache.fast_weights = weights.select([row for row in range(weights.rows) for _ in range(repeats)])
            weights.mask, weights.static = mask, static
        for mlp in self.fast_mlps:
            weights.layers.setdefault(mlp.layer, LayerState(rows))
            if mlp.reads_embeddings and weights.embeds is None:
                weights.embeds = LayerState(rows)
        weights.mlps = self.fast_mlps
        return weights

    def _check(self, model, kwargs: dict) -> None:
        if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
            raise ValueError(CONTINUOUS)
        again = getattr(getattr(model.layers[0], "_gradient_checkpointing_func", None), "keywords", {})
        recomputes = _checkpoints(model) and model.training and torch.is_grad_enabled()
        if recomputes and again.get("use_reentrant", True) and self.fast_mlps[0].reads_embeddings:
            raise ValueError(
                "gradient checkpointing with use_reentrant=True drops gradients of ttt_target=input_embed: enable it "
                "with gradient_checkpointing_kwargs=dict(use_reentrant=False)"
            )
        for mlp in self.fast_mlps:
            for module in (mlp.ttt_conv, mlp.ttt_proj):
                if module is not None and type(module) not in (ChunkConvolution, TargetProjection):
                    raise ValueError(
                        f"layer {mlp.layer}: ttt_conv or ttt_proj was replaced by a {type(module).__name__}; they "
                        f"cannot be adapted or quantized: exclude both modules"
                    )

    def _valid(self, mask, length: int, weights: FastWeights | None) -> list[Tensor] | None:
        """Return the indices of each row's tokens that are not padding; None if there is no padding."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            if length == 1:
                return None
            mask = None if weights is None else weights.mask
            if mask is None:
                raise ValueError(
                    "a 4D attention_mask does not identify padding or documents: pass a 2D mask, or position_ids that "
                    "restart at each document"
                )
        here = mask[:, -length:].bool()
        return None if bool(here.all()) else [row.nonzero().squeeze(1) for row in here]

    def _after(self, model, args, kwargs, output):
        """Count the tokens of a forward and apply the updates of complete chunks."""
        context = kwargs.get(CONTEXT_KWARG)
        if context is None or context.weights is None:
            return
        length = (kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]).shape[1]
        step = length == 1 and context.valid is None
        if context.embedded is not None and step:
            context.weights.embeds.step(context.embedded)
        if not (step and _in_graph()):
            self._finish(context, length, step)

    @_outside_graph
    def _finish(self, context: ForwardContext, length: int, step: bool) -> None:
        weights, embedded = context.weights, context.embedded
        weights.mask = None
        chunk, rows = self.config.ttt_chunk, weights.rows
        lengths = [length] * rows if context.valid is None else list(map(len, context.valid))
        counts = [count + more for count, more in zip(weights.counts, lengths, strict=True)]
        if step:
            weights.advance()
            weights.fixed = weights.fixed or weights.static
            return
        weights.steps += 1
        if embedded is not None:
            for row in range(rows):
                here = slice(None) if context.valid is None else context.valid[row]
                tail = weights.embeds.tail_of(row, weights.counts[row])
                whole = (
                    embedded[row, here]
                    if not weights.counts[row]
                    else torch.cat([tail.to(embedded), embedded[row, here]])
                )
                left = len(whole) % chunk
                weights.embeds.put_tail(row, whole[len(whole) - left :] if left else None)
        weights.counts = [count % chunk for count in counts]
        weights.chunks = [before + count // chunk for before, count in zip(weights.chunks, counts, strict=True)]
        for state in weights.states():
            state.recount(weights.counts)
        if weights.static:
            if embedded is not None:
                weights.embeds.fix(chunk, weights.counts, embedded, None, True)
            weights.fixed = True

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        part: int | None = None,
        fast_weights: FastWeights | None = None,
        name: str | list[str] | None = None,
        tokenizer=None,
        progress: Callable[[int, int], None] | None = None,
        **_,
    ) -> FastWeights:
        """Read texts and return their fast weights, to save them or to pass them to ``generate`` or a cache.

        Keys and values are discarded: only the fast weights carry information about the texts.

        Example::

            >>> text = torch.randint(0, model.config.vocab_size, (1, 100))
            >>> book = model.read(text, name="a text")
            >>> book.texts[0][0]["name"], book.texts[0][0]["tokens"], book.chunks == [100 // model.config.ttt_chunk]
            ('a text', 100, True)

        Args:
            input_ids: (batch, t).
            attention_mask: (batch, t), 0 for padding.
            part: tokens per forward; default: max(8 * ttt_chunk, 8192).
            fast_weights: fast weights of earlier text, of one text or one per row, to continue from; not modified.
            name: name of the text, or one per row, for ``texts`` of the result.
            tokenizer: tokenizer of the texts; its fingerprint is stored and compared by ``load_fast_weights``.
            progress: called with (tokens read, total tokens) per row.

        Raises ValueError if ``fast_weights`` has neither one text nor one per row.
        """
        rows = len(input_ids)
        before = FastWeights() if fast_weights is None else fast_weights
        if before.rows not in (0, 1, rows):
            raise ValueError(f"fast_weights hold {before.rows} texts, but the batch has {rows} rows")
        cache = FastWeightCache(config=self.config)
        cache.fast_weights = before.select([0] * rows if before.rows == 1 else list(range(before.rows)))
        part = part or max(8 * self.config.ttt_chunk, 8192)
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        for start in range(0, input_ids.shape[1], part):
            stop = min(start + part, input_ids.shape[1])
            self(
                input_ids[:, start:stop],
                attention_mask=None if attention_mask is None else attention_mask[:, :stop],
                position_ids=None if positions is None else positions[:, start:stop],
                use_cache=True,
                logits_to_keep=1,
                **{CACHE: cache},
            )
            if progress is not None:
                progress(stop, input_ids.shape[1])
        found = cache.fast_weights
        for state in found.layers.values():
            state.round(self.dtype)
        found.model = self.fingerprint()
        found.tokenizer = before.tokenizer if tokenizer is None else fingerprint_of_tokenizer(tokenizer)
        names = [name] * rows if isinstance(name, str | None) else list(name)
        masks = [None] * rows if attention_mask is None else attention_mask.bool()
        found.texts = [
            (before.texts[row % before.rows] if before.texts else [])
            + [text_record((ids if mask is None else ids[mask]).tolist(), called)]
            for row, (ids, mask, called) in enumerate(zip(input_ids, masks, names, strict=True))
        ]
        return found

    def load_fast_weights(self, path: str, tokenizer=None, check: bool = True) -> FastWeights:
        """Load saved fast weights to the devices of the layers.

        Example::

            >>> model.read(torch.randint(0, model.config.vocab_size, (1, 100))).save(f"{folder}/book.safetensors")
            >>> model.load_fast_weights(f"{folder}/book.safetensors").texts[0][0]["tokens"]
            100

        Args:
            path: file that ``FastWeights.save`` wrote.
            tokenizer: tokenizer of the questions, to compare its fingerprint; None: not compared.
            check: reject fast weights of a model or tokenizer with another fingerprint.

        Raises ValueError if the file is damaged, does not fit this model, or fails ``check``.
        """
        found = FastWeights.load(path)
        found.check_fits(
            path, {mlp.layer: mlp.shape for mlp in self.fast_mlps}, self.config.ttt_chunk,
            embeddings=self.fast_mlps[0].reads_embeddings,
        )  # fmt: skip
        if check:
            found.check_made_with(path, self.fingerprint, tokenizer)
        finite: dict[torch.device, list[Tensor]] = {}
        for mlp in self.fast_mlps:
            place, state = mlp.down_proj.weight.device, found.layers[mlp.layer]
            if place.type != "meta":
                state.sums = [None if total is None else _to_device(total, place) for total in state.sums]
        for tensor in (one for state in found.states() for one in (*state.sums, *state.tails) if one is not None):
            finite.setdefault(tensor.device, []).append(tensor.isfinite().all())
        if not all(bool(torch.stack(flags).all()) for flags in finite.values()):
            raise ValueError(f"'{path}' holds fast weights that are not finite")
        return found

    def fingerprint(self) -> str:
        """Return a digest of the weights and update settings; an fp32 model and its bf16 copy have the same one."""
        return fingerprint_of_weights(
            self._whole_parameters(), {key: getattr(self.config, key) for key in FINGERPRINT_KEYS}
        )

    def _whole_parameters(self):
        for prefix, module in self.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if any(tensor.is_meta for tensor in own.values()):  # offloaded
                with _align_module_device(module, "cpu"):
                    yield from [(f"{prefix}.{name}", getattr(module, name).detach()) for name in own]
            elif module is not self.lm_head or not self.config.tie_word_embeddings:
                yield from ((f"{prefix}.{name}", tensor.detach()) for name, tensor in own.items())

    def generate(self, *args, fast_weights: FastWeights | None = None, **kwargs):
        """Generate as transformers does, starting from ``fast_weights``; those of one text are used for all rows.

        Example::

            >>> book = model.read(torch.randint(0, model.config.vocab_size, (1, 100)))
            >>> questions = torch.randint(0, model.config.vocab_size, (2, 10))
            >>> model.generate(questions, fast_weights=book, max_new_tokens=5, do_sample=False).shape
            torch.Size([2, 15])

        Raises ValueError if both ``fast_weights`` and ``past_key_values`` are given.
        """
        if fast_weights is not None and _cache_in(kwargs) is not None:
            raise ValueError("fast_weights and past_key_values exclude each other: pass one of them")
        self._book, before = fast_weights, self.config._attn_implementation
        if self.fast_mlps and before == "sdpa":
            self.config._attn_implementation = GROUPED
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._book, self.config._attn_implementation = None, before

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        kind, given = generation_config.cache_implementation, _cache_in(model_kwargs) is not None
        mode = args[0] if args else kwargs.get("generation_mode")
        if self.fast_mlps and getattr(mode, "value", None) == "assisted_generation":
            raise NotImplementedError(ASSISTED)
        if self.fast_mlps and not given and generation_config.use_cache and kind not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation={kind} cannot hold fast weights: use static or dynamic (default)")
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = _cache_in(model_kwargs)
        if self.fast_mlps and cache is not None:
            if not isinstance(cache, _FastWeightsInCache):
                _convert_cache(cache)
            if self._book is not None and not given:
                static, cache.fast_weights = cache.fast_weights.static, self._book.select(list(range(self._book.rows)))
                cache.fast_weights.static = static
        return result

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        cache = kwargs.pop(CACHE, None) if past_key_values is None else past_key_values
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **{CACHE: cache}, **kwargs
        )
        weights = getattr(_cache_in(inputs), "fast_weights", None)
        if weights is not None:
            if weights.asked == weights.steps:  # the last forward ran in a graph of the user, which cannot count
                weights.advance()
            weights.asked = weights.steps
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                weights.mask = attention_mask  # the forward may get a 4D mask
            elif attention_mask is None:  # no padding; transformers 5.24 may make a 4D mask all the same
                tokens = inputs.get("input_ids")
                tokens = inputs["inputs_embeds"][..., 0] if tokens is None else tokens
                weights.mask = torch.ones_like(tokens, dtype=torch.bool)
        return inputs

    def get_compiled_call(self, compile_config=None):
        """Return the compiled forward for one token; updates of complete chunks are applied outside of its graph."""
        call = super().get_compiled_call(compile_config)
        if not self.fast_mlps:
            return call

        def step(*args, **kwargs):
            tokens = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
            if tokens is None or tokens.shape[1] > 1:  # prefill in parts
                return self(*args, **kwargs)
            weights = _cache_in(kwargs).fast_weights
            out = call(*args, **kwargs)
            weights.advance()
            return out

        return step

    def generate_batch(self, *args, **kwargs):
        raise NotImplementedError(CONTINUOUS)

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(CONTINUOUS)


def fingerprint_of_weights(named: Iterable[tuple[str, Tensor]], settings: dict) -> str:
    """Return a SHA-256 digest of weights: names, shapes and 64 elements of each, rounded to bf16.

    ``settings``: values of FINGERPRINT_KEYS, which are part of the digest.
    """
    shapes: dict[str, list[int]] = {}
    picked: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in named:
        shapes[name] = list(tensor.shape)
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel():  # quantized tensors: only names and shapes
            numbers = tensor.reshape(-1)[:: max(1, tensor.numel() // 64)][:64]
            if tensor.device.type == "cpu":
                numbers = numbers.clone()  # an offloaded tensor is on the CPU only during this iteration
            picked.setdefault((tensor.device, tensor.dtype), {})[name] = numbers
    content = {}
    for (_, dtype), tensors in picked.items():
        numbers = torch.cat(list(tensors.values()))  # a few kernels and one synchronization per device
        numbers = numbers.to(torch.bfloat16 if dtype.is_floating_point else torch.int16).view(torch.int16).tolist()
        for name, tensor in tensors.items():
            content[name], numbers = numbers[: len(tensor)], numbers[len(tensor) :]
    listed = [[name, shapes[name], content.get(name)] for name in sorted(shapes)]
    said = {key: settings[key] for key in FINGERPRINT_KEYS} | {"ttt_lr": float(settings["ttt_lr"])}
    return hashlib.sha256(json.dumps([listed, said], sort_keys=True).encode()).hexdigest()


def fingerprint_of_tokenizer(tokenizer) -> str:
    """Return a SHA-256 digest; tokenizers with the same digest produce the same token IDs."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()


def text_record(numbers: list[int], name: str | None) -> dict:
    """Return the entry of ``FastWeights.texts`` for a text, given its token IDs."""
    digest = hashlib.sha256(json.dumps(numbers).encode()).hexdigest()
    return dict(name=name, tokens=len(numbers), sha256=digest)


ASSISTED = (
    "fast weights cannot be rolled back: assisted generation (assistant_model, prompt_lookup_num_tokens) and crop() "
    "are not supported"
)
CONTINUOUS = "continuous batching is not supported (it mixes texts in one row): use generate with a batch of prompts"


def _hand_over(mlp: nn.Module, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give the ForwardContext among an attention's arguments to the MLP after it.

    A hook of the decoder layer would not do: transformers 5.24 recomputes a layer without calling its hooks.
    """
    context = kwargs.pop(CONTEXT_KWARG, None)
    if isinstance(mlp, FastWeightMLP):
        mlp.context = context
    return args, kwargs


def _documents(kwargs: dict, rows: int, length: int) -> list[list[int]] | None:
    """Return each row's document bounds, found where positions restart, as in attention; None: one document per row."""
    lengths, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if lengths is not None and rows == 1:
        bounds = [int(bound) for bound in lengths]
        return [bounds] if len(bounds) > 2 else None
    if length == 1 or positions is None or positions.dim() != 2 or kwargs.get("attention_mask") is not None:
        return None
    starts = (positions[:, 1:] - positions[:, :-1]) != 1
    if not bool(starts.any()):
        return None
    bounds = [[0, *(place + 1 for place in row.nonzero().squeeze(1).tolist()), length] for row in starts]
    return bounds * rows if len(bounds) == 1 else bounds


# Keys of config.json for fast weights, with their defaults
FAST_WEIGHT_KEYS = dict(
    ttt_mode=True,
    ttt_layers=[],
    ttt_chunk=1024,
    ttt_lr=1.0,
    ttt_clip=None,
    ttt_bound=None,
    ttt_trained_length=None,
    ttt_proj=True,
    ttt_target="hidden_states",
    ttt_conv_kernel=5,
    ttt_update_norms=None,
)


def complete_keys(config) -> None:
    """Give a configuration the keys for fast weights that it lacks, with their defaults."""
    for key, value in FAST_WEIGHT_KEYS.items():
        if not hasattr(config, key):
            setattr(config, key, value)


class InPlaceTTTQwen3Config(Qwen3Config):
    """Extend Qwen3's configuration by the keys for fast weights, with the defaults of ``FAST_WEIGHT_KEYS``."""

    def __init__(self, **keys):
        super().__init__(**{**FAST_WEIGHT_KEYS, **keys})
        self.ttt_layers = list(self.ttt_layers)


class InPlaceTTTQwen2Config(Qwen2Config):
    """Extend Qwen2.5's configuration by the keys for fast weights, with the defaults of ``FAST_WEIGHT_KEYS``."""

    def __init__(self, **keys):
        super().__init__(**{**FAST_WEIGHT_KEYS, **keys})
        self.ttt_layers = list(self.ttt_layers)


class InPlaceTTTLlamaConfig(LlamaConfig):
    """Extend Llama's configuration by the keys for fast weights, with the defaults of ``FAST_WEIGHT_KEYS``."""

    def __init__(self, **keys):
        super().__init__(**{**FAST_WEIGHT_KEYS, **keys})
        self.ttt_layers = list(self.ttt_layers)


class InPlaceTTTQwen3ForCausalLM(FastWeightsMixin, Qwen3ForCausalLM):
    """Run Qwen3 with fast weights in the layers ``ttt_layers``."""

    config_class = InPlaceTTTQwen3Config


class InPlaceTTTQwen2ForCausalLM(FastWeightsMixin, Qwen2ForCausalLM):
    """Run Qwen2.5 with fast weights in the layers ``ttt_layers``."""

    config_class = InPlaceTTTQwen2Config


class InPlaceTTTLlamaForCausalLM(FastWeightsMixin, LlamaForCausalLM):
    """Run Llama with fast weights in the layers ``ttt_layers``."""

    config_class = InPlaceTTTLlamaConfig
