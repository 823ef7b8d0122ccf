"""Turn text into Megatron's indexed format with document boundaries.

python launch/prepare_data.py --output data/mine --tokenizer Qwen/Qwen3-4B-Base books/ code.jsonl.zst notes.parquet
python launch/prepare_data.py --output data/web --tokenizer DIR --dataset HuggingFaceFW/fineweb-edu --split train
python launch/prepare_data.py --output data/python --python-packages --train-tokenizer 2048
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", help="files or folders: text, .jsonl, .json, .parquet, also .zst or .gz")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json, .tokenizer/")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or Hugging Face name")
    parser.add_argument("--train-tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE of SIZE entries")
    parser.add_argument("--dataset", metavar="NAME", help="a dataset of the `datasets` library instead of files")
    parser.add_argument("--dataset-config", metavar="CONFIG")
    parser.add_argument("--split", default="train", help="of the dataset (train)")
    parser.add_argument("--text-key", default="text", help="field or column that holds the text (text)")
    parser.add_argument("--python-packages", action="store_true", help="the sources of the installed Python packages")
    parser.add_argument("--max-megabytes", type=float, default=32.0, help="of --python-packages (32)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    parser.add_argument("--if-missing", action="store_true", help="do nothing where the output is there already")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    console = Console(stderr=True)
    try:
        run(arguments, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    except Exception as error:
        from inplace_ttt.config import UserError

        if isinstance(error, UserError):
            console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
            return 2
        if isinstance(error, OSError):
            console.print(f"[red]error:[/red] cannot write '{arguments.output}': {error}", soft_wrap=True)
            return 2
        raise
    return 0


def run(arguments: argparse.Namespace, console: Console) -> None:
    from inplace_ttt.config import UserError

    sources = [bool(arguments.inputs), bool(arguments.dataset), arguments.python_packages]
    if sum(sources) != 1:
        raise UserError("give exactly one source of text: files or folders, --dataset NAME, or --python-packages")
    if bool(arguments.tokenizer) == bool(arguments.train_tokenizer):
        raise UserError("give exactly one of --tokenizer NAME and --train-tokenizer SIZE")
    if arguments.train_tokenizer is not None and arguments.train_tokenizer < 257:
        raise UserError(f"--train-tokenizer {arguments.train_tokenizer} is too small: 256 bytes and an end need 257")
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: at least 1 is needed")
    if arguments.if_missing and all(Path(f"{arguments.output}.{end}").is_file() for end in ("bin", "idx", "json")):
        console.print(f"{arguments.output} is there")
        return

    from inplace_ttt.data import documents, prepare
    from inplace_ttt.data.tokenizer import load_tokenizer, train_tokenizer

    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    total = None
    if arguments.dataset:
        settings = dict(dataset=arguments.dataset, config=arguments.dataset_config, split=arguments.split)

        def read():
            return documents.read_hub_dataset(
                arguments.dataset, arguments.dataset_config, arguments.split, arguments.text_key
            )
    elif arguments.python_packages:
        settings = dict(python_packages=arguments.max_megabytes)
        total = arguments.max_megabytes * 1e6

        def read():
            return documents.python_packages(int(arguments.max_megabytes * 1e6))
    else:
        files = documents.find_files(arguments.inputs)
        settings = dict(files=[[str(f), f.stat().st_size, f.stat().st_mtime] for f in files])
        if not any(f.suffix in (".zst", ".gz", ".parquet") for f in files):
            total = sum(f.stat().st_size for f in files)

        def read():
            return documents.read_documents(files, arguments.text_key)

    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        with console.status(f"training a byte-level BPE of {arguments.train_tokenizer} entries"):
            tokenizer = train_tokenizer(_first_bytes(read(), 8_000_000), arguments.train_tokenizer)
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

        description = prepare.prepare(
            read(),
            tokenizer,
            arguments.output,
            settings={**settings, "text_key": arguments.text_key},
            workers=arguments.workers,
            progress=progress,
        )
    console.print(
        f"{arguments.output}: {description.documents:,} documents, {description.tokens:,} tokens, "
        f"vocabulary {description.vocab_size:,}",
        highlight=False,
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
