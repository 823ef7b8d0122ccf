"""The MLP with fast weights: one operation for vLLM's graphs, and the state of each request slot."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.utils.torch_utils import direct_register_custom_op

from inplace_ttt_vllm.products import add_updates
from inplace_ttt_vllm.ttt.layer import LayerState, continue_layer


@dataclass
class Step:
    """Describe the requests of a forward: for each, its slot, its rows in the batch, and the tokens before them."""

    slots: list[int]
    starts: list[int]  # one more than slots
    computed: list[int]


class Slots:
    """Hold what the layers of a model share: the step, the place of each decoded token, and the embeddings.

    Graphs read the place of a token, so it is in buffers on the device, which ``place`` fills before a replay. The last
    slot belongs to no request: padded rows use it.
    """

    def __init__(self, number: int, chunk: int, device: torch.device):
        self.number, self.chunk = number, chunk
        self.step: Step | None = None  # None: a forward without requests, to profile or to capture
        self.slots = torch.full((number,), number, dtype=torch.int64, device=device)
        self.places = torch.zeros(number, dtype=torch.int64, device=device)
        self.full_chunks = [0] * number  # complete chunks in the sum of updates, by slot
        self.embeds: Tensor | None = None  # (tokens, d) embeddings of a forward; None: targets use the MLP's inputs
        self.embed_tails: Tensor | None = None  # (slots + 1, chunk, d), embeddings of the unfinished chunks

    def keep_embeddings(self, tokens: int, d: int) -> None:
        """Allocate the buffers of embeddings, for ``ttt_target: input_embed``."""
        self.embeds = self.slots.new_zeros(tokens, d, dtype=torch.get_default_dtype())
        self.embed_tails = self.embeds.new_zeros(self.number + 1, self.chunk, d)

    def place(self, step: Step | None) -> None:
        """Set the step, and copy the slot and the place in its chunk of each request's first token to the device."""
        self.step = step
        slots, places = [self.number] * self.number, [0] * self.number
        if step is not None:
            slots[: len(step.slots)] = step.slots
            places[: len(step.slots)] = [computed % self.chunk for computed in step.computed]
        self.slots.copy_(torch.tensor(slots), non_blocking=True)
        self.places.copy_(torch.tensor(places), non_blocking=True)


class _Parameter(nn.Module):
    """Hold one weight, with the name that it has in exported models."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape), requires_grad=False)


LAYERS: dict[str, "FastWeightMLP"] = {}  # by name, for the operations


def keep_embeddings(embeds: Tensor, out: Tensor, name: str) -> None:
    """Copy the embeddings (t, d) of a forward to out and to the buffer from which the layers make targets."""
    out.copy_(embeds)
    LAYERS[name].slots.embeds[: len(embeds)].copy_(embeds)


def fast_weight_mlp(x: Tensor, z: Tensor, out: Tensor, name: str) -> None:
    """Write this rank's part of the down-projection of z (t, f) to out (t, d); x (t, d) is the MLP's input."""
    LAYERS[name].run(x, z, out)


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
        clip = getattr(config, "ttt_clip", None)
        self.clip = clip[list(config.ttt_layers).index(number)] if isinstance(clip, list) else clip
        d, f = config.hidden_size, config.intermediate_size // get_tp_group().world_size
        self.ttt_conv = _Parameter(d, 1, config.ttt_conv_kernel)
        self.ttt_proj = _Parameter(d, d) if config.ttt_proj else None
        # sums of updates in the dtype of products, and what is missing to the exact sums
        self.register_buffer("updates", torch.zeros(slots.number + 1, d, f), persistent=False)
        self.register_buffer("rests", torch.zeros(slots.number + 1, d, f), persistent=False)
        self.register_buffer("tails", torch.zeros(slots.number + 1, self.chunk, d), persistent=False)
        self.weight: Tensor | None = None  # W_down of this rank, (d, f)
        self.is_last = (
            False  # True: this layer stores the embeddings of unfinished chunks, which the others read before
        )
        LAYERS[name] = self

    def forward(self, x: Tensor) -> Tensor:
        z = self.act_fn(self.gate_up_proj(x)[0])
        out = torch.empty_like(x)
        torch.ops.inplace_ttt.fast_weight_mlp(x, z, out, self.name)
        return tensor_model_parallel_all_reduce(out) if get_tp_group().world_size > 1 else out

    def inner(self, x: Tensor) -> Tensor:
        """Return the inputs of the down-projection (t, f) of the MLP's inputs (t, d), outside of compiled graphs."""
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        return F.silu(gate) * up

    def run(self, x: Tensor, z: Tensor, out: Tensor) -> None:
        """Write the outputs of all tokens of a forward, and store what the next forwards need."""
        step, shared = self.slots.step, self.slots
        embeds = None if shared.embeds is None else shared.embeds[: len(x)]
        if step is None or len(step.slots) == step.starts[-1]:  # one token per request
            torch.mm(z, self.weight.t(), out=out)
            if len(x) <= shared.number:
                self._decode(x, z, out, shared.slots[: len(x)], shared.places[: len(x)], embeds)
            return
        out[step.starts[-1] :].zero_()  # padding
        single = []
        for number, slot in enumerate(step.slots):
            start, stop = step.starts[number], step.starts[number + 1]
            if stop - start == 1:
                single.append((number, start))
            elif stop > start:
                here = slice(start, stop)
                own = None if embeds is None else embeds[here]
                out[here] = self._read(slot, step.computed[number], x[here], z[here], own)
        if single:
            numbers, rows = (torch.tensor(one, device=x.device) for one in zip(*single, strict=True))
            part = z[rows] @ self.weight.t()
            own = None if embeds is None else embeds[rows]
            self._decode(x[rows], z[rows], part, shared.slots[numbers], shared.places[numbers], own)
            out[rows] = part

    def _decode(self, x: Tensor, z: Tensor, out: Tensor, slots: Tensor, places: Tensor, embeds: Tensor | None) -> None:
        """Add the updates' part of one token per request, and store the inputs. Part of graphs.

        ``embeds`` (b, d): the embeddings of the same tokens, or None.
        """
        add_updates(out, self.updates, slots, z)
        self.tails[slots, places] = x
        if self.is_last and embeds is not None:
            self.slots.embed_tails[slots, places] = embeds

    def _read(self, slot: int, computed: int, x: Tensor, z: Tensor, embeds: Tensor | None) -> Tensor:
        """Return the outputs of several tokens of a request, and change its state.

        Args:
            computed: tokens of the request before these.
            x, z, embeds: (t, d), (t, f) and (t, d) or None, inputs of the MLP and of its down-projection, embeddings.
        """
        pending, shared = computed % self.chunk, self.slots
        if pending + len(x) < self.chunk:
            self.tails[slot, pending : pending + len(x)] = x
            if self.is_last and embeds is not None:
                shared.embed_tails[slot, pending : pending + len(x)] = embeds
            plain = F.linear(z, self.weight)
            return plain if computed < self.chunk else plain + F.linear(z, self.updates[slot].to(z.dtype))
        tail = self.tails[slot, :pending]
        known = torch.cat([self.inner(tail), z]) if pending else z
        earlier = None if embeds is None else shared.embed_tails[slot, :pending, None]
        state = LayerState(self.sum_of(slot)[None], tail[:, None], earlier)
        out, state = continue_layer(
            x[:, None], self.weight, state, down_input=lambda inputs: known[:, None], conv_weight=self.ttt_conv.weight,
            projection=None if self.ttt_proj is None else self.ttt_proj.weight, eta=self.eta, chunk_size=self.chunk,
            embeddings=None if embeds is None else embeds[:, None], clip=self.clip,
            tp_group=get_tp_group().device_group,
        )  # fmt: skip
        self.store(slot, state.updates[0])
        left = state.inputs[:, 0]
        self.tails[slot, : len(left)] = left
        if self.is_last and embeds is not None:
            shared.embed_tails[slot, : len(left)] = state.embeddings[:, 0]
        return out[:, 0]

    def fold(self, slot: int) -> None:
        """Apply the update of the chunk that decoding has completed."""
        tail = self.tails[slot].clone()
        embeds = None if self.slots.embeds is None else self.slots.embed_tails[slot].clone()
        self._read(slot, 0, tail, self.inner(tail), embeds)

    def sum_of(self, slot: int) -> Tensor:
        """Return the exact sum of updates of a slot (d, f), fp32."""
        return self.updates[slot].float() + self.rests[slot].float()

    def store(self, slot: int, total: Tensor) -> None:
        """Store a sum of updates (d, f): rounded for products, and what is missing to the exact sum."""
        self.updates[slot] = total
        self.rests[slot] = total - self.updates[slot].float()

    def clear(self, slot: int) -> None:
        """Start a text in a slot."""
        self.updates[slot].zero_()
        self.rests[slot].zero_()
