"""Where text comes from: local files in several formats, Hugging Face datasets, installed Python packages."""

import gzip
import hashlib
import io
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import zstandard

from inplace_ttt.config import UserError, one_line

# Whole files that are one document each; other endings are named by the user one by one
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".tex", ".html")
TABLE_SUFFIXES = (".jsonl", ".json", ".parquet")
COMPRESSIONS = (".zst", ".gz")


def find_files(inputs: list[str]) -> list[Path]:
    """The files that inputs name, folders searched for known endings; sorted within each folder."""
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in (*TEXT_SUFFIXES, *TABLE_SUFFIXES))
            if not found:
                raise UserError(
                    f"folder '{name}' holds no file of a known kind ({' '.join(TABLE_SUFFIXES + TEXT_SUFFIXES)}, "
                    f"also with {' or '.join(COMPRESSIONS)})"
                )
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"input '{name}' does not exist: give files or folders")
    return files


def read_documents(files: list[Path], text_key: str) -> Iterator[str]:
    """The documents of all files in order: one a line of .jsonl, one a row of .parquet, else one a file."""
    for path in files:
        kind = _kind(path)
        try:
            if kind == ".parquet":
                yield from _read_parquet(path, text_key)
            elif kind == ".jsonl":
                yield from _read_json_lines(path, text_key)
            elif kind == ".json":
                yield from _read_json(path, text_key)
            else:
                with _open(path) as stream:
                    yield stream.read()
        except (OSError, EOFError, UnicodeDecodeError, zstandard.ZstdError) as error:
            raise UserError(f"file '{path}' cannot be read ({error}); remove or replace it") from error


def read_hub_dataset(name: str, config: str | None, split: str, text_key: str) -> Iterator[str]:
    """The documents of a dataset that the ``datasets`` library knows by name or folder, streamed; also of a folder
    that its ``save_to_disk`` wrote."""
    import datasets

    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)[split]
        elif (folder / "state.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for row in rows:
            yield _text(row, text_key, f"dataset '{name}'")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"dataset '{name}' (config {config}, split '{split}') cannot be read: {one_line(error)}"
        ) from error


def python_packages(max_bytes: int) -> Iterator[str]:
    """Python sources of the installed packages, one document a package folder, up to ``max_bytes`` in all.

    Real, long and there without a download. Folders come in an order that only their names decide, mixed so that
    a part of them is like the whole.
    """
    root = Path(sysconfig.get_paths()["purelib"])
    folders = {path.parent for path in root.rglob("*.py")}
    names = sorted(str(folder.relative_to(root)) for folder in folders if folder != root)
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    total = 0
    for name in names:
        parts = []
        for path in sorted((root / name).glob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a file of another encoding: there are plenty
            if text.strip():
                parts.append(f"# {name}/{path.name}\n{text}")
        document = "\n".join(parts)
        if not document:
            continue
        total += len(document.encode())
        if total > max_bytes:
            return
        yield document


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> io.TextIOBase:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.TextIOWrapper(stream, encoding="utf-8")
    if suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _read_json_lines(path: Path, text_key: str) -> Iterator[str]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text(_parse(line, f"{path}:{number}"), text_key, f"{path}:{number}")


def _read_json(path: Path, text_key: str) -> Iterator[str]:
    """One object or a list of them; a file with an object a line is taken for what it is."""
    with _open(path) as stream:
        content = stream.read()
    try:
        rows = json.loads(content)
    except json.JSONDecodeError:
        yield from _read_json_lines(path, text_key)
        return
    for row in rows if isinstance(rows, list) else [rows]:
        yield _text(row, text_key, str(path))


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except Exception as error:
        raise UserError(f"file '{path}' is not a readable Parquet file ({error}); remove or replace it") from error
    if text_key not in table.schema_arrow.names:
        raise UserError(f"'{path}' has no column '{text_key}'; --text-key takes one of {table.schema_arrow.names}")
    for batch in table.iter_batches(batch_size=256, columns=[text_key]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _parse(line: str, place: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place} is not JSON ({error.msg} at column {error.colno}); one object a line is needed"
        ) from error


def _text(row, text_key: str, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{place} has no text under '{text_key}'; --text-key names the field (there is: {keys})")
    return row[text_key]
