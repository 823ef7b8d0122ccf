"""Build a Config from the values of a file, which an earlier version may have written."""

from dataclasses import fields, is_dataclass
from typing import cast, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inplace_ttt.config.errors import UserError, first_line
from inplace_ttt.config.ranges import check_ranges
from inplace_ttt.config.schema import Config

# Removed keys, and what to use instead
REMOVED = {"model.qk_layernorm": "use model.family: qwen3 has norms of queries and keys, llama and qwen2 have none"}
# Values for required keys that a file may lack: an imported model has no run
_FILLED = dict(
    run=dict(name="export"),
    train=dict(steps=1, global_batch_size=1),
    optim=dict(lr=0.0),
    data=dict(seq_length=1),
)


def config_from_values(values: dict, place: str) -> Config:
    """Return the configuration with these values; keys that this version does not know are ignored.

    Args:
        values: sections by name, as read from a file.
        place: name of the file, for error messages.

    Raises:
        UserError: a value is missing, has the wrong type, or is out of range.
    """
    values = _with_family(values)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), _FILLED, _known(values, Config))
        config = cast(Config, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{place} cannot be read by this version: {first_line(error)}") from error
    try:
        check_ranges(config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return config


def _with_family(values: dict) -> dict:
    """Return the values with model.family added, which files of earlier versions state as model.qk_layernorm."""
    model = values.get("model")
    if not isinstance(model, dict) or "family" in model or "qk_layernorm" not in model:
        return values
    return {**values, "model": {**model, "family": "qwen3" if model["qk_layernorm"] else "llama"}}


def _known(values: dict, cls: type) -> dict:
    hints = get_type_hints(cls)
    known = {}
    for field in fields(cls):
        if field.name in values:
            value, kind = values[field.name], hints[field.name]
            is_section = isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict)
            known[field.name] = _known(value, kind) if is_section else value
    return known
