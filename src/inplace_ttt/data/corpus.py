"""Open a prepared corpus: its tokens, their loss flags and its description."""

import os
from dataclasses import dataclass
from functools import cached_property

from inplace_ttt.data.documents import ANSWERS
from inplace_ttt.data.identity import identity
from inplace_ttt.data.indexed import IndexedDataset
from inplace_ttt.data.packed import open_answers, open_indexed
from inplace_ttt.data.prepare import Description, read_description


@dataclass
class Corpus:
    """Hold the opened files of a prefix."""

    prefix: str  # path of the files without their extension
    indexed: IndexedDataset
    described: Description | None  # PREFIX.json; None: files of another program
    answers: IndexedDataset | None  # 1 for each token that counts in the loss; None: all tokens count

    @classmethod
    def open(cls, path: str, key: str = "data.sources") -> "Corpus":
        """Open the files of a prefix, which ``key`` names. Raises UserError if they are missing or damaged."""
        prefix = os.path.expanduser(path)
        indexed, described = open_indexed(prefix, key), read_description(prefix)
        # without PREFIX.json, which a copy may lack, the files themselves say whether there is a loss mask
        supervised = described.supervised if described else os.path.isfile(f"{prefix}.{ANSWERS}.bin")
        answers = open_answers(prefix, indexed) if supervised else None
        return cls(prefix, indexed, described, answers)

    @property
    def tokenizer(self) -> str | None:
        """Return the fingerprint of its tokenizer; None: not known."""
        return self.described.tokenizer_fingerprint if self.described else None

    @cached_property
    def identity(self) -> dict:
        """Return its identity, see identity.py."""
        return identity(self.prefix, self.indexed, self.tokenizer, self.answers is not None)
