"""Read sources of text: local files in several formats, Hugging Face datasets, installed Python packages.

Input can be defective: truncated files, other encodings, missing fields. Unusable documents are skipped and counted,
and the first ones are reported with their location. In strict mode the first one is an error.
"""

import codecs
import gzip
import hashlib
import io
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import zstandard

from inplace_ttt.config import UserError, one_line
from inplace_ttt.files import user_path

# files that contain one document each
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".tex", ".html")
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
}
COMPRESSIONS = (".zst", ".gz")
ANSWERS = "answers"  # PREFIX.answers.bin and .idx: 1 for each token that counts in the loss
ENDINGS = ("bin", "idx", "json", f"{ANSWERS}.bin", f"{ANSWERS}.idx")  # files of an output, after PREFIX.
WRITTEN = (*ENDINGS, "tokenizer", "parts", "checked")
NAMED = 10  # skipped documents whose location is reported
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError)


class Field(Protocol):
    """Extract a document from a row of JSON or Parquet."""

    def columns(self, names: list[str]) -> list[str] | None:
        """Return the columns to read from a table; None if they do not exist."""

    def take(self, row, place: str, report: "SkipReport") -> str | None:
        """Return the document of a row; None if it is unusable, which the report counts."""


@dataclass
class SkipReport:
    """Count skipped and changed documents."""

    strict: bool = False
    bad: int = 0  # unusable documents, or files if the number of documents is not known
    empty: int = 0  # documents without text
    mended: int = 0  # documents with lone surrogates, which were replaced by U+FFFD
    skipped_files: int = 0  # files in folders that are hidden or have an unknown extension
    places: list[str] = field(default_factory=list)  # location of the first unusable documents, and the reason

    def leave_out(self, place: str, why: str) -> None:
        """Count an unusable document. Raises UserError in strict mode."""
        if self.strict:
            raise UserError(f"{place} {why}")
        self.bad += 1
        if len(self.places) < NAMED:
            self.places.append(f"{place} {why}")

    def checked(self, text: str, place: str) -> str | None:
        """Return valid Unicode text; None if it is empty. Raises UserError for a lone surrogate in strict mode."""
        if not text:
            self.empty += 1
            return None
        if _SURROGATE.search(text):
            if self.strict:
                raise UserError(f"{place} contains a lone surrogate (half a character)")
            self.mended += 1
            return _SURROGATE.sub("\ufffd", text)
        return text

    def lines(self) -> list[str]:
        """Return the messages for the user."""
        said = []
        if self.skipped_files:
            said.append(f"{self.skipped_files:,} files in folders skipped: hidden, or unknown extension")
        if self.empty:
            said.append(f"{self.empty:,} empty documents skipped")
        if self.mended:
            said.append(f"{self.mended:,} documents with lone surrogates, replaced by U+FFFD")
        if self.bad:
            several = self.bad > 1
            said.append(f"{self.bad:,} unusable document{'s' * several} skipped{'; the first ones' * several}:")
            said += [f"  {place}" for place in self.places]
        return said


def find_files(inputs: list[str], report: SkipReport | None = None, output: Path | None = None) -> list[Path]:
    """Return the input files; folders are searched for files with known extensions, sorted within each folder.

    Hidden files in folders and files of ``output`` are skipped. Raises UserError if an input does not exist, if
    ``output`` would replace an input, or if a folder contains no usable file.
    """
    files, report = [], report or SkipReport()
    for name in inputs:
        path = user_path(name)
        if path.is_dir():
            found = []
            for one in sorted(p for p in path.rglob("*") if p.is_file() and not _belongs_to(p, output)):
                if any(part.startswith(".") for part in one.relative_to(path).parts) or _kind(one) not in FORMATS:
                    report.skipped_files += 1
                else:
                    found.append(one)
            if not found:
                raise UserError(
                    f"folder '{name}' contains no file with a known extension: use {' '.join(FORMATS)}, "
                    f"also with {' or '.join(COMPRESSIONS)}"
                )
            files += found
        elif path.is_file():
            if _belongs_to(path, output):
                raise UserError(f"--output {output} would replace its own input '{path}': name another output")
            files.append(path)
        else:
            what = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise UserError(f"input '{name}' {what}: give files or folders")
    return files


def format_of(path: Path) -> str:
    """Return the format for a file extension: text, jsonl, json or parquet. Raises UserError for others."""
    kind = _kind(path)
    if kind not in FORMATS:
        raise UserError(
            f"'{path}' has an unknown extension ({kind or 'none'}): use one of {' '.join(FORMATS)}, or set --format "
            f"to text, jsonl, json or parquet"
        )
    return FORMATS[kind]


def read_documents(
    files: list[Path], field: str | Field, report: SkipReport | None = None, file_format: str | None = None
) -> Iterator[str]:
    """Yield the documents of all files in order: one per line (.jsonl), element (.json), row (.parquet) or text file.

    Args:
        field: how to extract a document from a row; a string names a text field.
        report: counts skipped documents; None: raise UserError for the first one.
        file_format: format of all files; None: by their extensions.
    """
    report, field = report or SkipReport(strict=True), _as_field(field)
    readers = dict(parquet=_read_parquet, jsonl=_read_json_lines, json=_read_json, text=_read_text)
    for path in files:
        read = readers[file_format or format_of(path)]
        try:
            yield from read(path, field, report)
        except _UNREADABLE as error:
            report.leave_out(f"file '{path}'", f"cannot be read ({one_line(error)}): repair or remove it")


def read_hub_dataset(
    name: str, config: str | None, split: str, field: str | Field, report: SkipReport | None = None
) -> Iterator[str]:
    """Yield the documents of a dataset of the ``datasets`` library, streamed.

    ``name`` is a name on the hub, a folder, or a folder that ``save_to_disk`` wrote. Raises UserError if the dataset
    cannot be read.
    """
    import datasets

    from inplace_ttt.hub import hub_is_reached

    report, field = report or SkipReport(strict=True), _as_field(field)
    folder = user_path(name)
    if not folder.exists() and not hub_is_reached():
        raise UserError(
            f"dataset '{name}' is not a folder, and the hub cannot be reached: use local files, or check the network"
        )
    name = str(folder) if folder.exists() else name
    try:
        if (folder / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)[split]
        elif (folder / "state.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows):
            text = field.take(row, f"dataset '{name}', row {number}", report)
            if text is not None:
                yield text
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"dataset '{name}' (config {config}, split '{split}') cannot be read: {one_line(error)}"
        ) from error


def python_packages(max_bytes: int) -> Iterator[str]:
    """Yield Python sources of the installed packages, one document per package folder, ``max_bytes`` in total.

    These are real, long documents that need no download. The order of folders is a hash of their names, so that any
    part of the corpus resembles the whole.
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
                continue  # another encoding: skip the file
            if text.strip():
                parts.append(f"# {name}/{path.name}\n{text}")
        document = "\n".join(parts)
        if not document:
            continue
        total += len(document.encode())
        if total > max_bytes:
            return
        yield document


def _belongs_to(path: Path, output: Path | None) -> bool:
    """Return True if prepare_data writes this file for ``output``, or if it is in a folder of ``output``."""
    if output is None:
        return False
    written = {Path(f"{output}.{end}").resolve() for end in WRITTEN}
    here = path.resolve()
    return not written.isdisjoint((here, *here.parents))


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(stream)
    return gzip.open(path, "rb") if suffix == ".gz" else path.open("rb")


def _read_text(path: Path, field: Field, report: SkipReport) -> Iterator[str]:
    if not isinstance(field, TextField):
        report.leave_out(f"file '{path}'", "is text, but conversations need rows: use .jsonl, .json or .parquet")
        return
    with _open(path) as stream:
        content = _decoded(stream.read())
    text = report.checked(content, f"file '{path}'")
    if text is not None:
        yield text


def _decoded(content: bytes) -> str:
    """Decode UTF-8, remove a byte-order mark and normalize line ends to LF."""
    text = content.decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_json_lines(path: Path, field: Field, report: SkipReport) -> Iterator[str]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                report.leave_out(place, f"is not JSON ({_json_fault(error)}); each line must be one object")
                continue
            text = field.take(row, place, report)
            if text is not None:
                yield text


def _read_json(path: Path, field: Field, report: SkipReport) -> Iterator[str]:
    """Yield the documents of a JSON object or list; a file with one object per line is read as JSON Lines."""
    with _open(path) as stream:
        content = stream.read()
    try:
        rows = json.loads(content.removeprefix(codecs.BOM_UTF8))
    except RecursionError as error:
        report.leave_out(f"file '{path}'", f"is not JSON ({_json_fault(error)})")
        return
    except ValueError:
        yield from _read_json_lines(path, field, report)
        return
    listed = isinstance(rows, list)
    for number, row in enumerate(rows if listed else [rows], start=1):
        text = field.take(row, f"{path}, element {number}" if listed else str(path), report)
        if text is not None:
            yield text


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    return "a number has too many digits" if "digits" in str(error) else one_line(error)


def _read_parquet(path: Path, field: Field, report: SkipReport) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        schema = table.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        report.leave_out(f"file '{path}'", f"is not a readable Parquet file ({one_line(error)}); remove or replace it")
        return
    columns = field.columns(schema.names)
    if columns is None:
        hint = "set --text-key to one of" if isinstance(field, TextField) else "its columns are"
        report.leave_out(f"'{path}'", f"has no column {field}; {hint} {schema.names}")
        return
    doubled = next((name for name in columns if schema.names.count(name) > 1), None)
    if doubled is not None:
        report.leave_out(f"'{path}'", f"has {schema.names.count(doubled)} columns '{doubled}': rename them")
        return
    kind = schema.field(columns[0]).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if isinstance(field, TextField) and not is_text:
        report.leave_out(f"'{path}'", f"has type {kind} in column {field}: it must be string")
        return
    number = 0
    try:
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for values in zip(*(batch.column(name) for name in columns), strict=True):
                row = dict(zip(columns, map(_value, values), strict=True))
                text = field.take(row, f"{path}, row {number}", report)
                number += 1
                if text is not None:
                    yield text
    except (pa.ArrowException, OSError) as error:
        report.leave_out(f"file '{path}'", f"cannot be read beyond row {number} ({one_line(error)})")


def _value(value):
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""  # not a string, so the row is skipped


@dataclass(frozen=True)
class TextField:
    """Extract the text of a document from one field or column."""

    key: str

    def columns(self, names: list[str]) -> list[str] | None:
        """Return the column in a list; None if it does not exist."""
        return [self.key] if self.key in names else None

    def take(self, row, place: str, report: SkipReport) -> str | None:
        """Return the text of a row; None if it is unusable, which the report counts."""
        if not isinstance(row, dict) or self.key not in row:
            keys = ", ".join(map(str, list(row)[:20])) if isinstance(row, dict) else type(row).__name__
            report.leave_out(place, f"has no field {self}: set --text-key to the field with the text (found: {keys})")
            return None
        value = row[self.key]
        if value is None:
            report.empty += 1
            return None
        if not isinstance(value, str):
            report.leave_out(place, f"has {type(value).__name__} in field {self}: it must be text")
            return None
        return report.checked(value, place)

    def __str__(self) -> str:
        return f"'{self.key}'"


def _as_field(field: str | Field) -> Field:
    return TextField(field) if isinstance(field, str) else field
