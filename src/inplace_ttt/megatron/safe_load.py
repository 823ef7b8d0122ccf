"""Load sharded checkpoints from untrusted sources: no code in them is executed.

A ``torch_dist`` checkpoint holds pickles in three places: ``.metadata``, non-tensor objects (such as Megatron's common
state), and the records of the tensors. torch reads the first two with an unpickler that can execute code. Here
``.metadata`` may name only the classes that describe tensors, objects may name no class, and tensors are read by
torch's weights-only unpickler without the classes that libraries have added to it. Importing this module replaces the
reader and the planner in Megatron's loading functions.
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
from torch.distributed.checkpoint import FileSystemReader, planner
from torch.distributed.checkpoint import metadata as descriptions
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from inplace_ttt.config import UserError, one_line
from inplace_ttt.files import read_json
from inplace_ttt.megatron.runtime import on_all_ranks

COMMON_STATE = "common_state/shard_0_1"  # name of the non-tensor state in Megatron's checkpoints
OPTIMIZER = "optimizer."  # prefix of the names of optimizer states
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LIMIT = 256 * 2**20  # maximal bytes of the metadata, or of an object
_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
_DESCRIBING = {  # classes whose objects may get attributes
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
    # torch 2.14 adds the plans of the ranks that wrote the checkpoint; they are not used
    *(getattr(planner, name) for name in ("SavePlan", "TensorWriteData", "WriteItem")),
}
_DESCRIPTIONS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),  # folder that the checkpoint was written to
    ("pathlib._local", "PosixPath"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    *((one.__module__, one.__qualname__) for one in _DESCRIBING),
    *(("torch", name) for name in _DTYPES),
}


class _Unpickler(pickle._Unpickler):  # pure Python: its opcodes can be overridden
    """Resolve only the names of an allow-list, and set attributes only of objects that describe tensors.

    Both are needed: a pickle can set attributes of any object that it holds, such as the methods of an allowed class.
    """

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, place: str, allowed: set[tuple[str, str]]):
        super().__init__(file)
        self.place, self.allowed = place, allowed

    def load_build(self):
        """Set the attributes of an object (opcode BUILD). Raises UserError if it does not describe tensors."""
        described = type(self.stack[-2])
        if described not in _DESCRIBING:
            raise UserError(
                f"{self.place} sets attributes of a '{described.__name__}', which no checkpoint needs and which could "
                f"modify this program: it was rejected; use a checkpoint from a trusted source"
            )
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str):
        """Return the class or function of a name. Raises UserError if it is not on the allow-list."""
        if (module, name) not in self.allowed:
            raise UserError(
                f"{self.place} names '{module}.{name}', which no checkpoint needs and which could run code: it was "
                f"rejected; use a checkpoint from a trusted source"
            )
        return super().find_class(module, name)

    def persistent_load(self, pid):
        """Raise UserError: a persistent ID refers to data outside the pickle, which no checkpoint needs."""
        raise UserError(
            f"{self.place} has a persistent ID, which no checkpoint needs: it was rejected; use a checkpoint from a "
            f"trusted source"
        )


def read_metadata(folder: Path) -> Metadata:
    """Return a checkpoint's ``.metadata``: the shapes, dtypes and file locations of its tensors.

    Raises UserError if it cannot be read, or names a class that it does not need or a file outside the folder.
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
    except Exception as error:  # an unpickler may raise any exception for damaged bytes
        raise UserError(f"'{folder}' cannot be read: its .metadata is damaged ({one_line(error)})") from error
    return metadata


def read_object(file, place: str) -> Any:
    """Return an object of numbers, strings and containers that ``torch.save`` wrote to ``file``.

    ``place``: name of the object in error messages. Raises UserError if the file is damaged or names a class.
    """
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
    """Return the non-tensor state of a checkpoint. Raises UserError if it is missing, damaged or names a class."""
    folder = Path(folder)
    for index, info in read_metadata(folder).storage_data.items():
        if index.fqn == COMMON_STATE:
            with readable(folder), (folder / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                content = file.read(min(info.length, LIMIT))
            state = read_object(io.BytesIO(content), f"'{folder}': {COMMON_STATE}")
            if isinstance(state, list) and len(state) == 1 and isinstance(state[0], dict):
                return state[0]
            raise UserError(f"'{folder}': {COMMON_STATE} is not in Megatron's format: use another checkpoint")
    raise UserError(f"'{folder}' has no {COMMON_STATE}: use a checkpoint in Megatron's torch_dist format")


def _check_format(folder: Path) -> None:
    described = read_json(folder / "metadata.json", "use another checkpoint")
    if described.get("sharded_backend") != "torch_dist":
        raise UserError(
            f"'{folder / 'metadata.json'}' does not name Megatron's torch_dist format: use another checkpoint"
        )
    read_common_state(folder)


def load(state: dict, folder: Path) -> dict:
    """Load a Megatron state dict from a checkpoint (collective). Raises UserError if it cannot be read."""
    on_all_ranks(lambda: _check_format(folder))  # before the next collective
    with readable(folder):
        return serialization.load(state, str(folder))


class Reader(FileSystemReader):
    """Read the files of a checkpoint folder without executing code in them."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """Return the metadata of the folder, without what describes the processes that wrote it.

        The arguments of torch's reader are ignored. Raises UserError like the function ``read_metadata``.
        """
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = None  # describes the process that wrote the checkpoint
        if hasattr(metadata, "all_local_plans"):
            metadata.all_local_plans = None
        return metadata

    def read_data(self, plan, planner):
        """Read the entries of a plan. Raises UserError if a record is damaged or holds something other than tensors."""
        files = {self.storage_data[item.storage_index].relative_path for item in plan.items}
        try:
            with _tensors_alone():
                return super().read_data(plan, planner)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            # torch's own message suggests to load without weights_only
            raise UserError(
                f"'{Path(self.path) / min(files)}'{' (or another file beside it)' if len(files) > 1 else ''} holds "
                f"something other than tensors, or is damaged: restore it, or use another checkpoint"
            ) from error


class Planner(strategy.MCoreLoadPlanner):
    """Plan like Megatron's planner, but load objects without executing code in them."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        """Put an object into the state dict. Raises UserError if it is damaged or names a class.

        Args:
            read_item: entry of the load plan, which names the object.
            value: bytes that ``torch.save`` wrote.
        """
        name = read_item.dest_index.fqn
        self.state_dict[name] = read_object(value, f"object '{name}' of the checkpoint")


strategy.FileSystemReader = Reader
strategy.MCoreLoadPlanner = Planner
serialization.load_common_state_dict = read_common_state


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """Remove the classes that libraries have allowed in torch's weights-only unpickler, inside the context."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Convert any exception that readers raise for damaged files into a UserError."""
    try:
        yield
    except UserError:
        raise
    except CheckpointException as error:  # not a subclass of Exception
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"checkpoint '{folder}' cannot be read: {one_line(cause)}") from error
    except Exception as error:
        raise UserError(f"checkpoint '{folder}' cannot be read: {one_line(error)}") from error


def _check(metadata: Metadata) -> None:
    """Raise ValueError if values in the metadata are invalid."""
    if not isinstance(metadata, Metadata):
        raise ValueError("it does not describe tensors")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError("it describes something other than a tensor")
        if isinstance(entry, TensorStorageMetadata):
            dtype = entry.properties.dtype
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"'{name}' has no dtype")
            if not name.startswith(OPTIMIZER) and dtype not in WEIGHT_DTYPES:
                raise ValueError(f"weight '{name}' has dtype {dtype}, which no weight has")
            held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if any(size < 0 for size in entry.size) or held != math.prod(entry.size):
                raise ValueError(f"the shards of '{name}' do not add up to its shape")
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or "/" in name or "\0" in name or name in ("", ".", ".."):
            raise ValueError(f"it places a tensor in '{name}', which is not a file of the checkpoint")
        if not (type(info.offset) is int and type(info.length) is int and info.offset >= 0 and info.length >= 0):
            raise ValueError("a tensor has an invalid offset or length")
        if info.transform_descriptors:
            raise ValueError("it requests a transformation of files")
