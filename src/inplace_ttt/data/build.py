"""The training and validation sets of a configuration, and the samples that a rank reads of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from inplace_ttt.config import Config, UserError
from inplace_ttt.data.batch import MicroBatch, Sample
from inplace_ttt.data.packed import Blend, PackedDocuments, open_indexed, split_documents
from inplace_ttt.data.prepare import read_description
from inplace_ttt.data.recall import KeyValueRecall, recall_vocab_size
from inplace_ttt.data.tokenizer import fingerprint, load_tokenizer
from inplace_ttt.signals import unheard


@dataclass
class Sets:
    train: object  # sample by number
    validation: object | None
    vocab_size: int


def build_sets(config: Config) -> Sets:
    """Open and check all data. Raises UserError; needs no process group, so it runs before one forms."""
    data, train = config.data, config.train
    if data.kind == "recall":
        recall = (data.seq_length, data.recall_pairs, data.recall_alphabet)
        vocab_size = config.model.vocab_size or recall_vocab_size(data.recall_alphabet)
        return Sets(
            KeyValueRecall(*recall, seed=train.seed), KeyValueRecall(*recall, seed=train.seed + 1_000_003), vocab_size
        )
    if not data.sources:
        raise UserError("data.sources is empty: name at least one, as in data.sources=[{path: data/python}]")
    files = [open_indexed(source.path) for source in data.sources]
    vocab_size = _vocab_size(config)
    training, held_out = [], []
    for number, (source, indexed) in enumerate(zip(data.sources, files, strict=True)):
        common = dict(seq_length=data.seq_length, align=config.ttt.chunk_size, reset=data.reset_at_documents)
        kept, validation = split_documents(indexed, data.validation_fraction, source.path)
        training.append(PackedDocuments(indexed, kept, seed=train.seed + 7919 * number, **common))
        if len(validation):
            held_out.append(PackedDocuments(indexed, validation, seed=0, shuffle=False, **common))
    weights = [source.weight for source in data.sources]
    return Sets(
        Blend(training, weights, train.steps * train.global_batch_size),
        Blend(held_out, weights, train.eval_samples) if len(held_out) == len(weights) and train.eval_samples else None,
        vocab_size,
    )


def _vocab_size(config: Config) -> int:
    """The model's vocabulary, which must hold every token of every source."""
    data = config.data
    sizes = {}
    for source in data.sources:
        described = read_description(source.path)
        if described is not None:
            sizes[source.path] = described
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
        for path, described in sizes.items():
            if described.tokenizer_fingerprint != fingerprint(tokenizer):
                raise UserError(
                    f"data.tokenizer='{data.tokenizer}' is not what '{path}' was made with: prepare the data with it, "
                    f"or use '{path}.tokenizer'"
                )
        needed = len(tokenizer)
    elif sizes:
        if len({described.tokenizer_fingerprint for described in sizes.values()}) > 1:
            raise UserError(
                f"data.sources were made with different tokenizers ({', '.join(sizes)}): prepare them alike"
            )
        needed = next(iter(sizes.values())).vocab_size
    elif config.model.vocab_size:
        needed = config.model.vocab_size
    else:
        raise UserError("model.vocab_size is not known: set it, or data.tokenizer")
    if config.model.vocab_size is not None and config.model.vocab_size < needed:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {needed} entries: "
            f"use {needed} or more, or null"
        )
    return config.model.vocab_size or needed


class _Numbered(torch.utils.data.Dataset):
    """The samples with given numbers."""

    def __init__(self, samples, numbers: list[int]):
        self.samples, self.numbers = samples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.numbers[index]]


def micro_batches(
    samples, numbers: list[int], *, micro_batch_size: int, num_workers: int, cp_size: int, cp_rank: int, device
) -> Iterator[MicroBatch]:
    """Micro batches of the samples with these numbers, in order; workers, if any, read ahead."""
    loader = DataLoader(
        _Numbered(samples, numbers),
        batch_size=micro_batch_size,
        collate_fn=list,
        num_workers=num_workers,
        pin_memory=False,
    )
    with unheard():
        groups = iter(loader)
    for group in groups:
        yield MicroBatch.collate(group, cp_size, cp_rank, device)


def numbers_of_rank(first: int, count: int, dp_size: int, dp_rank: int) -> list[int]:
    """Of ``count`` samples from ``first`` on, those of one data-parallel rank: the step's set is the same for all."""
    share = count // dp_size
    return list(range(first + dp_rank * share, first + (dp_rank + 1) * share))
