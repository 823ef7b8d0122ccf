"""Open what a user calls a model: a run, a checkpoint, an exported folder, or any folder in Hugging Face's format.

Code in a folder never runs: exported models run by this package's own classes.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from inplace_ttt.config import UserError, one_line
from inplace_ttt.data.tokenizer import load_tokenizer
from inplace_ttt.files import read_json
from inplace_ttt.hf import modeling_inplace_ttt as exported
from inplace_ttt.hf.convert import export_checkpoint
from inplace_ttt.megatron.checkpoint import checkpoint_in

WEIGHTS = (".safetensors", ".bin", ".distcp", ".json")  # files that tell models apart
CLASSES = {kind.__name__: kind for kind in (exported.InPlaceTTTQwen3ForCausalLM, exported.InPlaceTTTLlamaForCausalLM)}


@dataclass(frozen=True)
class FastWeightMode:
    """Choose how an evaluation uses fast weights: as the model says itself, not at all, or clipped."""

    on: bool = True
    clip: float | None = None  # None: as the model's configuration says

    @classmethod
    def parse(cls, word: str) -> "FastWeightMode":
        """Read ``on``, ``off`` or ``clip=0.002``. Raise UserError for anything else."""
        if word in ("on", "off"):
            return cls(on=word == "on")
        number = word.removeprefix("clip=")
        try:
            clip = float(number)
        except ValueError:
            clip = 0.0
        if number == word or not 0 < clip < float("inf"):
            raise UserError(f"--fast-weights {word} is not understood: use on, off or clip=NUMBER, such as clip=0.002")
        return cls(clip=clip)

    def __str__(self) -> str:
        if not self.on:
            return "off"
        return "on" if self.clip is None else f"clip={self.clip:g}"


@dataclass(frozen=True)
class Model:
    """A model that answers, with its tokenizer."""

    name: str  # as results call it
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def huggingface_folder(path: Path, work: Path) -> Path:
    """Return a folder in Hugging Face's format: the path itself, or its export, which is made in ``work`` once.

    Raises UserError where the path holds no model.
    """
    if not path.is_dir():
        raise UserError(f"'{path}' is no folder: name a run, a checkpoint or a folder in Hugging Face's format")
    if (path / "config.json").is_file():
        return path
    checkpoint = checkpoint_in(path)
    if not (checkpoint / "run.json").is_file():
        raise UserError(
            f"'{path}' holds no model: name a run, a checkpoint or a folder in Hugging Face's format (config.json)"
        )
    manifest = checkpoint / "manifest.json"
    content = manifest.read_bytes() if manifest.is_file() else b""
    digest = hashlib.sha256(str(checkpoint.resolve()).encode() + content).hexdigest()[:12]
    folder = work / f"{checkpoint.name}_{digest}"
    if not (folder / "config.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        export_checkpoint(checkpoint, folder, None)
    return folder


def open_model(path: Path, mode: FastWeightMode, work: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """Load a model for evaluation. Raise UserError where that cannot be.

    Args:
        work: where a run or checkpoint is exported to.
    """
    folder = huggingface_folder(path, work)
    config = read_json(folder / "config.json", "download it again")
    architecture = (config.get("architectures") or [None])[0]
    is_fast = architecture in CLASSES and config.get("ttt_mode")
    if mode.clip is not None and not is_fast:
        raise UserError(f"--fast-weights {mode}: '{path}' has no fast weights to clip: use on or off")
    try:
        if architecture in CLASSES:
            kind = CLASSES[architecture]
            settings = kind.config_class(**{key: value for key, value in config.items() if key != "auto_map"})
            if not mode.on:
                settings.ttt_mode = False
            if mode.clip is not None:
                settings.ttt_clip = mode.clip
        else:
            kind, settings = AutoModelForCausalLM, AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = kind.from_pretrained(folder, config=settings, dtype=dtype, local_files_only=True)
    except Exception as error:  # transformers raises anything
        raise UserError(f"'{folder}' cannot be loaded by transformers ({one_line(error)})") from error
    return Model(path.name, network.to(device).eval(), load_tokenizer(str(folder)))


def model_digest(path: Path, mode: FastWeightMode) -> str:
    """Return a digest by which results know whether they are of this model, by its files' names, sizes and times."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in WEIGHTS)
    facts = [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([str(path.resolve()), str(mode), facts]).encode()).hexdigest()[:16]
