"""Documents packed into samples of fixed length, in an order that the seed alone decides.

Documents lie one after the other in a stream, each padded to whole chunks so that it starts on a chunk boundary; a
sample is a stretch of ``seq_length`` tokens of it. A document that does not fit goes on in another sample, as a
document of its own. Every epoch shuffles the documents anew, and then the samples: those of one long document would
otherwise come one after the other. Nothing is stored: where a sample lies follows from the documents' lengths, so any
rank finds any sample, and a run resumes by its number alone.
"""

import os
from functools import lru_cache

import numpy as np
import torch

from inplace_ttt.config import UserError, first_line
from inplace_ttt.data.batch import Sample
from inplace_ttt.megatron.indexed import IndexedDataset


class PackedDocuments:
    """Samples from some documents of one indexed file, without end."""

    def __init__(self, indexed: IndexedDataset, documents: np.ndarray, *, seq_length, align, reset, seed, shuffle=True):
        """``documents``: their numbers in the file. ``align``: tokens that document starts are multiples of.
        ``reset``: samples know their documents; without it a sample is one document, and nothing is aligned."""
        self.indexed, self.documents = indexed, documents
        self.seq_length, self.reset, self.seed, self.shuffle = seq_length, reset, seed, shuffle
        # the last token of a document is only ever a label
        self.lengths = indexed.sequence_lengths[documents].astype(np.int64) - 1
        self.padded = -(-self.lengths // align) * align if reset else self.lengths
        self.stream_length = int(self.padded.sum())
        self.samples = -(-self.stream_length // seq_length)  # an epoch's; the last one is filled up with padding
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of an epoch: the documents in order, where each starts in the stream (with the end), the samples in order."""
        documents, samples = np.arange(len(self.documents)), np.arange(self.samples)
        if self.shuffle:
            rng = np.random.default_rng([self.seed, epoch])
            rng.shuffle(documents)
            rng.shuffle(samples)
        return documents, np.concatenate([[0], np.cumsum(self.padded[documents])]), samples

    def __getitem__(self, index: int) -> Sample:
        s = self.seq_length
        epoch, number = divmod(index, self.samples)
        order, starts, samples = self._epoch(epoch)
        first = int(samples[number]) * s
        end = min(first + s, self.stream_length)
        tokens, labels, mask = np.zeros(s, np.int64), np.zeros(s, np.int64), np.zeros(s, np.float32)
        bounds = []
        place = int(np.searchsorted(starts, first, side="right")) - 1
        while starts[place] < end:
            left, right = max(int(starts[place]), first), min(int(starts[place + 1]), end)
            which, inside = order[place], left - int(starts[place])
            real = min(int(self.lengths[which]) - inside, right - left)  # the rest is padding
            if real > 0:
                at = slice(left - first, left - first + real)
                text = self.indexed.get(int(self.documents[which]), offset=inside, length=real + 1).astype(np.int64)
                tokens[at], labels[at], mask[at] = text[:-1], text[1:], 1.0
            bounds.append(left - first)
            place += 1
        if end - first < s:
            bounds.append(end - first)
        documents = (*bounds, s) if self.reset else None
        return Sample(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask), documents)


class Blend:
    """Several datasets mixed by weight: sample i is of the dataset that is furthest behind its share."""

    def __init__(self, parts: list, weights: list[float], samples: int):
        self.parts = parts
        self.which = np.zeros(samples, dtype=np.int16)
        self.number = np.zeros(samples, dtype=np.int64)
        if len(parts) > 1:
            from megatron.core.datasets import helpers_cpp

            share = np.asarray(weights, dtype=np.float64) / sum(weights)
            helpers_cpp.build_blending_indices(self.which, self.number, share, len(parts), samples, False)
        else:
            self.number[:] = np.arange(samples)

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> Sample:
        return self.parts[self.which[index]][int(self.number[index])]


def open_indexed(prefix: str) -> IndexedDataset:
    """The file pair of a prefix, checked for being there and whole."""
    for ending in ("bin", "idx"):
        if not os.path.isfile(f"{prefix}.{ending}"):
            raise UserError(
                f"data.sources names '{prefix}', but '{prefix}.{ending}' does not exist: make it with "
                f"launch/prepare_data.py --output {prefix}"
            )
    try:
        indexed = IndexedDataset(prefix)
        lengths = indexed.sequence_lengths
        needed = int(lengths.sum()) * indexed.index.dtype_size
    except Exception as error:
        raise UserError(
            f"'{prefix}.idx' is not a whole Megatron index ({first_line(error)}); prepare the data again"
        ) from error
    size = os.path.getsize(f"{prefix}.bin")
    if size < needed:
        raise UserError(
            f"'{prefix}.bin' has {size} bytes where its index needs {needed}: it is cut off; prepare it again"
        )
    return indexed


def split_documents(indexed: IndexedDataset, validation_fraction: float, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) documents of a file, the same in every run with the same fraction."""
    usable = np.flatnonzero(indexed.sequence_lengths >= 2)
    held_out = round(len(usable) * validation_fraction)
    if validation_fraction > 0 and held_out == 0 and len(usable) > 1:
        held_out = 1
    if len(usable) - held_out < 1:
        raise UserError(
            f"'{prefix}' holds {len(usable)} documents of two tokens or more, of which "
            f"data.validation_fraction={validation_fraction} holds out {held_out}: nothing is left to train on"
        )
    mixed = np.random.default_rng(0).permutation(usable)
    return np.sort(mixed[held_out:]), np.sort(mixed[:held_out])
