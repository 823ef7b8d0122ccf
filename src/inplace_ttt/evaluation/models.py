"""Open a model from a run, a checkpoint, an exported folder, or any folder in Hugging Face format.

Code in a model folder is never executed: exported models run with this package's own classes.
"""

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from inplace_ttt.config import UserError, one_line
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.files import read_json
from inplace_ttt.hf import modeling_inplace_ttt as exported
from inplace_ttt.hf.config import TTT_KEYS, read_ttt
from inplace_ttt.hf.convert import CheckpointInfo, export_checkpoint, inspect_checkpoint
from inplace_ttt.hf.tokenizer import fingerprint, load_tokenizer
from inplace_ttt.megatron.checkpoint import checkpoint_in
from inplace_ttt.models import FAMILIES
from inplace_ttt.models.family import Family

MOST_LAYERS = 10_000
EXPORTED = "exported"  # subfolder of the output folder: runs exported to Hugging Face format
WEIGHTS = (".safetensors", ".bin", ".distcp", ".json")  # suffixes of the files that identify a model


def _class_with_fast_weights(family: Family) -> type[PreTrainedModel]:
    name = f"InPlaceTTT{family.architecture}"
    if not hasattr(exported, name):
        raise RuntimeError(f"model family '{family.name}' needs a class {name} in {exported.__file__}")
    return getattr(exported, name)


CLASSES = {f"InPlaceTTT{family.architecture}": _class_with_fast_weights(family) for family in FAMILIES.values()}


@dataclass(frozen=True)
class LoadedModel:
    """Hold a loaded model and its tokenizer."""

    name: str  # label in results and messages
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSource:
    """Describe a model by the path that the user gave: a run, a checkpoint, or a folder in Hugging Face format."""

    path: Path
    checkpoint: CheckpointInfo | None  # None: a folder in Hugging Face format
    has_fast_weights: bool

    @classmethod
    def find(cls, path: Path) -> "ModelSource":
        """Return the description of the model at a path, from its configuration; no weights are read.

        A folder with a config.json is in Hugging Face format; any other must be a run or a checkpoint. Raises UserError
        if the path is not a folder or contains no model, or if its configuration cannot be read or is invalid.
        """
        if not path.is_dir():
            raise UserError(f"'{path}' is not a folder: name a run, a checkpoint or a folder in Hugging Face format")
        if (path / "config.json").is_file():
            settings = read_settings(path)
            fast = bool(getattr(settings, "ttt_layers", None)) and getattr(settings, "ttt_mode", None) is True
            return cls(path, None, fast)
        if not (checkpoint_in(path) / "run.json").is_file():
            raise UserError(
                f"'{path}' contains no model: name a run, a checkpoint or a folder in Hugging Face format (config.json)"
            )
        described = inspect_checkpoint(path)
        return cls(path, described, described.config.ttt.enabled)

    @property
    def folder(self) -> Path:
        """Return the folder with the weights."""
        return self.path if self.checkpoint is None else self.checkpoint.folder

    def modes(self, asked: Sequence[FastWeightMode]) -> list[FastWeightMode]:
        """Return the modes to evaluate: ``asked``, or the default mode only if the model has no fast weights."""
        return list(asked) if self.has_fast_weights else [FastWeightMode()]

    def digest(self, mode: FastWeightMode, numerics: Sequence[str] = ()) -> str:
        """Return a digest that identifies the model in results: folder, mode, numerics, files (name, size, mtime)."""
        folder = self.folder
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in WEIGHTS)
        facts = [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        content = json.dumps([str(folder.resolve()), str(mode), list(numerics), facts])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer. Raises UserError if the model has none."""
        folder = self.path if self.checkpoint is None else self.checkpoint.tokenizer()
        if folder is None:
            raise UserError(f"'{self.path}' has no tokenizer: its run was trained without one")
        return load_tokenizer(str(folder))

    def fingerprint(self) -> str | None:
        """Return the tokenizer's fingerprint; None for a run without one."""
        try:
            return fingerprint(self.tokenizer())
        except UserError:
            if self.checkpoint is None:
                raise
            return None

    def vocabulary(self) -> int:
        """Return the vocabulary size of the model's configuration; 0 if it is not set."""
        if self.checkpoint is not None:
            return self.checkpoint.config.model.vocab_size or 0
        found = read_json(self.path / "config.json").get("vocab_size")
        return found if type(found) is int else 0

    def longest(self) -> int:
        """Return the model's training length in tokens, from its configuration; 0 if it is not set."""
        if self.checkpoint is not None:
            config = self.checkpoint.config
            return max(config.data.seq_length, config.model.max_position_embeddings or 0)
        content = read_json(self.path / "config.json")
        said = (content.get(key) for key in ("max_position_embeddings", "ttt_trained_length"))
        return max((number for number in said if type(number) is int), default=0)

    def export(self, work: Path) -> Path:
        """Return a folder in Hugging Face format: the path itself, or an export that is written to ``work`` once."""
        if self.checkpoint is None:
            return self.path
        folder = self.exported_to(work)
        if not (folder / "config.json").is_file():
            work.mkdir(parents=True, exist_ok=True)
            export_checkpoint(self.checkpoint.folder, folder, None)
        return folder

    def exported_to(self, work: Path) -> Path:
        """Return the folder that ``export`` returns, without exporting."""
        if self.checkpoint is None:
            return self.path
        manifest = self.folder / "manifest.json"
        content = manifest.read_bytes() if manifest.is_file() else b""
        digest = hashlib.sha256(str(self.folder.resolve()).encode() + content).hexdigest()[:12]
        return work / f"{self.folder.name}_{digest}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Disable progress bars of transformers (one per rank) and its tensor reports: ``_check_tensors`` checks them."""
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check_tensors(folder: Path, found: dict, expects_more: bool) -> None:
    """Raise UserError if tensors are missing, have the wrong shape, or are not used by the model.

    transformers would initialise missing tensors randomly and ignore unused ones.

    Args:
        expects_more: fast weights are switched off, so their tensors in the folder are not an error.
    """
    mismatched = [one if isinstance(one, str) else one[0] for one in found["mismatched_keys"]]
    for what, names in (("lacks", found["missing_keys"]), ("has the wrong shape of", mismatched)):
        if names:
            name = min(map(str, names))
            more = f" and {len(names) - 1} other tensors" if len(names) > 1 else ""
            raise UserError(
                f"'{folder}' {what} {name}{more} of the model in its config.json: download or export it again"
            )
    left = [name for name in found["unexpected_keys"] if ".ttt_" in name]
    if left and not expects_more:
        raise UserError(
            f"'{folder}' has fast weights ({min(left)}), but its config.json does not describe them (architectures, "
            f"ttt_mode): export it again"
        )
    layers = [name for name in found["unexpected_keys"] if re.search(r"\.(layers|h|blocks)\.\d+\.", name)]
    buffers = (".inv_freq", ".masked_bias", ".bias")  # written by older versions of transformers
    layers = [name for name in layers if ".ttt_" not in name and not name.endswith(buffers)]
    if layers:
        raise UserError(
            f"'{folder}' has {min(layers)} and {len(layers) - 1} other tensors that the model in its config.json does "
            f"not use (num_hidden_layers, architectures): download or export it again"
        )


def _class_of(config: dict) -> type | None:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return CLASSES.get(first) if isinstance(first, str) else None


def read_settings(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a folder's config.json, without running code of the folder.

    Raises UserError if transformers cannot read it, or if its fast-weight settings are invalid.
    """
    path = folder / "config.json"
    config = read_json(path, "download it again")
    kind = _class_of(config)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(f"'{path}' sets num_hidden_layers={layers}: use at most {MOST_LAYERS}")
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            if kind is None:
                return AutoConfig.from_pretrained(folder, trust_remote_code=False)
            settings = kind.config_class(**{key: value for key, value in config.items() if key != "auto_map"})
    except Exception as error:  # transformers raises any type
        raise UserError(f"'{path}' cannot be read by transformers ({one_line(error)}): download it again") from error
    if not isinstance(settings.ttt_mode, bool):
        raise UserError(f"'{path}' sets ttt_mode={settings.ttt_mode!r}: use true or false")
    if settings.ttt_mode:
        ttt = read_ttt({**config, "ttt_mode": True, "ttt_layers": settings.ttt_layers}, f"'{path}'")
        clip = settings.ttt_clip
        for theirs, ours in TTT_KEYS.items():
            setattr(settings, theirs, getattr(ttt, ours))
        settings.ttt_layers = ttt.layers
        if isinstance(clip, list):
            settings.ttt_clip = clip[: len(ttt.layers)]
    return settings


def _check_index(folder: Path) -> None:
    """Raise UserError if an index file maps tensors to files outside the folder."""
    for path in folder.glob("*.index.json"):
        named = read_json(path, "download it again").get("weight_map")
        files = set(named.values()) if isinstance(named, dict) and all(map(_is_text, named.values())) else {""}
        for file in files:
            if Path(file).name != file or not file:
                raise UserError(
                    f"'{path}' maps tensors to '{file}', which is not a file name in its folder: download it again"
                )


def _is_text(value) -> bool:
    return isinstance(value, str)


def _greedy(network: PreTrainedModel, folder: Path) -> GenerationConfig:
    """Return a greedy generation config with the model's own end-of-sequence tokens.

    Other settings of its generation_config.json, such as penalties, are not used in an evaluation. Raises UserError if
    eos_token_id is invalid.
    """
    said = network.generation_config.eos_token_id
    ends = said if isinstance(said, list) else [] if said is None else [said]
    if not all(type(one) is int and one >= 0 for one in ends):
        raise UserError(
            f"'{folder}' sets eos_token_id={said!r} (generation_config.json, config.json): use a token ID or a list of "
            f"token IDs"
        )
    return GenerationConfig(eos_token_id=ends or None, pad_token_id=min(ends, default=0), do_sample=False)


def chosen_dtype(word: str) -> torch.dtype:
    """Return the dtype for a value of --dtype; ``auto``: bf16 on a GPU, else fp32."""
    auto = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[word]


def check_tokens(largest: int, entries: int, name) -> None:
    """Raise UserError if a text's largest token ID, ``largest``, is outside the model's ``entries`` embedding rows."""
    if largest >= entries:
        raise UserError(
            f"the tokenizer of '{name}' produces token ID {largest}, but the model has {entries} embedding rows: "
            f"use the tokenizer that the model was trained with"
        )


def open_model(folder: Path, name: str, mode: FastWeightMode, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load a model in Hugging Face format. Raises UserError if it cannot be loaded or does not fit in GPU memory."""
    settings = read_settings(folder)
    kind = next((one for one in CLASSES.values() if one.config_class is type(settings)), AutoModelForCausalLM)
    _check_index(folder)
    try:
        if kind is not AutoModelForCausalLM:
            settings.ttt_mode = settings.ttt_mode and mode.on
            settings.ttt_clip = mode.clip_of(settings.ttt_clip)
            settings.ttt_bound = mode.bound_of(settings.ttt_bound)
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            network, found = kind.from_pretrained(
                folder,
                config=settings,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # _check_tensors reports them
            )
        _check_tensors(folder, found, expects_more=not mode.on)
        network.generation_config = _greedy(network, folder)
        network = network.to(device).eval()
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(f"'{folder}' does not fit in one GPU's memory") from error
    except Exception as error:  # transformers raises any type
        raise UserError(
            f"'{folder}' cannot be loaded by transformers ({type(error).__name__}: {one_line(error)})"
        ) from error
    return LoadedModel(name, network, load_tokenizer(str(folder)))
