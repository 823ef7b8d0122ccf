"""Documents whose loss is measured: of a prepared corpus, of files, or what a run has held out."""

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
from inplace_ttt.data.tokenizer import fingerprint


@dataclass(frozen=True)
class Document:
    """A text by its tokens."""

    tokens: np.ndarray  # (n,) int64
    counts: np.ndarray | None = None  # (n - 1,): whether the token after each one is scored; None: all are

    @cached_property
    def digest(self) -> str:
        """Return a hash of the tokens."""
        return hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest()[:16]

    def cut(self, length: int) -> "Document":
        """Return the first ``length`` tokens and the one that follows."""
        return Document(self.tokens[: length + 1], None if self.counts is None else self.counts[:length])


@dataclass(frozen=True)
class Selection:
    """Choose documents."""

    length: int  # tokens that are read of each
    at_least: int  # tokens that each has
    count: int
    seed: int = 0


@dataclass(frozen=True)
class Chosen:
    """Hold documents, and say where they are from."""

    documents: list[Document]
    source: str
    tokenizer: str | None  # its fingerprint; None: not known
    notes: tuple[str, ...] = ()  # what a reader must know


def held_out(config: Config, run: Path, selection: Selection) -> Chosen:
    """Return documents that a run has held out. Raises UserError where there are not any, or none is long enough."""
    data = config.data
    if data.kind == "recall":
        if selection.length > data.seq_length:
            raise UserError(f"--length {selection.length}: the samples of '{run}' have {data.seq_length} tokens")
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
        raise UserError(f"'{run}' holds no document out (data.validation_fraction): name some with --documents")
    return Chosen(_choose(texts, selection, f"the held-out set of '{run}'"), f"held-out documents of {run.name}",
                  known[0])  # fmt: skip


def of_corpus(prefix: str, selection: Selection) -> Chosen:
    """Return documents of a prepared corpus, by the prefix of its files."""
    corpus = Corpus.open(prefix)
    texts = [(corpus, number) for number in range(len(corpus.indexed.sequence_lengths))]
    return Chosen(_choose(texts, selection, f"'{prefix}'"), f"documents of {prefix}", corpus.tokenizer)


def of_files(
    names: list[str], selection: Selection, tokenizer: PreTrainedTokenizerBase, text_key: str = "text"
) -> Chosen:
    """Return documents of files and folders, the first ones that are long enough, by a model's tokenizer."""
    found, longest, report = [], 0, SkipReport()
    for text in read_documents(find_files(names), text_key, report):
        ids = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        longest = max(longest, len(ids))
        if len(ids) > selection.at_least:
            found.append(Document(np.asarray(ids, dtype=np.int64)).cut(selection.length))
        if len(found) == selection.count:
            break
    unread = f"{report.bad} cannot be read, the first for {report.places[0]}" if report.bad else ""
    if not found and not longest:
        raise UserError(f"{', '.join(names)}: there is no text to read{'; ' * bool(unread)}{unread}")
    if not found:
        raise _too_short(", ".join(names), selection, longest)
    notes = (f"of the documents {unread}",) if unread else ()
    return Chosen(found, f"documents of {', '.join(names)}", fingerprint(tokenizer), notes)


def is_corpus(name: str) -> bool:
    """Tell whether a name is the prefix of a prepared corpus."""
    return os.path.isfile(os.path.expanduser(f"{name}.idx"))


def _prefix(path: str, run: Path) -> str:
    """Return where a source of a run lies, from here or from a folder above the run."""
    path = os.path.expanduser(path)
    places = [os.path.join(root, path) for root in ("", *run.resolve().parents)]
    return next((place for place in places if is_corpus(place)), path)


Place = tuple[Corpus, int]  # and the number of a document in it


def _choose(texts: list[Place], selection: Selection, where: str) -> list[Document]:
    """Return documents that are long enough, in an order that the seed decides."""
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
        f"{where} has no document of more than {selection.at_least} tokens, the longest has {longest}: use a shorter "
        f"--length, or --min-length for documents that do not fill it"
    )


def _recall(config: Config, number: int) -> Document:
    data = config.data
    sample = KeyValueRecall(
        data.seq_length, data.recall_pairs, data.recall_alphabet, seed=config.train.seed + HELD_OUT_SEED
    )[number]
    tokens = np.concatenate([sample.tokens.numpy(), sample.labels.numpy()[-1:]])
    return Document(tokens, sample.loss_mask.numpy() > 0)
