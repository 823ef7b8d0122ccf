"""Implement ``launch/read_book.py``: process texts once and save the resulting fast weights in a file."""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from inplace_ttt.config import UserError
from inplace_ttt.data.documents import SkipReport, find_files, read_documents
from inplace_ttt.environment import World, check_environment
from inplace_ttt.evaluation.arguments import Parser, is_key, read_key, tokens
from inplace_ttt.evaluation.documents import Document
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.evaluation.models import ModelSource, check_tokens, chosen_dtype, open_model
from inplace_ttt.files import user_path
from inplace_ttt.hf.config import check_exportable
from inplace_ttt.hf.modeling_inplace_ttt import FastWeights, text_record
from inplace_ttt.hf.tokenizer import adds_bos, fingerprint
from inplace_ttt.job import SLOW_PHASE_FACTOR, Job, run_job
from inplace_ttt.resilience.exits import fail

HELP = """\
Process texts once and save the fast weights as a book: launch/read_book.py MODEL FILE [FILE ...] --output BOOK

MODEL is a run folder (its last checkpoint is used), a checkpoint, or a folder in Hugging Face format. With a training
checkpoint, all ranks of torchrun share the text (context parallelism), or use the layout given by key=value. Files are
text, .jsonl, .json or .parquet; their texts are concatenated in order.

  python launch/read_book.py exported/ book.txt --output book.safetensors
  torchrun --nproc-per-node 8 launch/read_book.py runs/my_run book.txt --output book.safetensors
  python launch/generate.py exported/ --book book.safetensors --prompt "Who killed the count?"
"""
SIZES = tuple(f"parallel.{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context"))
KEYS = (*SIZES, "parallel.timeout_minutes", "model.transformer_impl", "train.precision", "ttt.prefix", "ttt.comm_dtype")


@dataclass(frozen=True)
class Text:
    """Hold the token IDs of a text, and the files that it consists of."""

    tokens: list[int]
    parts: list[tuple[str, int]]  # (file name, number of tokens)

    def text_record(self) -> list[dict]:
        """Return the list of texts to store in the book."""
        found, start = [], 0
        for name, size in self.parts:
            found.append(text_record(self.tokens[start : start + size], name))
            start += size
        return found


def main(words: list[str]) -> int:
    """Run the command line and return the exit code: 0 finished, 2 user error, 3 or 4 as in training."""
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    try:
        options, overrides, mode = _parse(words)
        world = World.from_environment()
        check_environment()
        timeout = overrides.get("parallel.timeout_minutes", 10.0)
        return run_job(
            lambda job: _read(options, overrides, mode, job), world, timeout, output=f"--output '{options.output}'"
        )
    except UserError as error:
        return fail(f"error: {error}", 2)


def _parse(words: list[str]) -> tuple[argparse.Namespace, dict[str, object], FastWeightMode]:
    parser = Parser(prog="launch/read_book.py", usage=argparse.SUPPRESS, description=HELP, allow_abbrev=False)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=user_path, required=True, metavar="BOOK", help="file to write")
    parser.add_argument("--text-key", default="text", help="text field of .jsonl, .json and .parquet files (text)")
    parser.add_argument("--fast-weights", default="on", metavar="MODE", help="on, or clip=NUMBER (on)")
    parser.add_argument("--size", choices=["exact", "bf16"], default="exact", help="bf16: half the file size (exact)")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="dtype of a folder's model")
    parser.add_argument("--part", type=tokens, help="tokens per prefill step of a folder's model (8 chunks, or 8k)")
    options, rest = parser.parse_mixed(words)
    named = [*options.names, *rest]
    overrides = dict(read_key(word, KEYS) for word in named if is_key(word))
    named = [word for word in named if not is_key(word)]
    if len(named) < 2:
        raise UserError("name a model and the files to read: launch/read_book.py MODEL FILE --output BOOK")
    options.model, options.files = user_path(named[0]), named[1:]
    mode = FastWeightMode.parse(options.fast_weights)
    if not mode.on:
        raise UserError("--fast-weights off: a book needs fast weights; use on or clip=NUMBER")
    return options, overrides, mode


def _read(options: argparse.Namespace, overrides: dict, mode: FastWeightMode, job: Job) -> int:
    named, world = ModelSource.find(options.model), job.world
    if not named.has_fast_weights:
        raise UserError(f"'{options.model}' has no fast weights to save: name a model with TTT layers")
    if named.checkpoint is None and (world.size > 1 or overrides):
        raise UserError(
            f"'{options.model}' is in Hugging Face format, which needs one process and no key=value: name the run that "
            f"it was exported from, whose checkpoint supports {'several ranks' if world.size > 1 else 'any layout'}"
        )
    tokenizer, started = named.tokenizer(), time.perf_counter()
    if named.checkpoint is None:
        _check_output(options.output)
        text = _read_files(options, named, tokenizer)
        book = _by_folder(options, mode, text, named)
    else:
        text, book = _by_checkpoint(options, overrides, mode, named, tokenizer, job)
    if world.rank:
        return 0
    book.tokenizer, book.texts = fingerprint(tokenizer), [text.text_record()]
    try:
        book.save(str(options.output), torch.bfloat16 if options.size == "bf16" else None)
    except Exception as error:  # safetensors raises any type
        raise UserError(f"--output '{options.output}' cannot be written: {error}") from error
    seconds, size = time.perf_counter() - started, options.output.stat().st_size / 2**20
    print(f"'{options.output}' saved: {len(text.tokens):,} tokens in {seconds:.0f} s, {size:.0f} MiB")
    return 0


def _check_output(path: Path) -> None:
    """Raise UserError if the file exists or cannot be created, before a long text is processed.

    Call it on the rank that writes the file: others may see the file that it creates here for a moment.
    """
    if os.path.lexists(path):
        raise UserError(f"--output '{path}' already exists: remove it, or use another file name")
    if not path.resolve().parent.is_dir():
        raise UserError(f"--output '{path}': the folder '{path.parent}' does not exist: create it")
    try:
        path.touch(exist_ok=False)
        path.unlink()
    except OSError as error:
        raise UserError(f"--output '{path}' cannot be written: {error.strerror}") from error


def _read_files(options: argparse.Namespace, named: ModelSource, tokenizer: PreTrainedTokenizerBase) -> Text:
    text = read_text(options.files, options.text_key, tokenizer)
    if named.vocabulary():
        check_tokens(max(text.tokens), named.vocabulary(), options.model)
    return text


def read_text(names: list[str], text_key: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return the concatenated texts of files, with a BOS token if the tokenizer adds one.

    Raises UserError if a file does not exist, cannot be read, or contains no text.
    """
    ids, parts = [], []
    for path in find_files(names):
        own = []
        for text in read_documents([path], text_key, SkipReport(strict=True)):
            text = text if text.endswith("\n") else f"{text}\n"
            own += tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        if not own:
            raise UserError(f"'{path}' contains no text")
        if not ids and adds_bos(tokenizer):
            own.insert(0, tokenizer.bos_token_id)
        ids += own
        parts.append((path.name, len(own)))
    return Text(ids, parts)


def _by_folder(options: argparse.Namespace, mode: FastWeightMode, text: Text, named: ModelSource) -> FastWeights:
    """Process a text with a model in Hugging Face format, in prefill steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = open_model(named.path, options.model.name, mode, device, chosen_dtype(options.dtype)).network
    with _progress() as advance:
        return network.read(torch.tensor([text.tokens], device=device), part=options.part, progress=advance)


@contextlib.contextmanager
def _progress() -> Iterator:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("reading"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _by_checkpoint(
    options: argparse.Namespace,
    overrides: dict,
    mode: FastWeightMode,
    named: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
) -> tuple[Text, FastWeights | None]:
    """Process the files with a training checkpoint on all ranks; return their text, and the book (None on rank > 0)."""
    from inplace_ttt.data.position import PositionRanges
    from inplace_ttt.evaluation.checkpoint_reader import CheckpointReader, ScoredDocument
    from inplace_ttt.inference.checkpoint_book import fingerprint_of_checkpoint, read_book
    from inplace_ttt.megatron import runtime

    check_exportable(named.checkpoint.config, f"'{named.path}'")
    config = layout(named.path, overrides, job.world.size)
    job.start(config.parallel, 0)
    runtime.on_first_rank(lambda: _check_output(options.output))
    job.watchdog.set_phase("reading the files", SLOW_PHASE_FACTOR)
    text = runtime.on_all_ranks(lambda: _read_files(options, named, tokenizer))
    reader = CheckpointReader(named.path, config, job, len(text.tokens))
    job.watchdog.set_phase("reading")
    # a document's last token is only a label: append one, so that all tokens of the text are inputs
    document = Document(np.array([*text.tokens, text.tokens[-1]], dtype=np.int64))
    reading = ScoredDocument(document, PositionRanges((0, len(text.tokens))))
    book = read_book(reader, reading, mode)
    runtime.raise_on_all_ranks(None)
    if book is not None:
        book.model = fingerprint_of_checkpoint(named.checkpoint)
    return text, book


def layout(path: Path, overrides: dict[str, object], ranks: int):
    """Return a checkpoint's configuration for processing one text on ``ranks`` ranks.

    Tensor and pipeline parallel sizes are 1 unless ``overrides`` sets them; context parallelism uses the other ranks.
    Raises UserError if the layout is invalid.
    """
    from inplace_ttt.evaluation.checkpoint_reader import evaluation_config

    tensor, pipeline, context = SIZES
    keys = dict.fromkeys(SIZES, 1) | overrides | {"parallel.sequence_parallel": False}
    others = int(keys[tensor]) * int(keys[pipeline])
    if context not in overrides and others > 0 and ranks % others == 0:
        keys[context] = ranks // others
    return evaluation_config(path, keys, ranks)
