"""Pack documents into samples of fixed length, in an order that depends only on the seed.

Documents form a stream, each padded to a multiple of the chunk size so that it starts on a chunk boundary. A sample is
``seq_length`` consecutive tokens of the stream. If a document crosses the end of a sample, the rest of it is a separate
document in the next one. Without fast weights there are no chunks and no padding. Each epoch shuffles the documents,
and then the samples, since samples of one long document would otherwise be adjacent. No index is stored: the position
of a sample follows from the document lengths, so every rank can compute any sample, and a run resumes from a sample
index.

The order of samples has a version, which a run stores in run.json. In version 1 documents were padded to chunks with
and without fast weights, and the last sample of an epoch could consist of padding only. In version 2 that sample is the
last ``seq_length`` tokens of the stream.
"""

import os
import struct
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from inplace_ttt.config import UserError, first_line
from inplace_ttt.data.batch import Sample
from inplace_ttt.data.documents import ANSWERS
from inplace_ttt.data.indexed import DType, IndexedDataset

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences, number of documents

PACKING = 2  # version of the order of samples


class PackedDocuments:
    """Pack some documents of one indexed file into an endless sequence of samples."""

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: np.ndarray,
        *,
        seq_length: int,
        align: int,
        reset: bool,
        seed: int,
        shuffle: bool = True,
        packing: int = PACKING,
        answers: IndexedDataset | None = None,
    ):
        """Select documents of a file by index.

        Args:
            documents: indices of the documents.
            seq_length: tokens per sample.
            align: documents start at multiples of this many tokens.
            reset: samples contain document bounds; if False a sample is one document and nothing is aligned.
            shuffle: shuffle documents and samples in each epoch.
            packing: version of the order of samples.
            answers: 1 for each token that counts in the loss; None: all tokens count.
        """
        self.indexed, self.documents, self.packing, self.answers = indexed, documents, packing, answers
        self.seq_length, self.reset, self.seed, self.shuffle = seq_length, reset, seed, shuffle
        # the last token of a document is only ever a label
        self.lengths = indexed.sequence_lengths[documents].astype(np.int64) - 1
        self.padded = -(-self.lengths // align) * align if reset else self.lengths
        self.stream_length = int(self.padded.sum())
        self.samples = -(-self.stream_length // seq_length)  # samples per epoch; the last one may end in padding
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the document order of an epoch, the document starts in the stream (plus its end), the sample order."""
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
        if self.packing > 1 and first + s > self.stream_length:
            last = order[-1]
            if first >= int(starts[-2]) + int(self.lengths[last]):  # only padding of the last document
                first = max(0, self.stream_length - s)
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
                if self.answers is not None:  # flags of the labels
                    mask[at] = self.answers.get(int(self.documents[which]), offset=inside + 1, length=real) != 0
            bounds.append(left - first)
            place += 1
        if end - first < s:
            bounds.append(end - first)
        documents = (*bounds, s) if self.reset else None
        return Sample(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask), documents)


class BlendedDataset:
    """Mix datasets by weight: sample i comes from the dataset that is furthest behind its share."""

    def __init__(self, parts: list, weights: list[float], samples: int):
        self.parts, self.samples = parts, samples
        if len(parts) > 1:
            self.which, self.number = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
            from megatron.core.datasets import helpers_cpp

            share = np.asarray(weights, dtype=np.float64) / sum(weights)
            helpers_cpp.build_blending_indices(self.which, self.number, share, len(parts), samples, False)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        if len(self.parts) == 1:
            return self.parts[0][index]
        which = int(self.which[index])
        return replace(self.parts[which][int(self.number[index])], source=which)


def open_indexed(prefix: str, key: str = "data.sources") -> IndexedDataset:
    """Open PREFIX.bin and PREFIX.idx. ``key``: configuration key that names the prefix, for messages.

    Raises UserError if a file is missing or damaged.
    """
    for ending in ("bin", "idx"):
        if not os.path.isfile(f"{prefix}.{ending}"):
            raise UserError(
                f"{key} names '{prefix}', but '{prefix}.{ending}' does not exist: create it with "
                f"launch/prepare_data.py --output {prefix}"
            )
    if not os.path.getsize(f"{prefix}.bin"):  # an empty file cannot be memory-mapped
        raise UserError(f"'{prefix}.bin' is empty (truncated): prepare the data again")
    try:
        fault = _header_fault(f"{prefix}.idx")
        if fault is None:
            indexed = IndexedDataset(prefix)
            fault = _index_fault(indexed)
    except Exception as error:
        fault = first_line(error) if str(error) else "it is inconsistent"
    if fault:
        raise UserError(f"'{prefix}.idx' is not a complete Megatron index ({fault}): prepare the data again")
    index, size = indexed.index, os.path.getsize(f"{prefix}.bin")
    ends = index.sequence_pointers + index.sequence_lengths.astype(np.int64) * index.dtype_size
    needed = int(ends.max(initial=0))
    if size < needed:
        raise UserError(
            f"'{prefix}.bin' has {size} bytes but its index needs {needed} (truncated): prepare the data again"
        )
    return indexed


def open_answers(prefix: str, indexed: IndexedDataset) -> IndexedDataset:
    """Open PREFIX.answers, which contains 1 for each token that counts in the loss.

    Raises UserError if it is missing or does not match the tokens.
    """
    answers = open_indexed(f"{prefix}.{ANSWERS}", f"'{prefix}.json', which has supervised=true,")
    if not np.array_equal(answers.sequence_lengths, indexed.sequence_lengths):
        raise UserError(f"'{prefix}.{ANSWERS}.idx' does not match the tokens in '{prefix}.bin': prepare the data again")
    return answers


def _header_fault(path: str) -> str | None:
    """Return what is wrong with the header of an index, or None. (Megatron's reader would print a traceback.)"""
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return f"it has {len(header)} bytes"
    magic, version, code, sequences, documents = _HEADER.unpack(header)
    if magic != b"MMIDIDX\0\0" or version != 1:
        return "wrong magic number or version"
    if code not in [one.value for one in DType]:
        return f"unknown dtype code {code}"
    needed, size = _HEADER.size + 12 * sequences + 8 * documents, os.path.getsize(path)
    return None if size >= needed else f"it has {size} bytes but its {sequences} sequences need {needed}"


def _index_fault(indexed: IndexedDataset) -> str | None:
    """Return what is wrong with lengths, pointers or documents of an index, or None. (Megatron does not check them.)"""
    index = indexed.index
    lengths, pointers, documents = index.sequence_lengths, index.sequence_pointers, index.document_indices
    if not np.issubdtype(index.dtype, np.integer):
        return f"its tokens are {np.dtype(index.dtype).name}, not integers"
    if len(lengths) and int(lengths.min()) < 0:
        return "it has a sequence of negative length"
    limit = np.iinfo(np.int64).max - int(lengths.max(initial=0)) * index.dtype_size
    if len(pointers) and not 0 <= int(pointers.min()) <= int(pointers.max()) <= limit:
        return "it has a sequence that starts outside of its tokens"
    if len(pointers) and int((pointers % index.dtype_size).max()):
        return "it has a sequence that starts inside a token"
    if len(documents) and (
        np.any(np.diff(documents) < 0) or not 0 <= int(documents[0]) <= int(documents[-1]) <= len(lengths)
    ):
        return "its documents do not match its sequences"
    return None


def _usable_documents(indexed: IndexedDataset) -> np.ndarray:
    """Return the indices of the documents with two tokens or more, which have a label."""
    return np.flatnonzero(indexed.sequence_lengths >= 2)


def all_documents(indexed: IndexedDataset, prefix: str, key: str) -> np.ndarray:
    """Return the indices of all documents with two tokens or more. Raises UserError, with ``key``, if none has."""
    usable = _usable_documents(indexed)
    if not len(usable):
        raise UserError(f"{key}: '{prefix}' has no document of two tokens or more: prepare other data")
    return usable


def split_documents(indexed: IndexedDataset, validation_fraction: float, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Return document indices (training, validation) of a file; they depend only on the file and the fraction.

    Raises UserError if no document is left for training.
    """
    usable = _usable_documents(indexed)
    held_out = round(len(usable) * validation_fraction)
    if validation_fraction > 0 and held_out == 0 and len(usable) > 1:
        held_out = 1
    if len(usable) - held_out < 1:
        raise UserError(
            f"'{prefix}' has {len(usable)} documents of two tokens or more, of which "
            f"data.validation_fraction={validation_fraction} holds out {held_out}: none is left for training; use "
            f"more documents or a smaller fraction"
        )
    mixed = np.random.default_rng(0).permutation(usable)
    return np.sort(mixed[held_out:]), np.sort(mixed[:held_out])
