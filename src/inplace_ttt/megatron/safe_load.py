"""Read sharded checkpoints as data: nothing in them runs, whoever wrote them.

A ``torch_dist`` checkpoint holds pickles in three places: ``.metadata``, objects that are no tensors (Megatron's common
state among them), and the tensors' own records. torch reads the first two with an unpickler that runs what they say.
Here ``.metadata`` may name the classes that describe tensors and nothing else, objects may name no class at all, and
tensors go through torch's weights-only reader without the classes that libraries have added to it. Importing this
module puts its reader and its planner into Megatron's loading functions.
"""

import contextlib
import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as strategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as descriptions
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from inplace_ttt.config import UserError, one_line
from inplace_ttt.files import read_json
from inplace_ttt.megatron.runtime import raise_on_all_ranks

COMMON_STATE = "common_state/shard_0_1"  # where Megatron keeps what is no tensor
OPTIMIZER = "optimizer."  # how the names of its states begin
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LIMIT = 256 * 2**20  # bytes of metadata, or of an object
_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
_DESCRIBING = {  # the classes whose objects have attributes
    _StorageInfo,
    *(
        getattr(descriptions, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
}
_DESCRIPTIONS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),  # where the checkpoint was written
    ("pathlib._local", "PosixPath"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    *((one.__module__, one.__qualname__) for one in _DESCRIBING),
    *(("torch", name) for name in _DTYPES),
}


class _Unpickler(pickle._Unpickler):  # the one in Python, whose steps can be checked
    """Resolve the names of an allow-list alone, and give attributes to descriptions alone.

    A pickle may also set attributes of any object that it has, such as the methods of an allowed class.
    """

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, place: str, allowed: set[tuple[str, str]]):
        super().__init__(file)
        self.place, self.allowed = place, allowed

    def load_build(self):
        described = type(self.stack[-2])
        if described not in _DESCRIBING:
            raise UserError(
                f"{self.place} gives attributes to a '{described.__name__}', which no checkpoint needs and which could "
                f"change this program: it is not read; use a checkpoint from a source that you trust"
            )
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise UserError(
                f"{self.place} names '{module}.{name}', which no checkpoint needs and which could run code: it is not "
                f"read; use a checkpoint from a source that you trust"
            )
        return super().find_class(module, name)

    def persistent_load(self, pid):
        raise UserError(f"{self.place} refers to another object: it is not read")


def read_metadata(folder: Path) -> Metadata:
    """Return what ``.metadata`` says of the tensors of a checkpoint and where they lie.

    Raises UserError where it cannot be read, names a class that it does not need, or a file outside the folder.
    """
    path = folder / ".metadata"
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"more than {LIMIT:,} bytes")
        with path.open("rb") as file:
            metadata = _Unpickler(file, f"'{path}'", _DESCRIPTIONS).load()
        _check(metadata)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): use another checkpoint") from error
    except Exception as error:  # an unpickler raises anything at damaged bytes
        raise UserError(f"'{folder}' cannot be read: its .metadata is damaged ({one_line(error)})") from error
    return metadata


def read_object(file, place: str) -> Any:
    """Return an object of numbers, strings and containers out of what ``torch.save`` wrote. Raises UserError."""
    try:
        with zipfile.ZipFile(file) as archive:
            (entry,) = (one for one in archive.infolist() if one.filename.rpartition("/")[2] == "data.pkl")
            if entry.file_size > LIMIT:
                raise ValueError(f"more than {LIMIT:,} bytes")
            return _Unpickler(io.BytesIO(archive.read(entry)), place, set()).load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place} is damaged ({one_line(error)}): use another checkpoint") from error


def read_common_state(folder: str | Path) -> dict:
    """Return what a checkpoint holds besides tensors. Raises UserError where it cannot be read as data."""
    folder = Path(folder)
    for index, info in read_metadata(folder).storage_data.items():
        if index.fqn == COMMON_STATE:
            with readable(folder), (folder / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                content = file.read(min(info.length, LIMIT))
            state = read_object(io.BytesIO(content), f"'{folder}': {COMMON_STATE}")
            if isinstance(state, list) and len(state) == 1 and isinstance(state[0], dict):
                return state[0]
            raise UserError(f"'{folder}': {COMMON_STATE} is not what Megatron writes: use another checkpoint")
    raise UserError(f"'{folder}' has no {COMMON_STATE}: it is not a checkpoint of Megatron's torch_dist format")


def load(state: dict, folder: Path) -> dict:
    """Load a Megatron state dict from a checkpoint. Every rank calls it; raises UserError for what cannot be read."""
    error = None
    try:
        described = read_json(folder / "metadata.json", "use another checkpoint")
        if described.get("sharded_backend") != "torch_dist":
            raise UserError(
                f"'{folder / 'metadata.json'}' is not of Megatron's torch_dist format: use another checkpoint"
            )
        read_common_state(folder)
    except UserError as caught:
        error = caught
    raise_on_all_ranks(error)  # what follows is collective
    with readable(folder):
        return serialization.load(state, str(folder))


class Reader(FileSystemReader):
    """Reads the files of a checkpoint folder as data."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = None  # of the process that wrote it
        return metadata

    def read_data(self, plan, planner):
        files = {self.storage_data[item.storage_index].relative_path for item in plan.items}
        try:
            with _tensors_alone():
                return super().read_data(plan, planner)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            # torch's own words propose to read without its protection
            raise UserError(
                f"'{Path(self.path) / min(files)}'{' (or another file beside it)' if len(files) > 1 else ''} holds "
                f"something that is no tensor, or is damaged: restore it, or use another checkpoint"
            ) from error


class Planner(strategy.MCoreLoadPlanner):
    """Megatron's planner, reading objects as data."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.state_dict[name] = read_object(value, f"object '{name}' of the checkpoint")


strategy.FileSystemReader = Reader
strategy.MCoreLoadPlanner = Planner
serialization.load_common_state_dict = read_common_state


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """Take back the classes that libraries have allowed in torch's weights-only reader."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn what readers raise at damaged files, which is of any kind, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except CheckpointException as error:  # not an Exception
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"checkpoint '{folder}' cannot be read: {one_line(cause)}") from error
    except Exception as error:
        raise UserError(f"checkpoint '{folder}' cannot be read: {one_line(error)}") from error


def _check(metadata: Metadata) -> None:
    """Raise ValueError where the classes are right and what they hold is not."""
    if not isinstance(metadata, Metadata):
        raise ValueError("it is no description of tensors")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError("it describes something that is no tensor")
        if isinstance(entry, TensorStorageMetadata):
            dtype = entry.properties.dtype
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"'{name}' has no dtype")
            if not name.startswith(OPTIMIZER) and dtype not in WEIGHT_DTYPES:
                raise ValueError(f"weight '{name}' is {dtype}, which no model of ours has")
            held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if any(size < 0 for size in entry.size) or held != math.prod(entry.size):
                raise ValueError(f"the parts of '{name}' do not make it up")
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or "/" in name or "\0" in name or name in ("", ".", ".."):
            raise ValueError(f"it places a tensor in '{name}', which is no file of the checkpoint")
        if not (type(info.offset) is int and type(info.length) is int and info.offset >= 0 and info.length >= 0):
            raise ValueError("it places a tensor at no place of a file")
        if info.transform_descriptors:
            raise ValueError("it asks for a transformation of files")
