"""Read and write small structured files: safely for untrusted content, and atomically.

A file may be untrusted or damaged by a full disk. Any error in it is a UserError that names the file.
"""

import json
import os
import re
from pathlib import Path

import yaml

from inplace_ttt.config.errors import UserError, first_line

YAML_LIMIT = 256 * 1024  # maximal bytes, which PyYAML reads in half a second
JSON_LIMIT = 64 * 1024 * 1024  # maximal bytes


class _PlainLoader(yaml.SafeLoader):
    """Load YAML without aliases, with which a few lines can expand to any size, and without duplicate keys."""

    def compose_mapping_node(self, anchor):
        """Return the node of a mapping. Raises ComposerError if two of its keys have the same text."""
        node, names = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.composer.ComposerError(None, None, f"it has the key '{key.value}' twice", key.start_mark)
            names.add(key.value)
        return node

    def compose_node(self, parent, index):
        """Return the next node. Raises ComposerError if it is an alias."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "it uses an alias", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path, remedy: str = "restore it") -> dict:
    """Return the keys and values of a YAML file.

    Raises UserError, with ``remedy`` at the end, if it cannot be read, is too large, or is not a mapping.
    """
    try:
        values = yaml.load(_text(path, YAML_LIMIT), _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({_why(error)}): {remedy}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is damaged (it holds no keys): {remedy}")
    return values


def read_json(path: Path, remedy: str = "restore it") -> dict:
    """Return the keys and values of a JSON file. Raises UserError like ``read_yaml``."""
    try:
        values = json.loads(_text(path, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({_why(error)}): {remedy}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is damaged (it holds no keys): {remedy}")
    return values


def read_json_lines(path: Path) -> tuple[list[dict], int]:
    """Return the objects of a JSON lines file and the number of invalid lines.

    A full disk or a crash can leave an incomplete line. A missing file counts as empty.
    """
    records, bad = [], 0
    if path.is_file():
        with path.open("rb") as lines:
            for line in lines:
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    records.append(record)
                else:
                    bad += 1
    return records, bad


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict, indent: int | None = 1) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_yaml(path: Path, content: dict) -> None:
    """Write a YAML file atomically."""
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def own_umask(path: Path) -> None:
    """Set the mode of a folder or file to the one of the user's umask. ``tempfile`` and safetensors create them with
    access for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def user_path(text: str | Path) -> Path:
    """Return a path with ``~`` and ``~user`` expanded. Raises UserError if the user does not exist."""
    path = os.path.expanduser(text)
    if (path.startswith("~") and os.sep in path) or re.fullmatch(r"~[a-z_][a-z0-9_-]*", path):
        name = path.split(os.sep, 1)[0]
        raise UserError(f"'{text}': '{name}' is not a home folder here; for a folder of that name use ./{name}")
    return Path(path)


def _text(path: Path, limit: int) -> str:
    if not path.is_file():
        raise UserError(f"'{path}' does not exist")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror})") from error
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return content.decode("utf-8")


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{getattr(error, 'problem', None) or first_line(error)}, line {mark.line + 1}"
    return first_line(error)[:200]
