"""Small structured files: read so that nothing in them runs or grows, written whole or not at all.

A file may come from a stranger's run or from a full disk. Whatever is wrong with one is a UserError that names it.
"""

import json
import os
import re
from pathlib import Path

import yaml

from inplace_ttt.config.errors import UserError, first_line

YAML_LIMIT = 256 * 1024  # bytes; PyYAML reads as much in half a second
JSON_LIMIT = 64 * 1024 * 1024


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a file of some lines can name a structure of any size by them."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "it uses an alias", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path, remedy: str = "restore it") -> dict:
    """Return the keys and values of a YAML file.

    Raises UserError, ending in ``remedy``, where it cannot be read, is too large, or holds anything else.
    """
    try:
        values = yaml.load(_text(path, YAML_LIMIT), _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({_why(error)}): {remedy}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is damaged (it holds no keys): {remedy}")
    return values


def read_json(path: Path, remedy: str = "restore it") -> dict:
    """Return the keys and values of a JSON file; raises UserError as ``read_yaml``."""
    try:
        values = json.loads(_text(path, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({_why(error)}): {remedy}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is damaged (it holds no keys): {remedy}")
    return values


def read_json_lines(path: Path) -> tuple[list[dict], int]:
    """Return the objects of a file that has one a line, and the number of lines that are none.

    A line may have been cut off by a full disk or a lost machine; an absent file has no lines.
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
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict, indent: int | None = 1) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_yaml(path: Path, content: dict) -> None:
    """Write a YAML file whole or not at all."""
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def own_umask(path: Path) -> None:
    """Give a folder or file the mode that the user's umask asks for: ``tempfile`` and safetensors make them for one
    user alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def user_path(text: str | Path) -> Path:
    """Return the path that a user means: ``~`` is the home folder. Raises UserError for the home of nobody."""
    path = os.path.expanduser(text)
    if (path.startswith("~") and os.sep in path) or re.fullmatch(r"~[a-z_][a-z0-9_-]*", path):
        name = path.split(os.sep, 1)[0]
        raise UserError(f"'{text}': {name} is nobody's home folder here; a folder of that name is written ./{name}")
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
        raise ValueError(f"it has more than {limit:,} bytes")
    return content.decode("utf-8")


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{getattr(error, 'problem', None) or first_line(error)}, line {mark.line + 1}"
    return first_line(error)[:200]
