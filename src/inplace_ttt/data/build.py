"""Build the training and validation sets of a configuration, and the micro batches of a rank."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader

from inplace_ttt.config import Config, Source, UserError
from inplace_ttt.data.batch import MicroBatch, Sample
from inplace_ttt.data.corpus import Corpus
from inplace_ttt.data.identity import check_tokens
from inplace_ttt.data.packed import PACKING, BlendedDataset, PackedDocuments, all_documents, split_documents
from inplace_ttt.data.recall import HELD_OUT_SEED, KeyValueRecall, recall_vocab_size
from inplace_ttt.hf.tokenizer import embedding_rows, fingerprint, load_tokenizer
from inplace_ttt.resilience.signals import block_stop_signals

BLEND_BYTES = 10  # bytes per sample for the index of a blend


@dataclass
class Corpora:
    """Hold the opened corpora of a configuration; empty for synthetic data."""

    sources: list[Corpus]
    validation: list[Corpus]
    vocab_size: int

    @property
    def identity(self) -> list[dict]:
        """Return the identity of each corpus, with those of ``data.validation`` last."""
        return [one.identity for one in (*self.sources, *self.validation)]

    def check_tokens(self) -> None:
        """Raise UserError if a token ID is outside of the vocabulary; the first call reads all tokens."""
        for one in (*self.sources, *self.validation):
            check_tokens(one.prefix, one.indexed, one.identity, self.vocab_size)


@dataclass
class DataSplits:
    """Hold the training and validation sets; both return a ``Sample`` by index."""

    train: object
    validation: object | None  # None: no evaluation
    vocab_size: int
    epochs: tuple[float, ...] = ()  # per source, number of epochs in the run
    held_out_epochs: tuple[float, ...] = ()  # per source of ``validation``, number of times that an evaluation reads it
    held_out: tuple[str, ...] = ()  # names of the sources of ``validation``, in the order of ``Sample.source``


def open_corpora(config: Config) -> Corpora:
    """Open all sources. This needs no process group, so that errors occur before one is created.

    Raises UserError if a file is missing or damaged, or if data.num_workers or model.vocab_size does not fit.
    """
    data = config.data
    if data.num_workers > max(8, 4 * (os.cpu_count() or 1)):
        raise UserError(
            f"data.num_workers={data.num_workers} is too many for {os.cpu_count()} CPU cores: use "
            f"{max(8, 4 * (os.cpu_count() or 1))} or less"
        )
    if data.kind == "recall":
        needed = recall_vocab_size(data.recall_alphabet)
        if config.model.vocab_size is not None and config.model.vocab_size < needed:
            raise UserError(
                f"model.vocab_size={config.model.vocab_size} is too small for data.recall_alphabet="
                f"{data.recall_alphabet}: use {needed} or more, or null"
            )
        return Corpora([], [], config.model.vocab_size or needed)
    if not data.sources:
        raise UserError("data.sources is empty: set at least one source, such as data.sources=[{path: data/python}]")
    sources = [Corpus.open(source.path, "data.sources") for source in data.sources]
    validation = [Corpus.open(source.path, "data.validation") for source in data.validation]
    vocab_size = _vocab_size(config, {one.prefix: one.described for one in (*sources, *validation)})
    return Corpora(sources, validation, vocab_size)


def build_splits(config: Config, corpora: Corpora | None = None, packing: int = PACKING) -> DataSplits:
    """Return the training and validation sets. ``packing``: version of the order of samples, see packed.py.

    Raises UserError if the index of a blend does not fit in memory, or if nothing is left for training.
    """
    data, train, corpora = config.data, config.train, corpora or open_corpora(config)
    if data.kind == "recall":
        recall = (data.seq_length, data.recall_pairs, data.recall_alphabet)
        return DataSplits(
            KeyValueRecall(*recall, seed=train.seed),
            KeyValueRecall(*recall, seed=train.seed + HELD_OUT_SEED),
            corpora.vocab_size,
        )
    aligned = config.ttt.enabled or packing == 1  # without fast weights there are no chunks
    common: dict[str, Any] = dict(
        seq_length=data.seq_length,
        align=config.ttt.chunk_size if aligned else 1,
        reset=data.reset_at_documents,
        packing=packing,
    )
    fraction = 0.0 if corpora.validation else data.validation_fraction
    training, held_out = [], []
    for number, one in enumerate(corpora.sources):
        kept, validation = split_documents(one.indexed, fraction, one.prefix)
        common["answers"] = one.answers
        training.append(PackedDocuments(one.indexed, kept, seed=train.seed + 7919 * number, **common))
        if len(validation):
            held_out.append(PackedDocuments(one.indexed, validation, seed=0, shuffle=False, **common))
    for one in corpora.validation:
        everything = all_documents(one.indexed, one.prefix, "data.validation")
        common["answers"] = one.answers
        held_out.append(PackedDocuments(one.indexed, everything, seed=0, shuffle=False, **common))
    weights = [source.weight for source in data.sources]
    samples = train.steps * train.global_batch_size
    free = psutil.virtual_memory().available
    if len(weights) > 1 and BLEND_BYTES * samples > free / 2:
        raise UserError(
            f"train.steps={train.steps} x train.global_batch_size={train.global_batch_size} samples of several sources "
            f"need {BLEND_BYTES * samples / 2**30:,.1f} GiB for the blend, but {free / 2**30:,.1f} GiB are free: use "
            f"fewer steps, or one source"
        )
    of_held_out = data.validation or data.sources
    is_evaluated = len(held_out) == len(of_held_out) and train.eval_samples
    return DataSplits(
        BlendedDataset(training, weights, samples),
        BlendedDataset(held_out, [one.weight for one in of_held_out], train.eval_samples) if is_evaluated else None,
        corpora.vocab_size,
        _epochs(samples, weights, training),
        _epochs(train.eval_samples, [one.weight for one in of_held_out], held_out) if is_evaluated else (),
        tuple(_names(of_held_out)) if is_evaluated else (),
    )


def _epochs(samples: int, weights: list[float], parts: list[PackedDocuments]) -> tuple[float, ...]:
    """Return how many times each part is read for a number of samples."""
    share = sum(weights)
    return tuple(samples * weight / share / part.samples for weight, part in zip(weights, parts, strict=True))


def _names(sources: list[Source]) -> list[str]:
    """Return the names of sources for records; duplicate names get a number."""
    names = [one.name or os.path.basename(one.path.rstrip("/")) for one in sources]
    found: list[str] = []
    for number, name in enumerate(names):
        unique = name if names.count(name) == 1 else f"{name}_{number}"
        while unique in found or (unique != name and unique in names):
            unique += "_"
        found.append(unique)
    return found


def _vocab_size(config: Config, described: dict) -> int:
    """Return the vocabulary size of the model. ``described``: descriptions (or None) by prefix.

    Raises UserError if the size is not known or too small, or if the tokenizers differ.
    """
    sizes = {prefix: one for prefix, one in described.items() if one is not None}
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        for path, one in sizes.items():
            if one.tokenizer_fingerprint != fingerprint(tokenizer):
                raise UserError(
                    f"data.tokenizer='{config.data.tokenizer}' is not the tokenizer of '{path}': prepare the data "
                    f"with it, or use '{path}.tokenizer'"
                )
        needed = embedding_rows(tokenizer)
    elif sizes:
        if len({one.tokenizer_fingerprint for one in sizes.values()}) > 1:
            raise UserError(
                f"data.sources and data.validation were made with different tokenizers ({', '.join(sizes)}): prepare "
                f"them with the same one"
            )
        needed = next(iter(sizes.values())).vocab_size
    elif config.model.vocab_size:
        needed = config.model.vocab_size
    else:
        raise UserError("model.vocab_size is not known: set it, or set data.tokenizer")
    if config.model.vocab_size is not None and config.model.vocab_size < needed:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {needed} entries: "
            f"use {needed} or more, or null"
        )
    return config.model.vocab_size or needed


class _Numbered(torch.utils.data.Dataset):
    """Select samples by index."""

    def __init__(self, samples, numbers: Sequence[int]):
        self.samples, self.numbers = samples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.numbers[index]]


def micro_batches(
    samples,
    numbers: Sequence[int],
    *,
    micro_batch_size: int,
    num_workers: int,
    cp_size: int,
    cp_rank: int,
    chunk_size: int | None,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Yield micro batches of the samples with these indices, in order, on the device; workers prefetch."""
    loader = DataLoader(
        _Numbered(samples, numbers),
        batch_size=micro_batch_size,
        collate_fn=partial(MicroBatch.collate, cp_size=cp_size, cp_rank=cp_rank, chunk_size=chunk_size),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    with block_stop_signals():
        batches = iter(loader)
    for batch in batches:
        yield batch.to(device)


def rank_sample_indices(first: int, count: int, dp_size: int, dp_rank: int) -> list[int]:
    """Return the sample indices of a data-parallel rank; a step has the same ``count`` samples for any ``dp_size``."""
    share = count // dp_size
    return list(range(first + dp_rank * share, first + (dp_rank + 1) * share))


class StepSampleIndices(Sequence[int]):
    """Compute the sample indices of one data-parallel rank over many steps, lazily."""

    def __init__(self, steps: range, per_step: int, dp_size: int, dp_rank: int):
        self.steps, self.per_step, self.share, self.dp_rank = steps, per_step, per_step // dp_size, dp_rank

    def __len__(self) -> int:
        return len(self.steps) * self.share

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, number = divmod(index, self.share)
        return self.steps[step] * self.per_step + self.dp_rank * self.share + number
