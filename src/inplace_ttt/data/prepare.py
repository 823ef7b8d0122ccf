"""Tokenize text into Megatron's indexed files, in parallel, in order and resumable.

Documents are read in order and divided into parts of some megabytes. A worker tokenizes each part and writes it under a
temporary name; a part with its final name is complete, and is identified by a digest of its text. A second run reuses
parts with the same text. At the end the parts are joined into PREFIX.bin and PREFIX.idx. PREFIX.json describes them,
and PREFIX.tokenizer/ is the tokenizer. For conversations, PREFIX.answers.bin and .idx have the same format and contain
one number per token: 1 if it counts in the loss.
"""

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from inplace_ttt.config import UserError
from inplace_ttt.data.chat import Encoder
from inplace_ttt.data.conversations import Conversation
from inplace_ttt.data.documents import ANSWERS, ENDINGS
from inplace_ttt.data.indexed import DType, IndexedDatasetBuilder
from inplace_ttt.files import read_json, write_json
from inplace_ttt.hf.tokenizer import embedding_rows, fingerprint, load_tokenizer
from inplace_ttt.resilience.lock import lock_beside

PART_BYTES = 4_000_000  # characters of text per part
MARK = ".inplace_ttt_parts"  # marks folders of parts and of tokenizers that this program made


@dataclass(frozen=True)
class Options:
    """Select the tokens around documents, and the meaning of special tokens inside their text."""

    begin: bool = False  # put the begin-of-text token before each document
    end: bool = True  # put the end-of-text token after each document
    special_tokens: str = "text"  # text: tokenize them as ordinary text; control: as special tokens
    supervised: bool = False  # documents are conversations; only answers count in the loss


@dataclass(frozen=True)
class Description:
    """Describe prepared data; the content of PREFIX.json."""

    documents: int
    tokens: int
    vocab_size: int
    eos_token_id: int | None
    tokenizer_fingerprint: str
    begin: bool = False
    end: bool = True
    special_tokens: str = "control"  # older files, without this key, were made with control
    supervised: bool = False
    counted_tokens: int | None = None  # tokens that count in the loss; None: all, or not known (older files)


def read_description(prefix: str) -> Description | None:
    """Return the content of PREFIX.json; None if it does not exist. Raises UserError if it is damaged."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    values = read_json(path, "run prepare_data.py again")
    known = {field.name: values[field.name] for field in fields(Description) if field.name in values}
    try:
        found = Description(**known)
    except TypeError as error:
        lacking = [field.name for field in fields(Description) if field.name not in known]
        raise UserError(f"'{path}' is damaged (it has no {lacking[0]}): run prepare_data.py again") from error
    if type(found.vocab_size) is not int or found.vocab_size < 1 or not isinstance(found.tokenizer_fingerprint, str):
        raise UserError(
            f"'{path}' is damaged (its vocab_size or tokenizer_fingerprint is invalid): run prepare_data.py again"
        )
    return found


def prepare(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    *,
    settings: dict,
    workers: int,
    progress: Callable[[int, int, int], None],
    options: Options = Options(),
    overwrite: bool = False,
    leave_out: Callable[[str, str], None] = lambda place, why: None,
) -> Description:
    """Tokenize documents and write PREFIX.bin, .idx, .json and .tokenizer/; return the content of PREFIX.json.

    Example::

        >>> from inplace_ttt.hf.tokenizer import train_tokenizer
        >>> texts = ["one document", "and another one"]
        >>> made = dict(settings={}, workers=1, progress=lambda documents, size, tokens: None)
        >>> prepare(texts, train_tokenizer(texts, 270), f"{folder}/corpus", **made).documents
        2

    Args:
        documents: texts, or conversations as JSON (``Conversations``).
        prefix: path prefix of the output.
        settings: what the result depends on besides text, tokenizer and options; parts of a stopped run with equal
            settings are reused.
        workers: number of processes.
        progress: called with (documents, bytes, tokens) of each finished part.
        overwrite: replace existing output.
        leave_out: called with (location, reason) for each conversation that the chat template rejects.

    Raises UserError if another process writes to ``prefix``, if existing files would be overwritten, or if the input
    contains no text.
    """
    _check_options(tokenizer, options)
    parts = Path(f"{prefix}.parts")
    with lock_beside(Path(prefix), f"--output {prefix}"):
        _check_output(prefix, overwrite)
        ends = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template if options.supervised else None]
        settings = {
            **settings,
            "tokenizer": [fingerprint(tokenizer), *ends],
            "part_bytes": PART_BYTES,
            **asdict(options),
        }
        _open_parts(parts, settings)
        _save_tokenizer(tokenizer, parts)

        counts, names = [0, 0], []
        context = multiprocessing.get_context("forkserver")
        with context.Pool(workers, _start_worker, (str(parts / "tokenizer"), str(parts), options)) as pool:
            for name, size, n_documents, n_tokens, bad in _bounded(pool, _write_part, _deal(documents), 2 * workers):
                names.append(name)
                for place, why in bad:
                    leave_out(place, why)
                counts[0] += n_documents
                counts[1] += n_tokens
                progress(n_documents, size, n_tokens)
        if not counts[1]:
            shutil.rmtree(parts)
            raise UserError("the input contains no text: nothing was written")
        description = Description(
            documents=counts[0],
            tokens=counts[1],
            vocab_size=embedding_rows(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            tokenizer_fingerprint=fingerprint(tokenizer),
            **asdict(options),
        )
        description = _join(prefix, [parts / name for name in names], description)
        shutil.rmtree(parts)
        return description


def _check_output(prefix: str, overwrite: bool) -> None:
    """Raise UserError if output exists without ``overwrite``, or was not made by this program."""
    there = [f"{prefix}.{ending}" for ending in ENDINGS if os.path.lexists(f"{prefix}.{ending}")]
    if there and not overwrite:
        raise UserError(f"'{there[0]}' already exists: use --overwrite to replace it, or --if-missing to keep it")
    description, checked, folder = (Path(f"{prefix}.{ending}") for ending in ("json", "checked", "tokenizer"))
    if description.exists():
        try:
            read_description(prefix)
        except UserError as error:
            raise UserError(f"'{description}' was not made by this program: move it away") from error
    ours = description.exists() or (folder / MARK).is_file()
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or not ours):
        raise UserError(f"'{folder}' would be replaced but was not made by this program: move it away")
    if checked.exists() and not description.exists():
        raise UserError(f"'{checked}' was not made by this program: move it away")


def _check_options(tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
    name = tokenizer.name_or_path or "of this corpus"
    if options.end and tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer '{name}' has no end-of-text token (eos_token) to put after each document: use another "
            f"tokenizer, or --no-eos"
        )
    if options.begin and tokenizer.bos_token_id is None:
        raise UserError(f"tokenizer '{name}' has no begin-of-text token (bos_token): remove --bos")
    if options.supervised:
        _encoder(tokenizer, options)


def _open_parts(parts: Path, settings: dict) -> None:
    """Keep the parts of a run with the same settings, else delete them. Raises UserError if the folder is not ours."""
    record = parts / "settings.json"
    before = None
    if os.path.lexists(parts):
        try:
            before = read_json(record)
        except UserError:
            before = {}
        ours = (parts / MARK).is_file() or "part_bytes" in before
        if parts.is_symlink() or not parts.is_dir() or (any(parts.iterdir()) and not ours):
            raise UserError(f"'{parts}' is needed for temporary parts but was not made by this program: move it away")
    if before != settings:
        if os.path.lexists(parts):
            shutil.rmtree(parts)
        parts.mkdir(parents=True)
        (parts / MARK).touch()
        write_json(record, settings)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, parts: Path) -> None:
    """Save the tokenizer with the parts, for the workers; ``_join`` moves it to its final name."""
    tokenizer.save_pretrained(parts / "tokenizer")
    (parts / "tokenizer" / MARK).touch()


def _deal(documents: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    part, size, number = [], 0, 0
    for text in documents:
        if not text:
            continue
        part.append(text)
        size += len(text)
        if size >= PART_BYTES:
            yield number, part
            part, size, number = [], 0, number + 1
    if part:
        yield number, part


def _bounded(pool, function, items: Iterable, limit: int) -> Iterator:
    """Yield results in order, with at most ``limit`` pending items, since a corpus does not fit in memory."""
    pending = []
    for item in items:
        pending.append(pool.apply_async(function, (item,)))
        if len(pending) >= limit:
            yield pending.pop(0).get()
    for result in pending:
        yield result.get()


_worker: dict = {}


def _start_worker(tokenizer_path: str, parts: str, options: Options) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(tokenizer=load_tokenizer(tokenizer_path), parts=Path(parts), options=options)


def _encoder(tokenizer: PreTrainedTokenizerBase, options: Options) -> Encoder:
    return Encoder(tokenizer, begin=options.begin, end=options.end, control=options.special_tokens == "control")


def _encode_conversations(texts: list[str], bad: list[tuple[str, str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens (n,) and loss flags (n,) per conversation; append those that cannot be encoded to ``bad``."""
    encoder = _encoder(_worker["tokenizer"], _worker["options"])
    for text in texts:
        conversation = Conversation.from_json(text)
        try:
            found = encoder.encode(conversation)
        except ValueError as error:
            bad.append((conversation.place, str(error)))
            continue
        yield found.tokens, found.counts


def _encode(texts: list[str]) -> Iterator[np.ndarray]:
    tokenizer, options = _worker["tokenizer"], _worker["options"]
    begin = [tokenizer.bos_token_id] if options.begin else []
    end = [tokenizer.eos_token_id] if options.end else []
    as_text = options.special_tokens == "text"
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=as_text)["input_ids"]
        yield np.asarray(begin + ids + end)


def _write_part(item: tuple[int, list[str]]) -> tuple[str, int, int, int, list[tuple[str, str]]]:
    number, texts = item
    name, parts = f"{number:06d}", _worker["parts"]
    digest, size = xxhash.xxh3_128(), 0
    for text in texts:
        content = text.encode()
        size += len(content)
        digest.update(len(content).to_bytes(8, "little") + content)
    done = parts / f"{name}.json"
    try:
        counts = read_json(done)
        if counts["digest"] == digest.hexdigest():
            return name, size, counts["documents"], counts["tokens"], [tuple(one) for one in counts.get("bad", [])]
    except (UserError, KeyError):
        pass
    done.unlink(missing_ok=True)
    dtype = DType.optimal_dtype(embedding_rows(_worker["tokenizer"]))
    builder, answers = IndexedDatasetBuilder(str(parts / f"{name}.bin"), dtype=dtype), None
    n_documents, n_tokens = 0, 0
    bad: list[tuple[str, str]] = []
    encoded: Iterable[tuple[np.ndarray, np.ndarray | None]]
    if _worker["options"].supervised:
        answers = IndexedDatasetBuilder(str(parts / f"{name}.{ANSWERS}.bin"), dtype=np.uint8)
        encoded = _encode_conversations(texts, bad)
    else:
        encoded = ((ids, None) for ids in _encode(texts))
    for ids, scored in encoded:
        builder.add_document(ids, [len(ids)])
        if answers is not None:
            answers.add_document(scored, [len(ids)])
        n_documents += 1
        n_tokens += len(ids)
    builder.finalize(str(parts / f"{name}.idx"))
    if answers is not None:
        answers.finalize(str(parts / f"{name}.{ANSWERS}.idx"))
    write_json(done, dict(documents=n_documents, tokens=n_tokens, digest=digest.hexdigest(), bad=bad))
    return name, size, n_documents, n_tokens, bad


def _join(prefix: str, parts: list[Path], description: Description) -> Description:
    """Join the parts; files get their final names at the end, PREFIX.json last. Return what PREFIX.json has."""
    folder, kinds = parts[0].parent, {"": DType.optimal_dtype(description.vocab_size)}
    if description.supervised:
        kinds[f".{ANSWERS}"] = np.uint8
    for kind, dtype in kinds.items():
        builder = IndexedDatasetBuilder(str(folder / f"whole{kind}.bin"), dtype=dtype)
        for part in parts:
            builder.add_index(f"{part}{kind}")
        builder.finalize(str(folder / f"whole{kind}.idx"))
    for ending in ("json", "checked", f"{ANSWERS}.bin", f"{ANSWERS}.idx"):
        Path(f"{prefix}.{ending}").unlink(missing_ok=True)
    shutil.rmtree(f"{prefix}.tokenizer", ignore_errors=True)
    os.replace(folder / "tokenizer", f"{prefix}.tokenizer")
    for kind in kinds:
        for ending in ("bin", "idx"):
            os.replace(folder / f"whole{kind}.{ending}", f"{prefix}{kind}.{ending}")
    if description.supervised:
        counted = np.memmap(f"{prefix}.{ANSWERS}.bin", dtype=np.uint8, mode="r")
        description = replace(description, counted_tokens=int(counted.sum(dtype=np.int64)))
    write_json(Path(f"{prefix}.json"), asdict(description))
    return description
