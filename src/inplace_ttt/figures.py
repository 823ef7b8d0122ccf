"""Store benchmark results in ``figures.json``, which plan.py and the documents read.

python -m inplace_ttt.figures decode=runs/benchmark/decode.json   # store a result, and update the documents
python -m inplace_ttt.figures                                     # update the documents

In a document, ``<!-- figures: NAME -->`` and ``<!-- end -->`` enclose the table of a result.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

FILE = Path(__file__).with_name("figures.json")
DOCUMENTS = ("docs/numbers.md",)
DIGITS = 4  # significant digits of stored values


def _fixed(value: float | list[float], digits: int, unit: str = "") -> str:
    """Format a value, or the smallest and the largest value of several runs."""
    several = value if isinstance(value, list) else [value]
    return "-".join(f"{one:,.{digits}f}" for one in several) + unit


def _share(value: float | list[float]) -> str:
    several = value if isinstance(value, list) else [value]
    return "-".join(f"{100 * one:.1f}" for one in several) + "%"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _maybe(value: float | None) -> str:
    return "" if value is None else _fixed(value, 1)


_one, _two, _three = (partial(_fixed, digits=digits) for digits in (1, 2, 3))
_count = partial(_fixed, digits=0)
# Columns of each benchmark's table: title, field of a record, formatter
COLUMNS: dict[str, list[tuple[str, str, Callable[..., str]]]] = {
    "layer": [
        ("chunk", "chunk_size", _count),
        ("variant", "variant", str),
        ("time / plain MLP", "ratio", _two),
        ("extra GiB", "extra_gib", _one),
    ],
    "prefix": [
        ("chunk", "chunk_size", _count),
        ("ranks", "ranks", _count),
        ("kept chunk weights", "kept", _yes),
        ("ms", "ms", _one),
        ("exposed", "exposed_share", _share),
    ],
    "model": [
        ("fast weights", "ttt", str),
        ("seconds per step", "seconds", _one),
        ("tokens per second", "tokens_per_second", _count),
        ("MFU", "mfu", _share),
        ("plan.py estimate, s", "planned_seconds", _one),
        ("peak GiB", "peak_gib", _one),
        ("plan.py estimate, GiB", "planned_gib", _one),
        ("part", "part", str),  # of --profile
        ("ms", "ms", _one),
        ("share", "share", _share),
        ("least, ms", "floor_ms", _maybe),
    ],
    "attention": [
        ("documents", "documents", _count),
        ("implementation", "implementation", str),
        ("GPUs", "ranks", _count),
        ("ms", "ms", _one),
        ("TFLOP/s per GPU", "tflops", _count),
        ("difference from torch's", "error", _three),
    ],
    "decode": [
        ("texts", "texts", str),
        ("fast weights, cache", "variant", str),
        ("ms per step, median", "ms_per_step", _two),
        ("mean", "mean_ms", _two),
        ("median / best without", "ratio", _two),
        ("mean / best without", "mean_ratio", _two),
        ("peak GiB", "peak_gib", _one),
    ],
    "prefill": [
        ("prompt", "tokens", _count),
        ("fast weights", "variant", str),
        ("seconds", "seconds", _three),
        ("time / without", "ratio", _three),
        ("peak GiB", "peak_gib", _one),
    ],
    "generate": [
        ("texts", "texts", str),
        ("fast weights", "variant", str),
        ("prompts", "prompt", str),
        ("seconds", "seconds", _one),
        ("peak GiB", "peak_gib", _one),
    ],
    "book": [
        ("file", "file", str),
        ("MiB", "mib", _count),
        ("loading, ms", "load_ms", _one),
        ("first token, ms", "first_token_ms", _one),
        ("without a book, ms", "without_book_ms", _one),
    ],
    "serve": [
        ("requests x prompt", "case", str),
        ("engine, fast weights", "variant", str),
        ("", "value", _count),
        ("unit", "unit", str),
        ("/ vLLM without", "ratio", _two),
    ],
    "ruler": [
        ("samples", "samples", _count),
        ("length", "length", _count),
        ("total seconds", "seconds", _count),
        ("prompts, tokens per second", "read", _count),
        ("forward only", "own", _count),
        ("answers, tokens per second", "written", _count),
    ],
    "position": [
        ("GPUs", "gpus", _count),
        ("length", "length", _count),
        ("tokens per second", "tokens_per_second", _count),
        ("speed / forward only", "ratio", _three),
    ],
}


@cache
def figures() -> dict[str, dict]:
    """Return all results by name (``command``, ``machine``, ``date``, ``records``), and ``rates`` for estimate.py."""
    return json.loads(FILE.read_text())


def find(name: str, field: str, **wanted) -> float | list[float]:
    """Return a field of the one record of a result whose other fields equal ``wanted``."""
    (record,) = (one for one in figures()[name]["records"] if all(one[key] == value for key, value in wanted.items()))
    return record[field]


def keep(name: str, result: dict) -> None:
    """Store the JSON result of a benchmark under a name, replacing an earlier one."""
    found = dict(figures())
    kept = {key: result[key] for key in ("command", "machine", "date")}
    found[name] = kept | dict(
        records=[{key: _rounded(value) for key, value in one.items()} for one in result["records"]]
    )
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    figures.cache_clear()


def _rounded(value):
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def table(name: str) -> str:
    """Return a result as a Markdown table with its command, machine and date."""
    result = figures()[name]
    kind = result["command"].partition("launch/")[2].split()[1]
    columns = [column for column in COLUMNS[kind] if any(column[1] in record for record in result["records"])]
    lines = [[title for title, _, _ in columns], ["---"] * len(columns)]
    for record in result["records"]:
        lines.append([show(record[field]) if field in record else "" for _, field, show in columns])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n`{result['command']}`: {result['machine']}; {result['date']}."


def renewed(text: str) -> str:
    """Return the text of a document with all its tables updated."""
    block = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}\n{table(match[2])}\n\n{match[3]}", text)


def main(words: list[str]) -> None:
    """Store the results that ``words`` name (NAME=FILE, JSON of a benchmark), then update the tables in the documents.

    Must run in the repository's root folder: the paths of the documents are relative to it.
    """
    for word in words:
        name, _, path = word.partition("=")
        keep(name, json.loads(Path(path).read_text()))
    for path in map(Path, DOCUMENTS):
        text = path.read_text(encoding="utf-8")
        if renewed(text) != text:
            path.write_text(renewed(text), encoding="utf-8")
            print(f"updated: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
