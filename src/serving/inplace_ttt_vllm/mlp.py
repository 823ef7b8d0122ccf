"""Compute the MLP with fast weights: one operation for vLLM's graphs, and the state of each request slot."""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from inplace_ttt_vllm.hf.modeling_inplace_ttt import join_sum, split_sum
from inplace_ttt_vllm.products import add_updates
from inplace_ttt_vllm.settings import rest_dtype
from inplace_ttt_vllm.ttt.bounded import BoundedSum, apply_bound
from inplace_ttt_vllm.ttt.layer import LayerState, continue_layer


@dataclass
class Step:
    """Describe the requests of a forward: for each, its slot, its rows in the batch, and the tokens before them."""

    slots: list[int]
    starts: list[int]  # one more than slots
    before: list[int]  # tokens in the state of the slot, those of a loaded book included

    @property
    def decodes(self) -> bool:
        """Return True if each request has one token."""
        return len(self.slots) == self.starts[-1]

    def single(self) -> tuple[list[int], list[int]]:
        """Return the numbers of the requests with one token, and their rows in the batch."""
        pairs = enumerate(zip(self.starts[:-1], self.starts[1:], strict=True))
        found = [(number, start) for number, (start, stop) in pairs if stop - start == 1]
        return [number for number, _ in found], [start for _, start in found]


class Rows(NamedTuple):
    """Name, for each row of a batch in which requests decode, where its state is. All (b,) int64, on the device."""

    slots: Tensor
    places: Tensor  # in the unfinished chunk
    updates: Tensor  # the slot of the sum of updates; the last slot, which has none, before the first complete chunk

    def first(self, number: int) -> "Rows":
        """Return the first rows."""
        return Rows(*(one[:number] for one in self))


class Slots:
    """Hold what the layers of a model share: the step, the place of each decoded token, and the embeddings.

    Graphs read where the state of a row is, so that is in buffers on the device, which ``place`` fills before a replay.
    The last slot belongs to no request: padded rows use it.
    """

    def __init__(self, number: int, rows: int, chunk: int, device: torch.device):
        self.number, self.rows, self.chunk = number, rows, chunk  # rows: of the largest batch in which requests decode
        self.step: Step | None = None  # None: a forward without requests, to profile or to capture
        # of each row: the slot, the place in its chunk, and the slot with its updates: the last one while it has none
        self.rows_of_graphs = Rows(*torch.zeros(3, rows, dtype=torch.int64, device=device))
        self.single: tuple[Rows, Tensor] | None = None  # requests that decode in a mixed batch, and their rows
        self.chunks = [0] * number  # complete chunks in the sum of updates, by slot
        self.earlier = [0] * number  # tokens that the state of a slot had before its request, from a book
        self.loaded = [False] * number  # True: the sum of a slot is not zero, whatever ``chunks`` says
        self.failed: set[int] = set()  # slots of requests whose book could not be loaded
        self.embeds: Tensor | None = None  # (tokens, d) embeddings of a forward; None: targets use the MLP's inputs
        self.embed_tails: Tensor | None = None  # (slots + 1, chunk, d), embeddings of the unfinished chunks

    def keep_embeddings(self, tokens: int, d: int) -> None:
        """Allocate the buffers of embeddings, for ``ttt_target: input_embed``."""
        self.embeds = torch.zeros(tokens, d, device=self.rows_of_graphs.slots.device)
        self.embed_tails = self.embeds.new_zeros(self.number + 1, self.chunk, d)

    def place(self, step: Step | None) -> None:
        """Set the step, and copy to the device where the state of each request is."""
        self.step, self.single = step, None
        last = self.number
        slots, places, updates = [last] * self.rows, [0] * self.rows, [last] * self.rows
        if step is not None:
            number = len(step.slots)
            slots[:number] = step.slots
            places[:number] = [before % self.chunk for before in step.before]
            updates[:number] = [slot if self.chunks[slot] or self.loaded[slot] else last for slot in step.slots]
        values = torch.tensor([slots, places, updates])
        for buffer, row in zip(self.rows_of_graphs, values, strict=True):
            buffer.copy_(row, non_blocking=True)
        if step is not None and not step.decodes:
            numbers, rows = step.single()
            if numbers:
                numbers, rows = (torch.tensor(one, device=self.rows_of_graphs.slots.device) for one in (numbers, rows))
                self.single = Rows(*(buffer[numbers] for buffer in self.rows_of_graphs)), rows


class _Parameter(nn.Module):
    """Hold one weight, with the name that it has in exported models."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape), requires_grad=False)


def keep_embeddings(embeds: Tensor, out: Tensor, name: str) -> None:
    """Copy the embeddings (t, d) of a forward to out and to the buffer from which the layers make targets."""
    out.copy_(embeds)
    get_forward_context().no_compile_layers[name].slots.embeds[: len(embeds)].copy_(embeds)


def fast_weight_mlp(x: Tensor, z: Tensor, out: Tensor, name: str) -> None:
    """Write this rank's part of the down-projection of z (t, f) to out (t, d); x (t, d) is the MLP's input."""
    get_forward_context().no_compile_layers[name].run(x, z, out)


def _no_values(*args) -> None:
    return None


# They write to tensors of the caller: a captured graph that follows reads the addresses that it was captured with
if not hasattr(torch.ops.inplace_ttt, "fast_weight_mlp"):
    _library = torch.library.Library("inplace_ttt", "FRAGMENT")
    for _operation in (fast_weight_mlp, keep_embeddings):
        direct_register_custom_op(
            _operation.__name__, _operation, mutates_args=["out"], fake_impl=_no_values, target_lib=_library
        )


class FastWeightMLP(nn.Module):
    """Extend vLLM's gated MLP: the down-projection of each request learns while the request is read."""

    def __init__(self, mlp: nn.Module, config, number: int, slots: Slots, name: str):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = mlp.gate_up_proj, mlp.down_proj, mlp.act_fn
        self.chunk, self.eta, self.slots, self.name = config.ttt_chunk, config.ttt_lr, slots, name
        self.number = number
        clip = config.ttt_clip
        self.clip = clip[list(config.ttt_layers).index(number)] if isinstance(clip, list) else clip
        self.trained = (config.ttt_trained_length or 0) // self.chunk  # in complete chunks
        self.bound = config.ttt_bound if self.trained else None
        group = get_tp_group()
        self.ranks, self.tp_group = group.world_size, group.device_group
        d, f = config.hidden_size, config.intermediate_size // self.ranks
        self.ttt_conv = _Parameter(d, 1, config.ttt_conv_kernel)
        self.ttt_proj = _Parameter(d, d) if config.ttt_proj else None
        # sums of updates in the dtype of products, and the rest of the exact fp32 sums
        self.updates = torch.zeros(slots.number + 1, d, f)
        dtype = rest_dtype(self.updates.dtype)
        self.rests = None if dtype is None else torch.zeros(slots.number + 1, d, f, dtype=dtype)
        self.limits = torch.full((slots.number + 1,), math.inf, dtype=torch.float32)  # norms of sums, see ttt_bound
        self.tails = torch.zeros(slots.number + 1, self.chunk, d)  # inputs of unfinished chunks
        # True: this layer stores the embeddings of unfinished chunks, which the other layers read before it
        self.is_last = False
        self.loaded_weight: Tensor | None = None  # W_down as it was loaded: on a CPU, vLLM replaces it by a packed one

    @property
    def weight(self) -> Tensor:
        """Return W_down of this rank, (d, f)."""
        return self.down_proj.weight if self.loaded_weight is None else self.loaded_weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.act_fn(self.gate_up_proj(x)[0])
        out = torch.empty_like(x)
        torch.ops.inplace_ttt.fast_weight_mlp(x, z, out, self.name)
        return tensor_model_parallel_all_reduce(out) if self.ranks > 1 else out

    def inner(self, x: Tensor) -> Tensor:
        """Return the inputs of the down-projection (t, f) of the MLP's inputs (t, d), outside of compiled graphs."""
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        return F.silu(gate) * up

    def run(self, x: Tensor, z: Tensor, out: Tensor) -> None:
        """Write the outputs of all tokens of a forward, and store what the next forwards need."""
        step, shared = self.slots.step, self.slots
        embeds = None if shared.embeds is None else shared.embeds[: len(x)]
        if step is None or step.decodes:
            torch.mm(z, self.weight.t(), out=out)
            if len(x) <= shared.rows:
                self._decode(x, z, out, shared.rows_of_graphs.first(len(x)), embeds)
            return
        out[step.starts[-1] :].zero_()  # padding
        for slot, before, start, stop in zip(step.slots, step.before, step.starts[:-1], step.starts[1:], strict=True):
            if stop - start > 1:
                here = slice(start, stop)
                own = None if embeds is None else embeds[here]
                out[here] = self._read(slot, before, x[here], z[here], own)
        if shared.single is not None:
            where, rows = shared.single
            part = z[rows] @ self.weight.t()
            self._decode(x[rows], z[rows], part, where, None if embeds is None else embeds[rows])
            out[rows] = part

    def _decode(self, x: Tensor, z: Tensor, out: Tensor, rows: Rows, embeds: Tensor | None) -> None:
        """Add the updates' part of one token per request, and store the inputs. Part of graphs.

        ``embeds`` (b, d): the embeddings of the same tokens, or None.
        """
        add_updates(out, self.updates, rows.updates, z)
        self.tails[rows.slots, rows.places] = x
        if self.is_last and embeds is not None:
            self.slots.embed_tails[rows.slots, rows.places] = embeds

    def _read(self, slot: int, before: int, x: Tensor, z: Tensor, embeds: Tensor | None) -> Tensor:
        """Return the outputs (t, d) of several tokens of a request, and change its state.

        Args:
            before: tokens in the state before these.
            x, z, embeds: (t, d), (t, f) and (t, d) or None, inputs of the MLP and of its down-projection, embeddings.
        """
        chunks, pending = divmod(before, self.chunk)
        shared, length = self.slots, len(x)
        if pending + length < self.chunk:
            self.put_tail(slot, x, pending, embeds)
            plain = F.linear(z, self.weight)
            return plain + F.linear(z, self.updates[slot]) if shared.chunks[slot] or shared.loaded[slot] else plain
        tail = self.tails[slot, :pending]
        known = torch.cat([self.inner(tail), z]) if pending else z
        earlier = None if embeds is None else shared.embed_tails[slot, :pending, None]
        state, outs = LayerState(self.sum_of(slot)[None], tail[:, None], earlier), []
        for start, stop in self._spans(chunks, pending, length):
            rows = known[start + pending - len(state.inputs) : stop + pending]
            out, state = continue_layer(
                x[start:stop, None], self.weight, state, down_input=lambda inputs, rows=rows: rows[:, None],
                conv_weight=self.ttt_conv.weight, projection=None if self.ttt_proj is None else self.ttt_proj.weight,
                eta=self.eta, chunk_size=self.chunk, embeddings=None if embeds is None else embeds[start:stop, None],
                clip=self.clip, tp_group=self.tp_group,
            )  # fmt: skip
            outs.append(out[:, 0])
            if not len(state.inputs):
                state = state._replace(updates=self._bounded(slot, (before + stop) // self.chunk, state.updates))
        self.store(slot, state.updates[0])
        self.put_tail(slot, state.inputs[:, 0], 0, None if embeds is None else state.embeddings[:, 0])
        return torch.cat(outs)

    def _spans(self, chunks: int, pending: int, length: int) -> list[tuple[int, int]]:
        """Divide the tokens of a forward at the ends of the chunks after which the sum has a bound."""
        if self.bound is None or chunks + (pending + length) // self.chunk < self.trained:
            return [(0, length)]
        first = max(1, self.trained - chunks) * self.chunk - pending
        edges = [0, *range(first, length, self.chunk), length]
        return list(itertools.pairwise(edges))

    def _bounded(self, slot: int, chunks: int, total: Tensor) -> Tensor:
        """Scale a sum of updates (1, d, f) after this many chunks down to its limit (``ttt_bound``)."""
        if self.bound is None:
            return total
        carry = BoundedSum(total, self.limits[slot : slot + 1])
        carry = apply_bound(carry, chunks, self.bound, self.trained, self.tp_group)
        self.limits[slot] = carry.limits[0]
        return carry.updates

    def fold(self, slot: int, chunks: int) -> None:
        """Apply the update of the chunk that decoding has completed, after this many complete chunks."""
        tail = self.tails[slot].clone()
        embeds = None if self.slots.embeds is None else self.slots.embed_tails[slot].clone()
        self._read(slot, chunks * self.chunk, tail, self.inner(tail), embeds)

    def put_tail(self, slot: int, x: Tensor, place: int, embeds: Tensor | None) -> None:
        """Store inputs (t, d), and embeddings, of the unfinished chunk of a slot from a place on."""
        self.tails[slot, place : place + len(x)] = x
        if self.is_last and embeds is not None:
            self.slots.embed_tails[slot, place : place + len(x)] = embeds

    def gather(self, part: Tensor) -> Tensor:
        """Concatenate the columns (d, f / ranks) of all tensor-parallel ranks; return (d, f)."""
        if self.ranks == 1:
            return part
        bits = part.contiguous().view(torch.uint8)  # NCCL has no int16
        parts = [torch.empty_like(bits) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, bits, group=self.tp_group)
        return torch.cat([one.view(part.dtype) for one in parts], dim=1)

    def sum_of(self, slot: int) -> Tensor:
        """Return the exact sum of updates of a slot (d, f), fp32."""
        return self.updates[slot].float() if self.rests is None else join_sum(self.updates[slot], self.rests[slot])

    def store(self, slot: int, total: Tensor) -> None:
        """Store an exact sum of updates (d, f): rounded for products, and the rest.

        One that is not finite is dropped, because it would reach the keys and values of other requests.
        """
        total = torch.where(total.isfinite().all(), total, 0)
        if self.rests is None:
            self.updates[slot] = total
        else:
            self.updates[slot], self.rests[slot] = split_sum(total, self.updates.dtype)

    def clear(self, slot: int) -> None:
        """Start a text in a slot."""
        self.updates[slot].zero_()
        if self.rests is not None:
            self.rests[slot].zero_()
        self.limits[slot] = math.inf
