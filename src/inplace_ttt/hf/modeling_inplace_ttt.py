"""Qwen3 and Llama whose MLP down-projections learn while they read (In-Place Test-Time Training, arXiv 2604.06169).

This file lies in every exported folder and needs torch and transformers alone:

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**tokenizer("Once", return_tensors="pt"))

    book = model.read(**tokenizer(text, return_tensors="pt"))      # read once ...
    book.save("book.safetensors")                                   # model.load_fast_weights("book.safetensors")
    model.generate(**question, fast_weights=book)                   # ... ask many times

In a TTT layer ``W_down`` is the start of every document. Its tokens are read in chunks of ``ttt_chunk``; a chunk sees
the weight that earlier chunks have left, and when it is full adds ``ttt_lr * sum_t v_t z_t^T``, with z the input of the
down-projection and v the targets: a convolution of the MLP's input inside the chunk, then a projection. ``ttt_clip``
is the largest norm of one chunk's update over that of ``W_down``; a larger one is scaled down to it.

Where the package ``inplace_ttt`` is installed, full chunks go through its operation, which has kernels for Hopper GPUs.
"""

import os
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

try:
    from inplace_ttt.ttt import ChunkTargets, FastWeightState, fast_weight_linear
except ImportError:
    fast_weight_linear = None


@dataclass
class RowState:
    """Hold what one text has written to one layer. Tensors are replaced, never changed: copies may share them."""

    update: Tensor | None = None  # (d, f) fp32, the sum of what full chunks wrote; None: nothing
    weight: Tensor | None = None  # (d, f), W_down + update in the dtype of the model; None: W_down
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # z (t, f), u (t, d) of the chunk being read
    count: int = 0  # tokens in it

    def copy(self) -> "RowState":
        return RowState(self.update, self.weight, list(self.pending), self.count)


class FastWeights:
    """The fast weights of all TTT layers for each text of a batch."""

    def __init__(self):
        self.layers: dict[int, list[RowState]] = {}
        self._stacked: dict[int, tuple[list, Tensor]] = {}

    def rows(self, layer: int, batch_size: int) -> list[RowState]:
        rows = self.layers.setdefault(layer, [RowState() for _ in range(batch_size)])
        if len(rows) != batch_size:
            raise ValueError(f"these fast weights are of {len(rows)} texts, and the batch has {batch_size}")
        return rows

    def weights(self, layer: int, start: Tensor) -> Tensor:
        """(batch, d, f): what each text has made of ``start``, laid side by side once after each change."""
        own = [start if row.weight is None else row.weight for row in self.layers[layer]]
        known, stacked = self._stacked.get(layer, ([], None))
        if len(known) != len(own) or any(a is not b for a, b in zip(known, own, strict=True)):
            stacked = torch.stack(own)
            self._stacked[layer] = own, stacked
        return stacked

    def select(self, indices: list[int]) -> "FastWeights":
        """The texts with these numbers, which may come more than once."""
        chosen = FastWeights()
        chosen.layers = {layer: [rows[i].copy() for i in indices] for layer, rows in self.layers.items()}
        return chosen

    def save(self, path: str) -> None:
        tensors = {}
        for layer, rows in self.layers.items():
            for number, row in enumerate(rows):
                name = f"{layer}.{number}."
                tensors[name + "count"] = torch.tensor(row.count)
                if row.update is not None:
                    tensors[name + "update"] = row.update.contiguous()
                if row.pending:
                    for key, parts in zip(("z", "u"), zip(*row.pending, strict=True), strict=True):
                        tensors[name + key] = torch.cat(parts).contiguous()
        save_file(tensors, path)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(path, 0o666 & ~mask)  # safetensors writes for one user alone

    @classmethod
    def load(cls, path: str) -> "FastWeights":
        """Read what ``save`` wrote. Raises ValueError for a file that holds anything else."""
        found = cls()
        try:
            with safe_open(path, framework="pt") as file:
                present = set(file.keys())
                for layer, number in sorted({tuple(map(int, name.split(".")[:2])) for name in present}):
                    names = {key: f"{layer}.{number}.{key}" for key in ("count", "update", "z", "u")}
                    read = {key: file.get_tensor(name) for key, name in names.items() if name in present}
                    present -= set(names.values())
                    pending = [(read["z"], read["u"])] if "z" in read else []
                    row = RowState(read.get("update"), None, pending, int(read["count"]))
                    if row.count != sum(len(z) for z, _ in pending) or any(len(z) != len(u) for z, u in pending):
                        raise ValueError("tokens that do not add up")
                    if number != len(found.layers.setdefault(layer, [])):
                        raise ValueError("a text that is missing")
                    found.layers[layer].append(row)
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"'{path}' holds no fast weights ({error})") from error
        if present:
            raise ValueError(f"'{path}' holds no fast weights (but {sorted(present)[0]})")
        return found


class FastWeightCache(DynamicCache):
    """Keys, values and fast weights."""

    def __init__(self, *args, fast_weights: FastWeights | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.fast_weights = fast_weights or FastWeights()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.fast_weights = self.fast_weights.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.fast_weights = self.fast_weights.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        size = max((len(rows) for rows in self.fast_weights.layers.values()), default=0)
        self.fast_weights = self.fast_weights.select([i for i in range(size) for _ in range(repeats)])

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError("fast weights cannot unread: assisted generation and crop do not work with them")


@dataclass
class Reading:
    """Hold what a forward of the model tells its TTT layers."""

    fast_weights: FastWeights
    valid: Tensor | None  # (batch, t): False where a token is padding; None: no padding
    embedded: Tensor | None  # (batch, t, d), for ttt_target = input_embed
    going_on: bool  # a later forward continues the texts


class FastWeightMLP(nn.Module):
    """A gated MLP whose down-projection learns while it reads."""

    def __init__(self, mlp: nn.Module, config, layer: int):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        self.layer, self.chunk, self.eta, self.clip = layer, config.ttt_chunk, config.ttt_lr, config.ttt_clip
        d = config.hidden_size
        kernel = config.ttt_conv_kernel
        self.ttt_conv = nn.Conv1d(d, d, kernel, padding=kernel // 2, groups=d, bias=False)
        self.ttt_proj = nn.Linear(d, d, bias=False) if config.ttt_proj else None  # its weight is P: c P, not c P^T
        self.reads_embeddings = config.ttt_target == "input_embed"
        self.reading: Reading | None = None

    def forward(self, x: Tensor) -> Tensor:
        reading = self.reading
        z = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        u = reading.embedded if self.reads_embeddings else x
        rows = reading.fast_weights.rows(self.layer, x.shape[0])
        for row in rows:
            if row.weight is None:  # nothing was written yet, or it was loaded from a file
                row.pending = [(a.to(z), b.to(u)) for a, b in row.pending]
                if row.update is not None:
                    row.update = row.update.to(x.device, _sum_dtype(self.down_proj.weight))
                    row.weight = self._sum(row.update)
        if x.shape[1] == 1 and reading.valid is None:
            return self._one_token(z, u, rows)
        out = torch.zeros_like(x)
        for number, row in enumerate(rows):
            here = slice(None) if reading.valid is None else reading.valid[number].nonzero().squeeze(1)
            out[number, here] = self._read(row, z[number, here], u[number, here])
        return out

    def _one_token(self, z: Tensor, u: Tensor, rows: list[RowState]) -> Tensor:
        """A step of decoding, all texts at once; one weight is read per text, as without fast weights."""
        start = self.down_proj.weight
        if all(row.weight is None for row in rows):
            out = self.down_proj(z)
        elif len(rows) == 1:
            out = F.linear(z, rows[0].weight)
        else:
            out = z @ self.reading.fast_weights.weights(self.layer, start).transpose(1, 2)
        for number, row in enumerate(rows):
            self._write(row, z[number], u[number])
        return out

    def _read(self, row: RowState, z: Tensor, u: Tensor) -> Tensor:
        """(t, f), (t, d) -> (t, d): apply, then update, chunk by chunk."""
        alike = z.dtype == u.dtype == self.down_proj.weight.dtype  # under autocast they are not
        if fast_weight_linear is not None and row.count + len(z) >= self.chunk and alike:
            return self._read_by_operation(row, z, u)
        parts = []
        while len(z):
            size = min(self.chunk - row.count, len(z))
            parts.append(F.linear(z[:size], self.down_proj.weight if row.weight is None else row.weight))
            if size + row.count == self.chunk or self.reading.going_on:
                self._write(row, z[:size], u[:size])
            z, u = z[size:], u[size:]
        return torch.cat(parts) if parts else u

    def _read_by_operation(self, row: RowState, z: Tensor, u: Tensor) -> Tensor:
        """``_read`` by the package's operation, beginning with the tokens of the unfinished chunk."""
        pending, weight = row.count, self.down_proj.weight
        z, u = (torch.cat(parts) for parts in zip(*row.pending, (z, u), strict=True))
        update = row.update
        if update is None:
            update = weight.new_zeros(weight.shape, dtype=_sum_dtype(weight))
        z, u = z[:, None], u[:, None]  # one text
        ids = torch.arange(len(z), dtype=torch.int32, device=z.device) // self.chunk
        targets = ChunkTargets(u, self.ttt_conv.weight, None if self.ttt_proj is None else self.ttt_proj.weight, ids)
        state = FastWeightState(update[None], z[:0], u[:0])
        out, state = fast_weight_linear(
            z,
            targets,
            weight,
            eta=self.eta,
            chunk_size=self.chunk,
            clip=self.clip,
            initial_state=state,
            output_final_state=True,
        )
        row.update, row.count, row.pending = state.updates[0], state.unfinished, []
        row.weight = self._sum(row.update)
        if row.count and self.reading.going_on:
            row.pending = [(z[-row.count :, 0].clone(), u[-row.count :, 0].clone())]
        return out[pending:, 0]

    def _write(self, row: RowState, z: Tensor, u: Tensor) -> None:
        """Add tokens to the chunk that is being read; a full one becomes an update."""
        row.count += len(z)
        if row.count < self.chunk:
            row.pending.append((z.clone(), u.clone()))  # not views, which would keep all of a prompt
            return
        z, u = (torch.cat(parts) for parts in zip(*row.pending, (z, u), strict=True))
        v = self.ttt_conv(u.t()[None])[0].t()
        if self.ttt_proj is not None:
            v = v @ self.ttt_proj.weight
        written = self.eta * (_fp32(v).t() @ _fp32(z))
        if self.clip is not None:
            limit = self.clip * _fp32(self.down_proj.weight.detach()).norm()
            written = written * (limit / written.norm()).clamp(max=1)
        row.update = written if row.update is None else row.update + written
        row.weight, row.pending, row.count = self._sum(row.update), [], 0

    def _sum(self, update: Tensor) -> Tensor:
        return (_fp32(self.down_proj.weight) + update).to(self.down_proj.weight.dtype)


def _sum_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _fp32(tensor: Tensor) -> Tensor:
    """fp64 stays as it is."""
    return tensor.to(_sum_dtype(tensor))


class FastWeightsMixin:
    """Puts fast weights into the MLPs of a causal language model of transformers."""

    def __init__(self, config):
        super().__init__(config)
        self.fast_mlps = []
        for layer in self.config.ttt_layers if self.config.ttt_mode else ():
            mlp = FastWeightMLP(self.model.layers[layer].mlp, self.config, layer)
            self.model.layers[layer].mlp = mlp
            self.fast_mlps.append(mlp)
        if self.fast_mlps:
            self.model.register_forward_pre_hook(self._before, with_kwargs=True)
            self.model.register_forward_hook(self._after, always_call=True)
        self.post_init()

    def _before(self, model, args, kwargs):
        """Tell the TTT layers what is read; the model's own forward knows nothing of them."""
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, ()
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        going_on = cache is not None or bool(kwargs.get("use_cache"))
        if cache is None and going_on:
            cache = kwargs["past_key_values"] = FastWeightCache(config=self.config)
        if cache is not None and not isinstance(cache, FastWeightCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}: fast weights need a FastWeightCache")
        tokens = embeds if embeds is not None else kwargs["input_ids"]
        valid = kwargs.get("attention_mask")
        if valid is not None:
            valid = valid[:, -tokens.shape[1] :].bool() if isinstance(valid, Tensor) and valid.dim() == 2 else None
            valid = None if valid is None or bool(valid.all()) else valid
        embedded = None
        if any(mlp.reads_embeddings for mlp in self.fast_mlps):
            embedded = embeds if embeds is not None else model.embed_tokens(kwargs["input_ids"])
        reading = Reading(cache.fast_weights if cache is not None else FastWeights(), valid, embedded, going_on)
        for mlp in self.fast_mlps:
            mlp.reading = reading
        return args, kwargs

    def _after(self, *_):
        for mlp in self.fast_mlps:
            mlp.reading = None  # the fast weights of a batch end with it

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_) -> FastWeights:
        """The fast weights after texts (batch, t) were read, to be saved, and given to ``generate`` or a cache."""
        cache = FastWeightCache(config=self.config)
        self(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache.fast_weights

    def load_fast_weights(self, path: str) -> FastWeights:
        """Read fast weights that were saved. Raises ValueError where they are not of this model."""
        found = FastWeights.load(path)
        for mlp in self.fast_mlps:
            for row in found.layers.get(mlp.layer, []):
                of = mlp.down_proj.weight.shape
                shapes = [(row.update, of)] + [
                    (a, (len(a), n)) for z, u in row.pending for a, n in ((z, of[1]), (u, of[0]))
                ]
                if any(tensor is not None and tuple(tensor.shape) != tuple(shape) for tensor, shape in shapes):
                    raise ValueError(f"'{path}' holds the fast weights of another model: their shapes differ")
        if set(found.layers) != {mlp.layer for mlp in self.fast_mlps}:
            raise ValueError(f"'{path}' holds the fast weights of layers {sorted(found.layers)}: this model has others")
        return found

    def generate(self, *args, fast_weights: FastWeights | None = None, **kwargs):
        """As transformers' own; ``fast_weights`` of one text are given to all of the batch."""
        if fast_weights is not None:
            tokens = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            size = len(next(iter(fast_weights.layers.values())))
            texts = list(range(size)) if size > 1 else [0] * tokens.shape[0]
            kwargs["past_key_values"] = FastWeightCache(config=self.config, fast_weights=fast_weights.select(texts))
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if self.fast_mlps and generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation} has no place for fast weights: "
                    f"use the default"
                )
            model_kwargs["past_key_values"] = FastWeightCache(config=self.config)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


# What a config.json says of fast weights, and what it means where it does not say it
FAST_WEIGHT_KEYS = dict(
    ttt_mode=True,
    ttt_layers=(),
    ttt_chunk=1024,
    ttt_lr=1.0,
    ttt_clip=None,
    ttt_proj=True,
    ttt_target="hidden_states",
    ttt_conv_kernel=5,
)


class InPlaceTTTQwen3Config(Qwen3Config):
    def __init__(self, **keys):
        super().__init__(**{**FAST_WEIGHT_KEYS, **keys})


class InPlaceTTTLlamaConfig(LlamaConfig):
    def __init__(self, **keys):
        super().__init__(**{**FAST_WEIGHT_KEYS, **keys})


class InPlaceTTTQwen3ForCausalLM(FastWeightsMixin, Qwen3ForCausalLM):
    config_class = InPlaceTTTQwen3Config


class InPlaceTTTLlamaForCausalLM(FastWeightsMixin, LlamaForCausalLM):
    config_class = InPlaceTTTLlamaConfig
