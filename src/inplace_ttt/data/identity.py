"""Identify a tokenized corpus by its content, and check its tokens against a vocabulary."""

import contextlib
import os
from pathlib import Path

import numpy as np
import xxhash

from inplace_ttt.config import UserError
from inplace_ttt.data.documents import ANSWERS
from inplace_ttt.data.indexed import IndexedDataset
from inplace_ttt.files import read_json, write_json

BLOCK = 1 << 24  # bytes per read
PROBES, PROBE = 64, 4096  # number of probed positions in the tokens for the digest, and bytes per probe


def identity(prefix: str, indexed: IndexedDataset, fingerprint: str | None, supervised: bool = False) -> dict:
    """Return documents, tokens, tokenizer and a digest of a corpus.

    The digest covers the whole index and evenly spaced probes of the tokens (and of the answers if ``supervised``).
    """
    digest = xxhash.xxh3_128()
    with open(f"{prefix}.idx", "rb") as index:
        while block := index.read(BLOCK):
            digest.update(block)
    for path in (f"{prefix}.bin", f"{prefix}.{ANSWERS}.bin")[: 1 + supervised]:
        with open(path, "rb") as tokens:
            size = os.fstat(tokens.fileno()).st_size
            for place in sorted({size * number // PROBES for number in range(PROBES)}):
                tokens.seek(place)
                digest.update(tokens.read(PROBE))
    return dict(
        documents=len(indexed.sequence_lengths),
        tokens=int(indexed.sequence_lengths.sum(dtype=np.int64)),
        tokenizer=fingerprint,
        digest=digest.hexdigest(),
    )


def check_tokens(prefix: str, indexed: IndexedDataset, described: dict, vocab_size: int) -> None:
    """Raise UserError if a token ID is outside of the vocabulary.

    All tokens are read once; the result is cached in PREFIX.checked, together with digest, size and modification time.
    """
    known = Path(f"{prefix}.checked")
    state = os.stat(f"{prefix}.bin")
    mark = dict(digest=described["digest"], bytes=state.st_size, modified=state.st_mtime_ns)
    found = {}
    with contextlib.suppress(UserError):
        found = read_json(known)
    if any(found.get(key) != value for key, value in mark.items()) or type(found.get("largest")) is not int:
        smallest, largest = _extremes(f"{prefix}.bin", np.dtype(indexed.index.dtype))
        found = dict(mark, smallest=smallest, largest=largest)
        with contextlib.suppress(OSError):  # a read-only folder: the tokens are read again next time
            write_json(known, found)
    token = found["largest"] if found["largest"] >= vocab_size else found.get("smallest", 0)
    if not 0 <= token < vocab_size:
        raise UserError(
            f"'{prefix}.bin' contains token ID {token}, but the vocabulary has {vocab_size} entries: prepare the data "
            f"with the tokenizer of the model, or set model.vocab_size"
        )


def _extremes(path: str, dtype: np.dtype) -> tuple[int, int]:
    """Return the smallest and the largest token ID in a file."""
    tokens = np.memmap(path, dtype=dtype, mode="r", shape=(os.path.getsize(path) // dtype.itemsize,))
    smallest, largest, step = 0, 0, BLOCK // dtype.itemsize
    for first in range(0, len(tokens), step):
        block = tokens[first : first + step]
        smallest, largest = min(smallest, int(block.min())), max(largest, int(block.max()))
    return smallest, largest
