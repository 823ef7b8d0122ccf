"""Read the documents whose loss is measured: from a prepared corpus, from text files, or held out by a run."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from inplace_ttt.config import Config, UserError
from inplace_ttt.data.corpus import Corpus
from inplace_ttt.data.documents import SkipReport, find_files, read_documents
from inplace_ttt.data.packed import split_documents
from inplace_ttt.data.recall import HELD_OUT_SEED, KeyValueRecall
from inplace_ttt.hf.tokenizer import fingerprint


@dataclass(frozen=True)
class Document:
    """Hold the token IDs of a document."""

    tokens: np.ndarray  # (n,) int64 token IDs
    counts: np.ndarray | None = None  # (n - 1,) bool: True if the token after each one is scored; None: score all

    @cached_property
    def digest(self) -> str:
        """Return a hash of the tokens."""
        return hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest()[:16]

    def cut(self, length: int) -> "Document":
        """Return the first ``length`` tokens and the one that follows."""
        return Document(self.tokens[: length + 1], None if self.counts is None else self.counts[:length])


@dataclass(frozen=True)
class Selection:
    """Describe which documents to choose."""

    length: int  # tokens read per document
    at_least: int  # tokens that a document must exceed
    count: int  # maximum number of documents
    seed: int = 0  # seed of the random choice


@dataclass(frozen=True)
class Chosen:
    """Hold the chosen documents and their source."""

    documents: list[Document]
    source: str  # description for tables and messages
    tokenizer: str | None  # fingerprint of the tokenizer; None: unknown
    notes: tuple[str, ...] = ()  # notes to print for the user


def held_out(config: Config, run: Path, selection: Selection) -> Chosen:
    """Return held-out documents of a run. Raises UserError if it has none, or none is long enough."""
    data = config.data
    if data.kind == "recall":
        if selection.length > data.seq_length:
            raise UserError(
                f"--length {selection.length}: the samples of '{run}' have {data.seq_length} tokens; use at most that"
            )
        return Chosen([_recall(config, number).cut(selection.length) for number in range(selection.count)],
                      f"held-out samples of {run.name}", None)  # fmt: skip
    texts: list[Place] = []
    known = []
    for source in data.validation or data.sources:
        prefix = _prefix(source.path, run)
        corpus = Corpus.open(prefix, "data.validation" if data.validation else "data.sources")
        fraction = 0.0 if data.validation else data.validation_fraction
        everything, numbers = split_documents(corpus.indexed, fraction, prefix)
        texts += [(corpus, int(number)) for number in (everything if data.validation else numbers)]
        known.append(corpus.tokenizer)
    if not texts:
        raise UserError(f"'{run}' has no held-out documents (data.validation_fraction): set --documents")
    return Chosen(_choose(texts, selection, f"the held-out set of '{run}'"), f"held-out documents of {run.name}",
                  known[0])  # fmt: skip


def of_corpus(prefix: str, selection: Selection) -> Chosen:
    """Return documents of a prepared corpus. Raises UserError if none is long enough.

    Args:
        prefix: path of the corpus without the extensions .bin and .idx.
    """
    corpus = Corpus.open(prefix)
    texts = [(corpus, number) for number in range(len(corpus.indexed.sequence_lengths))]
    return Chosen(_choose(texts, selection, f"'{prefix}'"), f"documents of {prefix}", corpus.tokenizer)


def of_files(
    names: list[str], selection: Selection, tokenizer: PreTrainedTokenizerBase, text_key: str = "text"
) -> Chosen:
    """Return the first documents of files and folders that are long enough, tokenized without special tokens.

    Raises UserError if the files contain no text, or no document is long enough.
    """
    found, longest, report = [], 0, SkipReport()
    for text in read_documents(find_files(names), text_key, report):
        ids = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        longest = max(longest, len(ids))
        if len(ids) > selection.at_least:
            found.append(Document(np.asarray(ids, dtype=np.int64)).cut(selection.length))
        if len(found) == selection.count:
            break
    unread = f"{report.bad} cannot be read, the first because of {report.places[0]}" if report.bad else ""
    if not found and not longest:
        raise UserError(f"{', '.join(names)}: no text found{'; ' * bool(unread)}{unread}")
    if not found:
        raise _too_short(", ".join(names), selection, longest)
    notes = (f"of the documents {unread}",) if unread else ()
    return Chosen(found, f"documents of {', '.join(names)}", fingerprint(tokenizer), notes)


def is_corpus(name: str) -> bool:
    """Return True if a name is the prefix of a prepared corpus."""
    return os.path.isfile(os.path.expanduser(f"{name}.idx"))


def _prefix(path: str, run: Path) -> str:
    """Return the path of a run's data source, relative to the working directory or to a parent folder of the run."""
    path = os.path.expanduser(path)
    places = [os.path.join(root, path) for root in ("", *run.resolve().parents)]
    return next((place for place in places if is_corpus(place)), path)


Place = tuple[Corpus, int]  # a corpus and the index of a document in it


def _choose(texts: list[Place], selection: Selection, where: str) -> list[Document]:
    """Return documents that are long enough, in a random order given by the seed. Raises UserError if none is."""
    lengths = [int(corpus.indexed.sequence_lengths[number]) for corpus, number in texts]
    order = np.random.default_rng(selection.seed).permutation(len(texts))
    chosen = [texts[place] for place in order if lengths[place] > selection.at_least][: selection.count]
    if not chosen:
        raise _too_short(where, selection, max(lengths, default=0))
    return list(_read(chosen, selection.length))


def _read(chosen: list[Place], length: int) -> Iterator[Document]:
    for corpus, number in chosen:
        size = min(int(corpus.indexed.sequence_lengths[number]), length + 1)
        counts = None if corpus.answers is None else corpus.answers.get(number, offset=1, length=size - 1) != 0
        yield Document(corpus.indexed.get(number, offset=0, length=size).astype(np.int64), counts)


def _too_short(where: str, selection: Selection, longest: int) -> UserError:
    return UserError(
        f"{where} has no document of more than {selection.at_least} tokens, the longest has {longest}: use a smaller "
        f"--length, or set --min-length to accept shorter documents"
    )


def _recall(config: Config, number: int) -> Document:
    data = config.data
    sample = KeyValueRecall(
        data.seq_length, data.recall_pairs, data.recall_alphabet, seed=config.train.seed + HELD_OUT_SEED
    )[number]
    tokens = np.concatenate([sample.tokens.numpy(), sample.labels.numpy()[-1:]])
    return Document(tokens, sample.loss_mask.numpy() > 0)
