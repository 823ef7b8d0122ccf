"""Checkpoints from Hugging Face's format to ours and back, tensor by tensor."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inplace_ttt.config import Config, Model, UserError, first_line
from inplace_ttt.files import read_yaml
from inplace_ttt.hf.config import CODE, read_model, read_ttt, write_config
from inplace_ttt.hf.weights import Row, check_names, weight_map
from inplace_ttt.megatron.checkpoint import Progress, checkpoint_in
from inplace_ttt.megatron.manifest import corruption, write_manifest
from inplace_ttt.megatron.tensors import Entry, TensorReader, write_tensors

# What comes along unchanged: the tokenizer and how to generate
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SHARD_BYTES = 10**9
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Advance = Callable[[int, int], None]  # called with the bytes of each tensor that is done, and with those of all


class SafetensorsFolder:
    """The tensors of a Hugging Face checkpoint. Files are mapped into memory only while a tensor is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metas: dict[str, Tensor] = {}  # shape and dtype alone
        self.files: dict[str, str] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            named = _read_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
                raise UserError(f"'{index}' is damaged (it places no tensors in files): download it again")
        elif (folder / "model.safetensors").is_file():
            named = None
        else:
            raise UserError(f"'{folder}' holds neither model.safetensors nor model.safetensors.index.json")
        for file in ["model.safetensors"] if named is None else sorted(set(named.values())):
            self._look_into(file)
        for name, file in (named or {}).items():
            if self.files.get(name) != file:
                raise UserError(f"'{index}' places tensor '{name}' in '{file}', which does not hold it")

    def _look_into(self, file: str) -> None:
        with self._open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no dictionary)
                part = tensors.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UserError(
                        f"'{self.folder / file}': tensor '{name}' is {part.get_dtype()}: use {', '.join(DTYPES)}"
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
        with self._open(self.files[name]) as tensors:
            return tensors.get_tensor(name)


def import_checkpoint(source: Path, output: Path, advance: Advance = lambda size, total: None) -> Model:
    """Make a checkpoint of ours, for ``checkpoint.load``, from a folder in Hugging Face's format.

    Besides the weights it holds ``model.yaml``, the model's keys for a recipe, and ``hf/``, what came along.
    """
    hf_config = _read_json(source / "config.json")
    place = f"'{source}/config.json'"
    model, ttt = read_model(hf_config, place), read_ttt(hf_config, place)
    tensors = SafetensorsFolder(source)
    rows = weight_map(model, ttt)
    names = {name for row in rows for name in row.theirs}
    there = set(tensors.files)
    if model.tie_word_embeddings and "lm_head.weight" in there:  # a copy that some checkpoints carry
        if not torch.equal(tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")):
            raise UserError(
                f"'{source}': tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight"
            )
        there.discard("lm_head.weight")
    check_names(there, names, f"'{source}'")

    entries = {row.ours: _entry(row, model, tensors) for row in rows}
    total = sum(entry.nbytes for entry in entries.values())

    partial = _fresh(output)
    write_tensors(partial, entries, lambda size: advance(size, total))
    (partial / "model.yaml").write_text("# @package model\n" + yaml.safe_dump(asdict(model), sort_keys=False))
    (partial / "hf").mkdir()
    for name in ("config.json", *COMPANIONS):
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / "hf" / name)
    (partial / "run.json").write_text(json.dumps(vars(Progress(0, 0))))
    write_manifest(partial)
    os.replace(partial, output)
    return model


def _entry(row: Row, model: Model, tensors: SafetensorsFolder) -> Entry:
    metas = [tensors.metas[name] for name in row.theirs]
    for meta, (name, shape) in zip(metas, row.theirs.items(), strict=True):
        if tuple(meta.shape) != shape:
            raise UserError(f"'{tensors.folder}': {name} is {tuple(meta.shape)}, but its config.json makes it {shape}")
        if meta.dtype != metas[0].dtype:
            raise UserError(
                f"'{tensors.folder}': {name} is {meta.dtype} and {next(iter(row.theirs))} is {metas[0].dtype}: these "
                f"become one tensor, give them one dtype"
            )
    joined = row.way.join(model, metas)
    return Entry(
        tuple(joined.shape),
        joined.dtype,
        make=lambda: row.way.join(model, [tensors.read(name) for name in row.theirs]),
    )


def export_checkpoint(
    checkpoint: Path, output: Path, base: Path | None = None, advance: Advance = lambda size, total: None
) -> Config:
    """Write a folder that transformers loads from a checkpoint, a run's folder (its last one) or an imported one.

    ``base``: a folder with config, tokenizer and generation config to take along; None: what was imported, if known.
    """
    folder, config, known_base = _describe(checkpoint)
    base = base or known_base
    fault = corruption(folder)
    if fault:
        raise UserError(f"checkpoint '{folder}' cannot be exported: {fault}")
    reader, model = TensorReader(folder), config.model
    if model.vocab_size is None:
        raise UserError(f"checkpoint '{folder}': model.vocab_size is not known; its run's config.yaml lacks it")
    rows = weight_map(model, config.ttt)
    check_names(set(reader.shapes), {row.ours for row in rows}, f"checkpoint '{folder}'")
    for row in rows:
        there, made = reader.shapes[row.ours][0], row.way.join(model, [_meta(shape) for shape in row.theirs.values()])
        if there != tuple(made.shape):
            raise UserError(
                f"checkpoint '{folder}': {row.ours} is {there}, but its configuration makes it {tuple(made.shape)}"
            )

    partial = _fresh(output)
    dtype = _write_shards(partial, rows, model, reader, advance)
    base_config = _read_json(base / "config.json") if base and (base / "config.json").is_file() else None
    hf_config = write_config(config, str(dtype).removeprefix("torch."), base_config)
    (partial / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    if config.ttt.enabled:
        shutil.copyfile(Path(__file__).with_name(f"{CODE}.py"), partial / f"{CODE}.py")
    for name in COMPANIONS:
        if base and (base / name).is_file():
            shutil.copyfile(base / name, partial / name)
    os.replace(partial, output)
    return config


def _write_shards(folder: Path, rows: list[Row], model: Model, reader: TensorReader, advance: Advance) -> torch.dtype:
    """Safetensors files of at most SHARD_BYTES (or one tensor), and their index where there is more than one."""
    shards, size = [[]], 0
    everything = sum(reader.nbytes(row.ours) for row in rows)
    for row in rows:
        nbytes = reader.nbytes(row.ours)
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
            whole = reader.read(row.ours)
            for their_name, part in zip(row.theirs, row.way.split(model, whole), strict=True):
                tensors[their_name] = part.contiguous()
                places[their_name] = name
                total += part.nbytes
            advance(whole.nbytes, everything)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        dtype = next(iter(tensors.values())).dtype
    if len(shards) > 1:
        index = dict(metadata=dict(total_size=total), weight_map=dict(sorted(places.items())))
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return dtype


def _describe(checkpoint: Path) -> tuple[Path, Config, Path | None]:
    """(folder with the weights, configuration, folder with what was imported) of whatever the user named."""
    if not checkpoint.is_dir():
        raise UserError(f"'{checkpoint}' is no folder: name a run, a checkpoint of a run or an imported checkpoint")
    if (checkpoint / "hf" / "config.json").is_file():
        hf_config = _read_json(checkpoint / "hf" / "config.json")
        place = f"'{checkpoint}/hf/config.json'"
        sections = dict(model=asdict(read_model(hf_config, place)), ttt=asdict(read_ttt(hf_config, place)))
        return checkpoint, _config(sections, place), checkpoint / "hf"
    folder = checkpoint_in(checkpoint)
    run = folder.parent.parent
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"'{checkpoint}' is no run, no checkpoint of a run and no imported checkpoint: there is no "
            f"'{run / 'config.yaml'}'"
        )
    config = _run_config(run)
    return folder, config, _companions_of(config)


def _companions_of(config: Config) -> Path | None:
    """Where a run's tokenizer and generation config lie: with what it or the run before it was imported as, or with
    its data."""
    candidates = []
    if config.checkpoint.load:
        load = Path(config.checkpoint.load)
        candidates.append(load / "hf")
        before = next((run for run in (load, load.parent.parent) if (run / "config.yaml").is_file()), None)
        if before:
            earlier = _companions_of(_run_config(before))
            candidates += [earlier] if earlier else []
    candidates += [Path(config.data.tokenizer)] if config.data.tokenizer else []
    candidates += [Path(f"{source.path}.tokenizer") for source in config.data.sources[:1]]
    return next((folder for folder in candidates if folder.is_dir()), None)


def _run_config(run: Path) -> Config:
    path = run / "config.yaml"
    return _config(read_yaml(path), f"'{path}'")


def _config(values: dict, place: str) -> Config:
    filled = dict(run=dict(name="export"), train=dict(steps=1, global_batch_size=1), optim=dict(lr=0.0))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), filled, dict(data=dict(seq_length=1)), values)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{place} is not of this version: {first_line(error)}") from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: name a folder in Hugging Face's format")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}): download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no keys: download it again")
    return values


def _meta(shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Shape and dtype alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _fresh(output: Path) -> Path:
    """A new folder beside ``output``, to be renamed when it is whole."""
    if output.exists():
        raise UserError(f"'{output}' is there already: remove it, or name another folder")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
