"""Sources of text: local files in several formats, Hugging Face datasets, installed Python packages.

Text is as its makers left it: cut off, of another encoding, without the field that others have. What is no document is
left out and counted, with its place; in a strict reading the first one is an error.
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

# Whole files that are one document each
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".tex", ".html")
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
}
COMPRESSIONS = (".zst", ".gz")
ANSWERS = "answers"  # PREFIX.answers.bin and .idx of an output say which tokens count in the loss
ENDINGS = ("bin", "idx", "json", f"{ANSWERS}.bin", f"{ANSWERS}.idx")  # of its files
WRITTEN = (*ENDINGS, "tokenizer", "parts", "checked")
NAMED = 10  # places of what was left out that are named
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError)


class Field(Protocol):
    """Take a document out of a row of JSON or Parquet."""

    def columns(self, names: list[str]) -> list[str] | None:
        """Return the columns of a table that it reads; None where there are none."""

    def take(self, row, place: str, report: "SkipReport") -> str | None:
        """Return the document of a row; None where it has none that can be used, which the report counts."""


@dataclass
class SkipReport:
    """Count what a reading left out or changed."""

    strict: bool = False
    bad: int = 0  # documents, or files where no more is known
    empty: int = 0  # documents without text
    mended: int = 0  # documents with halves of characters, which were replaced by U+FFFD
    skipped_files: int = 0  # in folders: hidden, or of an ending that is not known
    places: list[str] = field(default_factory=list)  # of the first bad ones, and why

    def leave_out(self, place: str, why: str) -> None:
        """Count a document that cannot be used. Raises UserError in a strict reading."""
        if self.strict:
            raise UserError(f"{place} {why}")
        self.bad += 1
        if len(self.places) < NAMED:
            self.places.append(f"{place} {why}")

    def checked(self, text: str, place: str) -> str | None:
        """Return text as Unicode has it, or None where there is none."""
        if not text:
            self.empty += 1
            return None
        if _SURROGATE.search(text):
            if self.strict:
                raise UserError(f"{place} holds half a character (a lone surrogate)")
            self.mended += 1
            return _SURROGATE.sub("\ufffd", text)
        return text

    def lines(self) -> list[str]:
        """Return what a user should hear."""
        said = []
        if self.skipped_files:
            said.append(f"{self.skipped_files:,} files of the folders left out: hidden, or of an ending not known")
        if self.empty:
            said.append(f"{self.empty:,} documents without text left out")
        if self.mended:
            said.append(f"{self.mended:,} documents had halves of characters, replaced by U+FFFD")
        if self.bad:
            said.append(f"{self.bad:,} documents left out that cannot be used, the first of them:")
            said += [f"  {place}" for place in self.places]
        return said


def find_files(inputs: list[str], report: SkipReport | None = None, output: Path | None = None) -> list[Path]:
    """Return the files that inputs name, folders searched for known endings; sorted within each folder.

    Hidden files of a folder, and what belongs to ``output``, are left out. Raises UserError for an input that is not
    there or that ``output`` would replace, and for a file of an ending that is not known.
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
                    f"folder '{name}' holds no file of a known kind ({' '.join(FORMATS)}, "
                    f"also with {' or '.join(COMPRESSIONS)})"
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
    """Return the format that a file's ending stands for: text, jsonl, json, parquet. Raises UserError for others."""
    kind = _kind(path)
    if kind not in FORMATS:
        raise UserError(
            f"'{path}' has an ending that is not known ({kind or 'none'}): use one of {' '.join(FORMATS)}, or say what "
            f"the files are with --format text, jsonl, json or parquet"
        )
    return FORMATS[kind]


def read_documents(
    files: list[Path], field: str | Field, report: SkipReport | None = None, file_format: str | None = None
) -> Iterator[str]:
    """Yield the documents of all files in order: one a line of .jsonl, one a row of .parquet, else one a file.

    ``field``: of rows, by its name if it is text. ``report`` counts what is left out. ``file_format``: of files whose
    endings do not say it.
    """
    report, field = report or SkipReport(strict=True), _as_field(field)
    readers = dict(parquet=_read_parquet, jsonl=_read_json_lines, json=_read_json, text=_read_text)
    for path in files:
        read = readers[file_format or format_of(path)]
        try:
            yield from read(path, field, report)
        except _UNREADABLE as error:
            report.leave_out(f"file '{path}'", f"cannot be read ({one_line(error)}): mend or remove it")


def read_hub_dataset(
    name: str, config: str | None, split: str, field: str | Field, report: SkipReport | None = None
) -> Iterator[str]:
    """Yield the documents of a dataset that the ``datasets`` library knows by name or folder, streamed; also of a
    folder that its ``save_to_disk`` wrote."""
    import datasets

    from inplace_ttt.hub import hub_is_reached

    report, field = report or SkipReport(strict=True), _as_field(field)
    folder = user_path(name)
    if not folder.exists() and not hub_is_reached():
        raise UserError(f"dataset '{name}' is no folder, and the hub is out of reach: give files, or mend the network")
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
    """Yield Python sources of the installed packages, one document a package folder, up to ``max_bytes`` in all.

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


def _belongs_to(path: Path, output: Path | None) -> bool:
    """Tell whether a file is one that prepare_data writes for this output, or lies in a folder of it."""
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
        report.leave_out(f"file '{path}'", "is text, where there should be rows: use .jsonl, .json or .parquet")
        return
    with _open(path) as stream:
        content = _decoded(stream.read())
    text = report.checked(content, f"file '{path}'")
    if text is not None:
        yield text


def _decoded(content: bytes) -> str:
    """Decode UTF-8; drop a byte-order mark and make every line end \\n."""
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
                report.leave_out(place, f"is not JSON ({_json_fault(error)}); one object a line is needed")
                continue
            text = field.take(row, place, report)
            if text is not None:
                yield text


def _read_json(path: Path, field: Field, report: SkipReport) -> Iterator[str]:
    """Yield one object or a list of them; a file with an object a line is read as such."""
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
        return "it is nested too deep"
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
        hint = "--text-key takes one of" if isinstance(field, TextField) else "there is"
        report.leave_out(f"'{path}'", f"has no column {field}; {hint} {schema.names}")
        return
    doubled = next((name for name in columns if schema.names.count(name) > 1), None)
    if doubled is not None:
        report.leave_out(f"'{path}'", f"has {schema.names.count(doubled)} columns '{doubled}': give them other names")
        return
    kind = schema.field(columns[0]).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if isinstance(field, TextField) and not is_text:
        report.leave_out(f"'{path}'", f"has {kind} in its column {field}, where there should be strings")
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
        return b""  # no string: it is left out


@dataclass(frozen=True)
class TextField:
    """A field or column that holds the text of a document."""

    key: str

    def columns(self, names: list[str]) -> list[str] | None:
        """Return the column in a list, if it is there."""
        return [self.key] if self.key in names else None

    def take(self, row, place: str, report: SkipReport) -> str | None:
        """Return the text of a row; None where it has none that can be used, which the report counts."""
        if not isinstance(row, dict) or self.key not in row:
            keys = ", ".join(map(str, list(row)[:20])) if isinstance(row, dict) else type(row).__name__
            report.leave_out(place, f"has no text under {self}; --text-key names the field (there is: {keys})")
            return None
        value = row[self.key]
        if value is None:
            report.empty += 1
            return None
        if not isinstance(value, str):
            report.leave_out(place, f"has {type(value).__name__} under {self}, where there should be text")
            return None
        return report.checked(value, place)

    def __str__(self) -> str:
        return f"'{self.key}'"


def _as_field(field: str | Field) -> Field:
    return TextField(field) if isinstance(field, str) else field
