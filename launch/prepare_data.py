"""Tokenize text into Megatron's indexed format, with document boundaries.

python launch/prepare_data.py --output data/mine --tokenizer Qwen/Qwen3-4B-Base books/ code.jsonl.zst notes.parquet
python launch/prepare_data.py --output data/web --tokenizer DIR --dataset HuggingFaceFW/fineweb-edu --split train
python launch/prepare_data.py --output data/python --python-packages --train-tokenizer 2048

Conversations (rows of messages, or of a prompt and its completion) are rendered with the tokenizer's chat template.
Only answers count in the loss:

python launch/prepare_data.py --output data/chats --tokenizer Qwen/Qwen3-4B --supervised chats.jsonl

Unusable documents (truncated, empty, wrong encoding) are skipped and counted; the first ten are listed. Rerun the same
command to resume after an interruption: finished parts are kept, even if their input files have changed since.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from inplace_ttt.command import run_command
from inplace_ttt.config import UserError
from inplace_ttt.files import user_path

MOST_ENTRIES = 2**20  # largest vocabulary of --train-tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs", nargs="*", help="files or folders: text, .jsonl, .ndjson, .json, .parquet, also .zst or .gz"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json, .tokenizer/")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.add_argument("--if-missing", action="store_true", help="do nothing if the output exists")
    parser.add_argument("--strict", action="store_true", help="stop at the first unusable document")
    source = parser.add_argument_group("text")
    source.add_argument(
        "--format",
        choices=["text", "jsonl", "json", "parquet"],
        help="format of all input files (default: by extension)",
    )
    source.add_argument("--text-key", default="text", help="field or column that holds the text (text)")
    source.add_argument("--dataset", metavar="NAME", help="dataset of the `datasets` library, instead of files")
    source.add_argument("--dataset-config", metavar="CONFIG", help="configuration of the dataset")
    source.add_argument("--split", default="train", help="split of the dataset (train)")
    source.add_argument("--python-packages", action="store_true", help="sources of the installed Python packages")
    source.add_argument(
        "--max-megabytes", type=float, default=32.0, help="largest size for --python-packages, in MB (32)"
    )
    source.add_argument(
        "--supervised",
        action="store_true",
        help="rows are conversations (messages, or prompt and completion); only answers count in the loss",
    )
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--tokenizer", metavar="NAME", help="tokenizer folder or Hugging Face name")
    tokens.add_argument("--train-tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE of SIZE entries")
    tokens.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put the begin-of-text token before each document (default: as the tokenizer does; Llama yes, Qwen no)",
    )
    tokens.add_argument("--no-eos", action="store_true", help="do not put the end-of-text token after each document")
    tokens.add_argument(
        "--special-tokens",
        choices=["text", "control"],
        default="text",
        help="names of special tokens inside text become ordinary text, or the special (control) token (text)",
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="number of processes (one per core)"
    )
    return parser.parse_args()


def main() -> int:
    arguments, console = parse_arguments(), Console(stderr=True)
    return run_command(lambda: run(arguments, console), "stopped; rerun the same command to resume")


def check(arguments: argparse.Namespace) -> None:
    sources = [bool(arguments.inputs), bool(arguments.dataset), arguments.python_packages]
    if sum(sources) != 1:
        raise UserError("give exactly one source of text: files or folders, --dataset NAME, or --python-packages")
    if bool(arguments.tokenizer) == (arguments.train_tokenizer is not None):
        raise UserError("give exactly one of --tokenizer NAME and --train-tokenizer SIZE")
    size = arguments.train_tokenizer
    if size is not None and not 257 <= size <= MOST_ENTRIES:
        raise UserError(f"--train-tokenizer {size}: use 257 (256 bytes and end of text) to {MOST_ENTRIES:,}")
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= arguments.workers <= most:
        raise UserError(f"--workers {arguments.workers}: use 1 to {most}")
    if not (math.isfinite(arguments.max_megabytes) and arguments.max_megabytes > 0):
        raise UserError(f"--max-megabytes {arguments.max_megabytes}: use a number above 0")
    if not Path(arguments.output).name or arguments.output.endswith("/"):
        raise UserError(f"--output '{arguments.output}' is a folder: use a path prefix, such as data/mine")
    if arguments.supervised and (arguments.python_packages or arguments.train_tokenizer is not None):
        raise UserError(
            "--supervised needs files or a dataset of conversations, and a --tokenizer with a chat template"
        )
    if arguments.supervised and arguments.text_key != "text":
        raise UserError(f"--text-key {arguments.text_key} has no effect with --supervised: remove one of them")
    if not arguments.text_key:
        raise UserError("--text-key '' is empty: name the field or column that contains the text")
    for option, value in (("--dataset-config", arguments.dataset_config), ("--split", arguments.split)):
        if not arguments.dataset and value not in (None, "train"):
            raise UserError(f"{option} {value} needs --dataset NAME: add that, or remove {option}")
    if Path(arguments.output).name in ("..", ".") or len(os.fsencode(Path(arguments.output).name)) > 200:
        raise UserError(f"--output '{arguments.output}' is not a valid path prefix: use one such as data/mine")
    if arguments.overwrite and arguments.if_missing:
        raise UserError("--overwrite and --if-missing exclude each other: use one of them")


def run(arguments: argparse.Namespace, console: Console) -> None:
    check(arguments)
    output = user_path(arguments.output)
    if arguments.if_missing and all(Path(f"{output}.{end}").is_file() for end in ("bin", "idx", "json")):
        console.print(f"{output} already exists", markup=False)
        return

    from inplace_ttt.data import documents, prepare
    from inplace_ttt.data.conversations import Conversations
    from inplace_ttt.hf.tokenizer import adds_bos, load_tokenizer, train_tokenizer

    report = documents.SkipReport(strict=arguments.strict)
    field = Conversations() if arguments.supervised else arguments.text_key
    total = None
    if arguments.dataset:
        settings = dict(dataset=arguments.dataset, config=arguments.dataset_config, split=arguments.split)

        def read(report):
            return documents.read_hub_dataset(
                arguments.dataset, arguments.dataset_config, arguments.split, field, report
            )
    elif arguments.python_packages:
        settings = dict(python_packages=arguments.max_megabytes)
        total = arguments.max_megabytes * 1e6

        def read(report):
            return documents.python_packages(int(arguments.max_megabytes * 1e6))
    else:
        settings = {}
        files = documents.find_files(arguments.inputs, report, output)
        for file in files if arguments.format is None else ():
            documents.format_of(file)  # raises UserError for unknown extensions
        if not any(f.suffix in (".zst", ".gz", ".parquet") for f in files):
            total = sum(f.stat().st_size for f in files)

        def read(report):
            return documents.read_documents(files, field, report, arguments.format)

    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        with console.status(f"training a byte-level BPE of {arguments.train_tokenizer} entries"):
            first = documents.SkipReport(strict=arguments.strict)  # counts are discarded: the main pass counts again
            tokenizer = train_tokenizer(_first_bytes(read(first), 8_000_000), arguments.train_tokenizer)
    options = prepare.Options(
        begin=adds_bos(tokenizer) if arguments.bos is None else arguments.bos,
        end=not arguments.no_eos,
        special_tokens=arguments.special_tokens,
        supervised=arguments.supervised,
    )
    with Progress(
        TextColumn("tokenizing"),
        BarColumn(),
        TextColumn("{task.completed:.1f} MB, {task.fields[documents]} documents, {task.fields[tokens]:.2f}M tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("", total=total and total / 1e6, documents=0, tokens=0.0)

        def progress(n_documents: int, size: int, n_tokens: int) -> None:
            fields = bar.tasks[task].fields
            bar.update(
                task,
                advance=size / 1e6,
                documents=fields["documents"] + n_documents,
                tokens=fields["tokens"] + n_tokens / 1e6,
            )

        try:
            description = prepare.prepare(
                read(report),
                tokenizer,
                str(output),
                settings={**settings, "text_key": arguments.text_key},
                workers=arguments.workers,
                progress=progress,
                options=options,
                overwrite=arguments.overwrite,
                leave_out=report.leave_out,
            )
        except UserError as error:
            if report.places and "no text" in str(error):
                raise UserError(f"{error} ({report.places[0]})") from error
            raise
        bar.update(task, total=bar.tasks[task].completed)
    for line in report.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    counted = ""
    if description.supervised:
        counted = f" (of which {description.counted_tokens:,} count in the loss)"
    console.print(
        f"{output}: {description.documents:,} documents, {description.tokens:,} tokens{counted}, "
        f"vocabulary {description.vocab_size:,}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _first_bytes(texts, limit: int):
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total > limit:
            return


if __name__ == "__main__":
    sys.exit(main())
