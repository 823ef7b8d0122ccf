"""Measure the exported model in transformers, with and without fast weights: decode, prefill, loading a book."""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from inplace_ttt.config import Config
from inplace_ttt.hf import modeling_inplace_ttt as exported
from inplace_ttt.hf.config import write_config

BASE, OURS = "off", "on"
CACHES = ("dynamic", "static")
GIB = 2**30


@dataclass(frozen=True)
class Models:
    """Hold models with and without fast weights, with random weights, and a book with a state that is not zero."""

    base: PreTrainedModel
    ours: PreTrainedModel
    book: exported.FastWeights

    @classmethod
    def build(cls, config: Config, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> "Models":
        """Build both models on a device."""
        # cuDNN's attention builds a plan for every new number of keys, 1 ms per layer. Whether torch selects cuDNN
        # depends on the mask, which differs between the models, so it is disabled for both.
        torch.backends.cuda.enable_cudnn_sdp(False)
        configs = {BASE: replace(config, ttt=replace(config.ttt, enabled=False)), OURS: config}
        made = {}
        for name, variant in configs.items():
            keys = write_config(variant, str(dtype).removeprefix("torch."), base=None)
            kind = getattr(exported, keys["architectures"][0])  # without fast weights: the class of transformers
            with torch.device(device):
                torch.manual_seed(0)
                made[name] = kind._from_config(kind.config_class.from_dict(keys), dtype=dtype).eval()
            made[name].generation_config.eos_token_id = None
        for mlp in made[OURS].fast_mlps:
            mlp.ttt_conv.weight.data.normal_(0, 1e-3)
        ids = torch.randint(1, config.model.vocab_size, (1, config.ttt.chunk_size), device=device)
        return cls(made[BASE], made[OURS], made[OURS].read(ids))

    def peak(self, model: PreTrainedModel) -> float:
        """Return the peak memory in GiB since ``_reset_peak``, without the weights of the other model."""
        other = self.base if model is self.ours else self.ours
        return _peak(model.device) - _weight_bytes(other) / GIB


class _Clock:
    """Record the time of each token, as a streamer of ``generate``."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        """Record the time in seconds. ``generate`` calls this for the prompt, then after each new token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing; ``generate`` calls this after the last token."""


def decode(
    models: Models, after: list[int], rows: list[int], tokens: int, caches: Sequence[str] = CACHES
) -> list[dict]:
    """Return records of decode steps, with dynamic caches and with static caches in a compiled graph.

    Args:
        after: numbers of tokens in the cache before the first step. Their keys and values are zeros, which does not
            change the time.
        rows: batch sizes. The texts of a batch complete their chunks at different steps.
        tokens: decoded tokens per text.
    """
    records = []
    for number in rows:
        for length in after:
            found = []
            for name, model in ((BASE, models.base), (OURS, models.ours)):
                book = models.book if name == OURS else None
                for kind in caches:
                    variant = f"{name}, {kind}"
                    place = dict(variant=variant, texts=f"{number} x {length}")
                    found.append(place | _decoded(models, model, book, number, length, tokens, kind == "static"))
                    said = f"{found[-1]['ms_per_step']:.2f} ms per step, peak {found[-1]['peak_gib']:.1f} GiB"
                    print(f"{variant}, {number} x {length}: {said}", file=sys.stderr, flush=True)
            # reference: the faster cache without fast weights
            best, best_mean = (min(one[key] for one in found[: len(caches)]) for key in ("ms_per_step", "mean_ms"))
            records += [
                one | dict(ratio=one["ms_per_step"] / best, mean_ratio=one["mean_ms"] / best_mean) for one in found
            ]
    return records


def one_decode(models: Models, rows: int, after: int, tokens: int) -> dict:
    """Return a record of decoding with fast weights and a dynamic cache, as ``generate`` does it by default."""
    return _decoded(models, models.ours, models.book, rows, after, tokens, static=False)


def _decoded(models: Models, model: PreTrainedModel, book, rows: int, after: int, tokens: int, static: bool) -> dict:
    steps: list[float] = []
    started, recorded = time.perf_counter(), 0.0
    _reset_peak(model.device)
    for count in (min(tokens, 8), tokens) if static else (tokens,):  # the first generation captures the graph
        cache = filled_cache(model, book, rows, after, tokens + 2, static)
        ids = torch.randint(1, model.config.vocab_size, (rows, after + 1), device=model.device)
        clock = _Clock()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=count + 1,
            min_new_tokens=count + 1, do_sample=False, streamer=clock,
        )  # fmt: skip
        steps = [1e3 * (b - a) for a, b in zip(clock.times[2:], clock.times[3:], strict=False)]
        recorded = recorded or time.perf_counter() - started
        del cache
    return dict(
        tokens=len(steps),
        ms_per_step=statistics.median(steps),
        mean_ms=statistics.fmean(steps),
        slowest_ms=max(steps),
        first_s=recorded,  # seconds of the first generation, which captures the graph
        peak_gib=models.peak(model),
    )


def filled_cache(model: PreTrainedModel, book, rows: int, after: int, room: int, static: bool):
    """Return a cache with ``after`` tokens of zeros, space for ``room`` more, and a book's fast weights, if any."""
    config, device, dtype = model.config, model.device, model.dtype
    if book is not None:
        kind = exported.FastWeightStaticCache if static else exported.FastWeightCache
    else:
        kind = StaticCache if static else DynamicCache
    cache = kind(config=config, max_cache_len=_rounded(after + room)) if static else kind(config=config)
    shape = rows, config.num_key_value_heads, after, getattr(config, "head_dim", None) or 128
    keys = torch.zeros(shape, dtype=dtype, device=device)
    for number in range(config.num_hidden_layers):
        cache.update(keys, keys, number)
    if book is not None:
        weights = book.select([0] * rows)
        chunk = config.ttt_chunk
        weights.counts = [(after + row * chunk // rows) % chunk for row in range(rows)]
        weights.mlps, weights.static = model.fast_mlps, static
        like = torch.zeros(rows, 1, config.hidden_size, dtype=dtype, device=device)
        for mlp in model.fast_mlps:
            state = weights.layers[mlp.layer]
            state.tails = [like[row].expand(count, -1) for row, count in enumerate(weights.counts)]
            state.fix(chunk, weights.counts, like, mlp.shape, always=True)
        cache.fast_weights = weights
    return cache


def _rounded(length: int) -> int:
    return -(-length // 256) * 256


def prefill(models: Models, lengths: list[int], rounds: int) -> list[dict]:
    """Return records of prefill: without fast weights, with this package, and with only the exported file."""
    records = []
    for length in lengths:
        ids = torch.randint(1, models.base.config.vocab_size, (1, length), device=models.base.device)
        variants = {BASE: (models.base, True), "package": (models.ours, True), "file": (models.ours, False)}
        times, peaks = {name: [] for name in variants}, {}
        for number in range(rounds + 1):
            for name, (model, package) in variants.items():
                with _package(package), torch.no_grad():
                    _reset_peak(model.device)
                    started = _now(model.device)
                    model(ids, use_cache=True, logits_to_keep=1)
                    if number:  # the first round is a warm-up
                        times[name].append(_now(model.device) - started)
                        print(f"{name}, {length}: {times[name][-1]:.3f} s", file=sys.stderr, flush=True)
                        peaks[name] = models.peak(model)
        for name, found in times.items():
            records.append(
                dict(
                    variant=name,
                    tokens=length,
                    seconds=statistics.median(found),
                    ratio=statistics.median(a / b for a, b in zip(found, times[BASE], strict=True)),
                    peak_gib=peaks[name],
                )
            )
    return records


def generate(models: Models, rows: int, length: int, part: int, tokens: int) -> list[dict]:
    """Return records of time and peak memory of whole generations; prompts are read at once, and in parts.

    Args:
        rows: batch size.
        length: prompt tokens per text.
        part: tokens per part.
        tokens: generated tokens per text.
    """
    device, records = models.base.device, []
    for name, model in ((BASE, models.base), (OURS, models.ours)):
        for size in (None, part):
            ids = torch.randint(1, model.config.vocab_size, (rows, length), device=device)
            _reset_peak(device)
            started = _now(device)
            model.generate(
                ids, attention_mask=torch.ones_like(ids), prefill_chunk_size=size, max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=False,
            )  # fmt: skip
            seconds = _now(device) - started
            peak = models.peak(model)
            how = "at once" if size is None else f"in parts of {size}"
            records.append(dict(variant=name, texts=f"{rows} x {length}", prompt=how, seconds=seconds, peak_gib=peak))
    return records


def book(models: Models, prompt: int, rounds: int) -> list[dict]:
    """Return records of the time to the first token with and without a book, whose file is in the page cache."""
    ids = torch.randint(1, models.ours.config.vocab_size, (1, prompt), device=models.ours.device)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for size, dtype in (("exact", None), ("bf16", torch.bfloat16)):
            path = Path(folder) / size
            models.book.save(str(path), dtype)
            loads, firsts, plain = [], [], []
            for number in range(rounds + 1):
                started = _now(models.ours.device)
                found = models.ours.load_fast_weights(str(path))
                loaded = _now(models.ours.device)
                models.ours.generate(ids, fast_weights=found, **options)
                finished = _now(models.ours.device)
                models.ours.generate(ids, **options)
                if number:
                    plain.append(1e3 * (_now(models.ours.device) - finished))
                    loads.append(1e3 * (loaded - started))
                    firsts.append(1e3 * (finished - loaded))
            records.append(
                dict(
                    file=size,
                    mib=path.stat().st_size / 2**20,
                    load_ms=statistics.median(loads),
                    prompt=prompt,
                    first_token_ms=statistics.median(firsts),
                    without_book_ms=statistics.median(plain),
                )
            )
    return records


@contextlib.contextmanager
def _package(used: bool) -> Iterator[None]:
    """Run the exported file with this package, or without it, as if the package were not installed."""
    before = exported.fast_weight_linear
    exported.fast_weight_linear = before if used else None
    try:
        yield
    finally:
        exported.fast_weight_linear = before


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in model.parameters())
