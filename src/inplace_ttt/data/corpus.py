"""A prepared corpus, opened: its tokens, which of them count in the loss, and what is known of them."""

import os
from dataclasses import dataclass
from functools import cached_property

from inplace_ttt.data.identity import identity
from inplace_ttt.data.packed import open_answers, open_indexed
from inplace_ttt.data.prepare import Description, read_description
from inplace_ttt.megatron.indexed import IndexedDataset


@dataclass
class Corpus:
    """Hold the opened files of a prefix."""

    prefix: str
    indexed: IndexedDataset
    described: Description | None
    answers: IndexedDataset | None  # which tokens count in the loss; None: all

    @classmethod
    def open(cls, path: str, key: str = "data.sources") -> "Corpus":
        """Open the files of a prefix, which ``key`` names. Raises UserError."""
        prefix = os.path.expanduser(path)
        indexed, described = open_indexed(prefix, key), read_description(prefix)
        answers = open_answers(prefix, indexed) if described and described.supervised else None
        return cls(prefix, indexed, described, answers)

    @property
    def tokenizer(self) -> str | None:
        """Return the fingerprint of the tokenizer that made it; None: not known."""
        return self.described.tokenizer_fingerprint if self.described else None

    @cached_property
    def identity(self) -> dict:
        """Return what tells it apart from others, see identity.py."""
        return identity(self.prefix, self.indexed, self.tokenizer, self.answers is not None)
