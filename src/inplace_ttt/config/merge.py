"""Build a Config from the values of a file, also of one that an earlier version wrote."""

from dataclasses import fields, is_dataclass
from typing import cast, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inplace_ttt.config.errors import UserError, first_line
from inplace_ttt.config.ranges import check_ranges
from inplace_ttt.config.schema import Config

# Keys that there are no more, and what has taken their place
REMOVED = {"model.qk_layernorm": "use model.family: qwen3 has norms of queries and keys, llama and qwen2 have none"}
# What a file need not say: of an imported model there is no run
_FILLED = dict(
    run=dict(name="export"),
    train=dict(steps=1, global_batch_size=1),
    optim=dict(lr=0.0),
    data=dict(seq_length=1),
)


def config_from_values(values: dict, place: str) -> Config:
    """Return the configuration that ``values`` of ``place`` make; keys that there are no more are left out.

    Raises UserError where a value is missing, of another type, or out of range.
    """
    values = _with_family(values)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), _FILLED, _known(values, Config))
        config = cast(Config, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{place} is not of this version: {first_line(error)}") from error
    try:
        check_ranges(config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return config


def _with_family(values: dict) -> dict:
    """Return values with model.family. Earlier versions had only the norms of queries and keys to tell families by."""
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
