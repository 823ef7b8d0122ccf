"""Write and check a checkpoint's manifest (``manifest.json``): size and checksum of every file.

Every rank computes the checksums of its files in the process that writes them. Before a checkpoint is used, all ranks
verify it together; each reads a share of the files.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import xxhash

NAME = "manifest.json"
NEEDED = (".metadata", "metadata.json", "run.json")  # files of every checkpoint
PARTIAL_MARK = ".inplace_ttt_partial"  # marks a folder that is being written and may be deleted
READERS = 4  # threads, one file each


def checksum(path: Path) -> str:
    """Return the XXH3-128 hash of a file. It detects damage at memory bandwidth, but not forgery."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def write_sums(folder: Path, rank: int, names: Iterable[str]) -> None:
    """Write the checksums of the files of a rank to a temporary file for ``write_manifest``."""
    sums = {name: checksum(folder / name) for name in names}
    _sums_of(folder, rank).write_text(json.dumps(sums))


def write_manifest(folder: Path) -> None:
    """Write the manifest and flush all files to disk; compute only checksums that no rank has written."""
    sums = {}
    for path in folder.glob(".sums_*.json"):
        sums |= json.loads(path.read_text())
        path.unlink()
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != PARTIAL_MARK]
    entries = {path.name: [path.stat().st_size, sums.get(path.name) or checksum(path)] for path in paths}
    (folder / NAME).write_text(json.dumps(entries, indent=1))
    for path in folder.iterdir():
        flush(path)


def damage(folder: Path) -> str | None:
    """Check the file sizes of a checkpoint folder. Return what is wrong, or None."""
    manifest = folder / NAME
    if not manifest.is_file():
        return f"'{folder}' has no {NAME}: it is not a complete checkpoint"
    try:
        sizes = {name: size for name, (size, _) in _entries(folder).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return f"'{manifest}' is damaged"
    lacking = [name for name in NEEDED if name not in sizes]
    if lacking:
        return f"'{manifest}' is damaged: it does not list {lacking[0]}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"'{path}' is missing"
        if path.stat().st_size != size:
            return f"'{path}' has {path.stat().st_size} bytes instead of {size}"
    return None


def corruption(folder: Path, alone: bool = False) -> str | None:
    """Check the checksums of a checkpoint folder. Return what is wrong, or None.

    If a process group exists, this is a collective: each rank reads a share of the files and all return the same
    result. With ``alone`` this rank reads all files and communicates with no other rank.

    Raises OSError if an existing file cannot be read.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not alone else (0, 1)
    fault = error = None
    try:
        fault = damage(folder) or _compare(folder, rank, size)
    except OSError as caught:  # not proof of damage: a retry may succeed
        error = caught
    found = [(fault, error)]
    if size > 1:
        found = [None] * size
        dist.all_gather_object(found, (fault, error))
    for _, error in found:
        if error is not None:
            raise error
    return next((fault for fault, _ in found if fault), None)


def flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _compare(folder: Path, rank: int, size: int) -> str | None:
    mine = list(_entries(folder).items())[rank::size]
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda entry: checksum(folder / entry[0]), mine)
        for (name, (_, expected)), read in zip(mine, found, strict=True):
            if expected is not None and read != expected:
                return f"'{folder / name}' is corrupt: its checksum is {read} instead of {expected}"
    return None


def _entries(folder: Path) -> dict[str, tuple[int, str | None]]:
    """Return size and checksum of each file; the checksum is None in manifests of earlier versions."""
    entries = json.loads((folder / NAME).read_text())
    found = {name: (entry, None) if isinstance(entry, int) else tuple(entry) for name, entry in entries.items()}
    for name, (size, known) in found.items():
        if "/" in name or "\0" in name or name in ("", ".", "..") or type(size) is not int:
            raise ValueError(f"{name} is not a file name")
        if not isinstance(known, str | None):
            raise TypeError(f"{name} has no checksum")
    return found


def _sums_of(folder: Path, rank: int) -> Path:
    return folder / f".sums_{rank}.json"
