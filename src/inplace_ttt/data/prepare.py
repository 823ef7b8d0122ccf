"""Text to Megatron's indexed files: tokenized in parallel, in order, and taken up again where it was stopped.

Documents are read in order and dealt out in parts of some megabytes. Each part is tokenized and written by a worker
under a name of its own; what has its final name is whole. A second run with the same settings reads past the parts
that are there. At the end the parts are joined into PREFIX.bin and PREFIX.idx, beside PREFIX.json, which says what
they are, and PREFIX.tokenizer/, what they were made with.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from inplace_ttt.config import UserError
from inplace_ttt.data.tokenizer import fingerprint, load_tokenizer
from inplace_ttt.megatron.indexed import DType, IndexedDatasetBuilder

PART_BYTES = 4_000_000  # of text


@dataclass(frozen=True)
class Description:
    """PREFIX.json."""

    documents: int
    tokens: int
    vocab_size: int
    eos_token_id: int
    tokenizer_fingerprint: str


def read_description(prefix: str) -> Description | None:
    """What PREFIX.json says; None where files came from elsewhere and have none."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        return Description(**json.loads(path.read_text()))
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"'{path}' is damaged ({error}); run prepare_data.py again") from error


def prepare(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    *,
    settings: dict,
    workers: int,
    progress: Callable[[int, int, int], None],
) -> Description:
    """Write PREFIX.bin, .idx, .json and .tokenizer/.

    ``settings`` is what the result depends on besides the tokenizer: where it equals that of a run that was stopped,
    that run's parts are used. ``progress(documents, bytes, tokens)`` is called after each part with what it adds.
    Raises UserError where nothing is left to write.
    """
    parts = Path(f"{prefix}.parts")
    settings = {**settings, "tokenizer": fingerprint(tokenizer), "part_bytes": PART_BYTES}
    _open_parts(parts, settings)
    tokenizer.save_pretrained(f"{prefix}.tokenizer")

    counts = [0, 0]
    names = []
    context = multiprocessing.get_context("forkserver")
    with context.Pool(workers, _start_worker, (f"{prefix}.tokenizer", str(parts))) as pool:
        for name, size, n_documents, n_tokens in _bounded(pool, _write_part, _deal(documents), 2 * workers):
            names.append(name)
            counts[0] += n_documents
            counts[1] += n_tokens
            progress(n_documents, size, n_tokens)
    if not counts[1]:
        shutil.rmtree(parts)
        raise UserError("the input holds no text: nothing was written")
    _join(prefix, [parts / name for name in names], len(tokenizer))
    description = Description(counts[0], counts[1], len(tokenizer), tokenizer.eos_token_id, fingerprint(tokenizer))
    _write_json(Path(f"{prefix}.json"), asdict(description))
    shutil.rmtree(parts)
    return description


def _open_parts(parts: Path, settings: dict) -> None:
    """Keep the parts of a run with the same settings, else begin anew."""
    record = parts / "settings.json"
    if not (record.is_file() and json.loads(record.read_text()) == json.loads(json.dumps(settings))):
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        _write_json(record, settings)


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
    """Results in order, with at most ``limit`` items read ahead: a corpus does not fit in memory."""
    pending = []
    for item in items:
        pending.append(pool.apply_async(function, (item,)))
        if len(pending) >= limit:
            yield pending.pop(0).get()
    for result in pending:
        yield result.get()


_worker: dict = {}


def _start_worker(tokenizer_path: str, parts: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(tokenizer=load_tokenizer(tokenizer_path), parts=Path(parts))


def _write_part(item: tuple[int, list[str]]) -> tuple[str, int, int, int]:
    number, texts = item
    name, parts = f"{number:06d}", _worker["parts"]
    size = sum(len(text.encode()) for text in texts)
    done = parts / f"{name}.json"
    if done.is_file():
        counts = json.loads(done.read_text())
        return name, size, counts["documents"], counts["tokens"]
    tokenizer = _worker["tokenizer"]
    builder = IndexedDatasetBuilder(str(parts / f"{name}.bin"), dtype=DType.optimal_dtype(len(tokenizer)))
    n_documents = n_tokens = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        builder.add_document(np.asarray(ids), [len(ids)])
        n_documents += 1
        n_tokens += len(ids)
    builder.finalize(str(parts / f"{name}.idx"))
    _write_json(done, {"documents": n_documents, "tokens": n_tokens})
    return name, size, n_documents, n_tokens


def _join(prefix: str, parts: list[Path], vocab_size: int) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin.partial", dtype=DType.optimal_dtype(vocab_size))
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(f"{prefix}.idx.partial")
    for ending in ("bin", "idx"):
        os.replace(f"{prefix}.{ending}.partial", f"{prefix}.{ending}")


def _write_json(path: Path, content: dict) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)
