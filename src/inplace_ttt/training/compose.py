"""From ``recipe=NAME key=value ...`` to a checked Config; Hydra composes, we say what is wrong in one sentence."""

import difflib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inplace_ttt.config import Config, UserError, first_line

ConfigStore.instance().store(name="schema", node=Config)
# for parallel layouts that follow the length of the samples
OmegaConf.register_new_resolver("ceil_div", lambda a, b: -(-a // b), replace=True)


def compose_config(overrides: list[str], recipes: Path) -> DictConfig:
    """The configuration that the overrides make of ``recipes/config.yaml``, with types checked."""
    _check_recipe(overrides, recipes)
    _check_keys(overrides, recipes)
    try:
        return _compose(overrides, recipes)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, overrides, recipes)) from error


def _compose(overrides: list[str], recipes: Path) -> DictConfig:
    with initialize_config_dir(str(recipes.resolve()), version_base="1.3"):
        return compose("config", overrides=overrides)


def to_config(composed: DictConfig) -> Config:
    """Plain dataclasses; raises UserError where a key that a recipe must give is missing."""
    missing = sorted(_missing(OmegaConf.to_container(composed, resolve=False)))
    if missing:
        raise UserError(f"{missing[0]} has no value: choose a recipe (recipe=tiny_ttt) or set {missing[0]}=...")
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from error


def _missing(node, prefix: str = "") -> list[str]:
    if node == "???":
        return [prefix.rstrip(".")]
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [key for name, value in inner for key in _missing(value, f"{prefix}{name}.")]


def _check_recipe(overrides: list[str], recipes: Path) -> None:
    known = sorted(path.stem for path in (recipes / "recipe").glob("*.yaml"))
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "recipe" and value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean recipe={near[0]}? " if near else ""
            raise UserError(f"recipe={value} does not exist; {hint}recipes: {', '.join(known)}")


def _check_keys(overrides: list[str], recipes: Path) -> None:
    """Every override is key=value with a key that there is; keys are neither added nor removed."""
    keys = set(_keys(Config))
    groups = {path.name for path in recipes.iterdir() if path.is_dir()}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key or key[0] in "+~-":
            bare = key.lstrip("+~-")
            example = f"{bare}=..." if _is_known(bare, keys) else "train.steps=100"
            raise UserError(f"'{override}' is not understood: settings are written key=value, such as {example}")
        if key in groups:
            choices = sorted(path.stem for path in (recipes / key).glob("*.yaml"))
            if value not in (*choices, "null"):
                raise UserError(f"{key}={value} does not exist; there is {', '.join(choices)}")
        elif not _is_known(key, keys):
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            last = key.rsplit(".", 1)[-1]
            near = near or [known for known in sorted(keys) if known.rsplit(".", 1)[-1] == last]
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{override}: there is no key '{key}'{hint}")


def _explain(error: BaseException, overrides: list[str], recipes: Path) -> str:
    """One sentence that names the override at fault: the first that fails also without the others."""
    recipe = [override for override in overrides if override.startswith("recipe=")]
    for override in overrides:
        try:
            _compose(recipe if override in recipe else [*recipe, override], recipes)
        except (HydraException, OmegaConfBaseException) as alone:
            return f"{override} cannot be used: {_cause(alone)}"
    return _cause(error)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\s+", " ", first_line(error))


def _is_known(key: str, keys: set[str]) -> bool:
    return key in keys or re.sub(r"[.\[]\d+\]?", "", key) in keys


def _keys(cls: type, prefix: str = "") -> list[str]:
    """All keys of the configuration, sections included."""
    found = []
    for field in fields(cls):
        found.append(prefix + field.name)
        inner = field.type if isinstance(field.type, type) else None
        if inner is not None and is_dataclass(inner):
            found += _keys(inner, f"{prefix}{field.name}.")
    return found
