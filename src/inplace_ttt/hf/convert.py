"""Convert checkpoints between Hugging Face format and Megatron's distributed format, tensor by tensor."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inplace_ttt.config import Config, Model, UserError, config_from_values, ttt_layers
from inplace_ttt.files import own_umask, read_json, write_json
from inplace_ttt.hf.auxiliary_files import (
    CONFIG,
    FOLDER,
    GENERATION,
    TOKENIZER,
    copy_auxiliary_files,
    find_base_folder,
    find_tokenizer_folder,
    name_tokenizer_class,
    read_base,
    read_run_config,
    token_ids,
)
from inplace_ttt.hf.calibration import READING_BOUND, READING_CLIP, choose_bound, choose_clip, update_norms
from inplace_ttt.hf.config import CODE, check_exportable, read_model, read_ttt, write_config
from inplace_ttt.hf.weights import ResolvedParam, check_names, weight_map
from inplace_ttt.megatron.checkpoint import Progress, checkpoint_in
from inplace_ttt.megatron.tensors import PlannedTensor, TensorReader, write_tensors
from inplace_ttt.resilience.checksums import PARTIAL_MARK, corruption, write_manifest
from inplace_ttt.resilience.lock import lock_beside

SHARD_BYTES = 10**9
REPLACE = "download it again"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Advance = Callable[[int, int], None]  # called with (bytes of a converted tensor, total bytes)


class SafetensorsFolder:
    """Read the tensors of a Hugging Face checkpoint. Files are memory-mapped only while a tensor is read.

    Raises UserError if a file is missing or damaged, or if a tensor has an unsupported dtype.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metas: dict[str, Tensor] = {}  # shape and dtype by tensor name
        self.files: dict[str, str] = {}  # file by tensor name
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            named = read_json(index, REPLACE).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
                raise UserError(f"'{index}' is damaged (it has no weight_map): download it again")
        elif (folder / "model.safetensors").is_file():
            named = None
        else:
            raise UserError(f"'{folder}' has neither model.safetensors nor model.safetensors.index.json")
        for file in ["model.safetensors"] if named is None else sorted(set(named.values())):
            parts = PurePath(file).parts
            if not parts or PurePath(file).is_absolute() or ".." in parts or "\0" in file:
                raise UserError(f"'{index}' names the file '{file}', which is outside of its folder: download it again")
            self._look_into(file)
        for name, file in (named or {}).items():
            if self.files.get(name) != file:
                raise UserError(f"'{index}' lists tensor '{name}' in '{file}', but that file does not have it")

    def _look_into(self, file: str) -> None:
        with self._open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UserError(
                        f"'{self.folder / file}': tensor '{name}' has dtype {part.get_dtype()}: use {', '.join(DTYPES)}"
                    )
                self.metas[name] = _meta(part.get_shape(), DTYPES[part.get_dtype()])
                self.files[name] = file

    def _open(self, file: str):
        path = self.folder / file
        if not path.is_file():
            raise UserError(f"'{path}' is missing: download it again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{path}' is damaged ({error}): download it again") from error

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name`` on the CPU. Raises UserError if its file is missing or damaged."""
        with self._open(self.files[name]) as tensors:
            return tensors.get_tensor(name)


def import_checkpoint(source: Path, output: Path, advance: Advance = lambda size, total: None) -> Model:
    """Convert a folder in Hugging Face format to a checkpoint for ``checkpoint.load``; return its Model section.

    The checkpoint contains the weights, ``model.yaml`` (the model's keys, for a recipe) and ``hf/`` (config, tokenizer
    and generation config). Raises UserError if the model is not supported or a file is damaged.

    Example::

        >>> import_checkpoint(folder / "theirs", folder / "mine").num_layers
        4
        >>> (folder / "mine/model.yaml").is_file()
        True
    """
    hf_config = read_json(source / CONFIG, REPLACE)
    place = f"'{source}/config.json'"
    model, ttt = read_model(hf_config, place), read_ttt(hf_config, place)
    tensors = SafetensorsFolder(source)
    rows = weight_map(model, ttt)
    names = {name for row in rows for name in row.hf_params}
    there = set(tensors.files)
    if model.tie_word_embeddings and "lm_head.weight" in there:  # some checkpoints store a copy
        if not torch.equal(tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")):
            raise UserError(
                f"'{source}': tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight"
            )
        there.discard("lm_head.weight")
    check_names(there, names, f"'{source}'")

    entries = {row.megatron_param: _entry(row, model, tensors) for row in rows}
    total = sum(entry.nbytes for entry in entries.values())

    with fresh_folder(output) as partial:
        write_tensors(partial, entries, lambda size: advance(size, total))
        (partial / "model.yaml").write_text("# @package model\n" + yaml.safe_dump(asdict(model), sort_keys=False))
        (partial / FOLDER).mkdir()
        copy_auxiliary_files(source, partial / FOLDER, (CONFIG, GENERATION, *TOKENIZER))
        write_json(partial / "run.json", vars(Progress(0, 0)))
        write_manifest(partial)
    return model


def _entry(row: ResolvedParam, model: Model, tensors: SafetensorsFolder) -> PlannedTensor:
    metas = [tensors.metas[name] for name in row.hf_params]
    for meta, (name, shape) in zip(metas, row.hf_params.items(), strict=True):
        if tuple(meta.shape) != shape:
            raise UserError(f"'{tensors.folder}': {name} has shape {tuple(meta.shape)}, but config.json gives {shape}")
        if meta.dtype != metas[0].dtype:
            raise UserError(
                f"'{tensors.folder}': {name} has {meta.dtype} and {next(iter(row.hf_params))} has {metas[0].dtype}, "
                f"but both are merged into one tensor: save them with the same dtype"
            )
    joined = row.transform.join(model, metas)
    return PlannedTensor(
        tuple(joined.shape),
        joined.dtype,
        make=lambda: row.transform.join(model, [tensors.read(name) for name in row.hf_params]),
    )


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    base: Path | None = None,
    advance: Advance = lambda size, total: None,
    tokenizer: bool = True,
    clip: str = READING_CLIP,
    bound: str | None = None,
) -> Config:
    """Export a checkpoint, the last checkpoint of a run folder, or an imported model to Hugging Face format.

    Example::

        >>> config = export_checkpoint(folder / "imported", folder / "exported", clip="0.01")
        >>> sorted(path.name for path in (folder / "exported").glob("*.py"))
        ['modeling_inplace_ttt.py']

    Args:
        checkpoint: folder of a checkpoint, a run or an imported model.
        output: folder to create.
        base: folder with config, tokenizer and generation config to copy; None: those of the run.
        advance: called with (bytes of a converted tensor, total bytes).
        tokenizer: copy a tokenizer.
        clip: ttt_clip of the exported model, see ``choose_clip``.
        bound: ttt_bound of the exported model, see ``choose_bound``; None: the default.

    Returns:
        The configuration of the checkpoint.

    Raises UserError if the checkpoint is damaged, or if Hugging Face format cannot express a setting of the model.
    """
    described = inspect_checkpoint(checkpoint)
    folder, config = described.folder, described.config
    check_exportable(config, f"'{checkpoint}'")
    if base is not None and not base.is_dir():
        raise UserError(f"--base '{base}' is not a folder")
    fault = corruption(folder, alone=True)
    if fault:
        raise UserError(f"checkpoint '{folder}' cannot be exported: {fault}")
    reader, model = TensorReader(folder), config.model
    if model.vocab_size is None:
        raise UserError(
            f"checkpoint '{folder}': model.vocab_size is missing in the config.yaml of its run: set it there"
        )
    rows = weight_map(model, config.ttt)
    check_names(set(reader.shapes), {row.megatron_param for row in rows}, f"checkpoint '{folder}'")
    for row in rows:
        made = row.transform.join(model, [_meta(shape) for shape in row.hf_params.values()])
        there = reader.shapes[row.megatron_param][0]
        if there != tuple(made.shape):
            raise UserError(
                f"checkpoint '{folder}': {row.megatron_param} has shape {there}, but its configuration gives "
                f"{tuple(made.shape)}"
            )
    words = base or described.tokenizer() if tokenizer else None
    came_with = base or described.base()
    base_config, generation = read_base(came_with, CONFIG), read_base(came_with, GENERATION)
    tokens = token_ids(words, base_config, generation, strict=words != came_with)
    reading = reading_keys(described, clip, bound)
    write_config(config, "float32", base_config, tokens, reading)  # raises before anything is written

    with fresh_folder(output) as partial:
        dtype = _write_shards(partial, rows, model, reader, advance)
        hf_config = write_config(config, str(dtype).removeprefix("torch."), base_config, tokens, reading)
        write_json(partial / CONFIG, hf_config, indent=2)
        if generation or tokens:
            write_json(partial / GENERATION, {**(generation or {}), **tokens}, indent=2)
        if config.ttt.enabled:
            shutil.copyfile(Path(__file__).with_name(f"{CODE}.py"), partial / f"{CODE}.py")
        if words is not None:
            copy_auxiliary_files(words, partial, TOKENIZER)
            name_tokenizer_class(partial)
    return config


def reading_keys(described: "CheckpointInfo", clip: str = READING_CLIP, bound: str | None = None) -> dict:
    """Return the config.json keys for clipping at inference: ttt_clip, ttt_update_norms, ttt_bound, ttt_trained_length.

    ``clip``, ``bound``: see ``export_checkpoint``.
    """
    config, place = described.config, f"'{described.folder}'"
    norms = update_norms(described.folder, ttt_layers(config.ttt, config.model.num_layers))
    trained, length, default = config.ttt.clip, config.data.seq_length, READING_BOUND
    if described.run is None:  # imported: use the values of its config.json
        came_with = read_base(described.base(), CONFIG) or {}
        norms = norms or came_with.get("ttt_update_norms")
        trained = came_with.get("ttt_clip") if trained is None else trained
        length, default = came_with.get("ttt_trained_length"), str(came_with.get("ttt_bound") or "none")
    return dict(
        ttt_clip=choose_clip(clip, trained, norms, place),
        ttt_update_norms=norms,
        ttt_bound=choose_bound(default if bound is None else bound, length, place),
        ttt_trained_length=length,
    )


def _write_shards(
    folder: Path, rows: list[ResolvedParam], model: Model, reader: TensorReader, advance: Advance
) -> torch.dtype:
    """Write safetensors files of at most SHARD_BYTES (or one tensor), and an index if there are several.

    Return the dtype of the weights.
    """
    shards, size = [[]], 0
    everything = sum(reader.nbytes(row.megatron_param) for row in rows)
    for row in rows:
        nbytes = reader.nbytes(row.megatron_param)
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += nbytes
    places, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for row in shard:
            whole = reader.read(row.megatron_param)
            for their_name, part in zip(row.hf_params, row.transform.split(model, whole), strict=True):
                tensors[their_name] = part.contiguous()
                places[their_name] = name
                total += part.nbytes
            advance(whole.nbytes, everything)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        own_umask(folder / name)
        dtype = next(iter(tensors.values())).dtype
    if len(shards) > 1:
        index = dict(metadata=dict(total_size=total), weight_map=dict(sorted(places.items())))
        write_json(folder / "model.safetensors.index.json", index, indent=2)
    return dtype


@dataclass(frozen=True)
class CheckpointInfo:
    """Describe a checkpoint; its base and tokenizer folders are searched only when needed."""

    folder: Path  # folder with the weights
    config: Config
    run: Path | None  # run folder; None: imported checkpoint
    base: Callable[[], Path | None]  # returns the folder of the original config.json
    tokenizer: Callable[[], Path | None]  # returns the folder of the tokenizer


def inspect_checkpoint(checkpoint: Path) -> CheckpointInfo:
    """Describe a run folder, a checkpoint or an imported checkpoint. Raises UserError if it is none of them."""
    if not checkpoint.is_dir():
        raise UserError(f"'{checkpoint}' is not a folder: name a run, a checkpoint of a run or an imported checkpoint")
    kept = checkpoint / FOLDER
    if (kept / CONFIG).is_file() and not (checkpoint / "config.yaml").is_file():
        hf_config = read_json(kept / CONFIG)
        place = f"'{kept / CONFIG}'"
        sections = dict(model=asdict(read_model(hf_config, place)), ttt=asdict(read_ttt(hf_config, place)))
        return CheckpointInfo(checkpoint, config_from_values(sections, place), None, lambda: kept, lambda: kept)
    folder = checkpoint_in(checkpoint)
    run = folder.resolve().parent.parent
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"'{checkpoint}' is not a run, a checkpoint of a run or an imported checkpoint: '{run / 'config.yaml'}' "
            f"does not exist"
        )
    config = read_run_config(run)
    return CheckpointInfo(
        folder, config, run, lambda: find_base_folder(config, run), lambda: find_tokenizer_folder(config, run)
    )


def _meta(shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return a meta tensor, which has a shape and a dtype but no data."""
    return torch.empty(shape, dtype=dtype, device="meta")


@contextlib.contextmanager
def fresh_folder(output: Path) -> Iterator[Path]:
    """Yield a new folder ``OUTPUT.partial``; rename it to ``output`` when the context ends without an error.

    Raises UserError if ``output`` exists, if OUTPUT.partial was not made by this program, or if another process writes.
    """
    with lock_beside(output, f"'{output}'"):
        if os.path.lexists(output):
            raise UserError(f"'{output}' already exists: remove it, or name another folder")
        partial = output.with_name(output.name + ".partial")
        if os.path.lexists(partial):
            if partial.is_symlink() or not (partial / PARTIAL_MARK).is_file():
                raise UserError(f"'{partial}' was not made by this program but is needed for writing: move it away")
            shutil.rmtree(partial)
        partial.mkdir()
        (partial / PARTIAL_MARK).touch()
        yield partial
        (partial / PARTIAL_MARK).unlink()
        os.replace(partial, output)
