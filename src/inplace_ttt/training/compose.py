"""Compose ``recipe=NAME key=value ...`` into a checked Config with Hydra, and explain errors in one sentence."""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inplace_ttt.config import REMOVED, SOURCE_LISTS, Config, UserError, first_line, schema_keys
from inplace_ttt.files import read_yaml, user_path

KEYS = schema_keys()
GLOBAL = ("recipe", "parallel", "stage")  # groups whose files set keys of all sections
TEXT = tuple(name for name, key in KEYS.items() if key.type is str)
_PATH_IN_LIST = re.compile(r"(\bpath:\s*)([^\s,}'\"][^,}'\"]*?)(?=\s*[,}])")  # a path in a value of SOURCE_LISTS

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list such as [a,b]",
}

ConfigStore.instance().store(name="schema", node=Config)


def _several_nodes() -> bool:
    """Return whether torchrun started ranks on several nodes."""
    ranks, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return ranks.isdecimal() and here.isdecimal() and int(ranks) > int(here)


# for recipes whose parallel layout depends on the sequence length and the number of nodes
OmegaConf.register_new_resolver("ceil_div", lambda a, b: -(-a // b), replace=True)
OmegaConf.register_new_resolver("several_nodes", _several_nodes, replace=True)


@dataclass(frozen=True)
class Recipes:
    """List the recipes of this program (``folder``) and of the user (``own``; None: there are none)."""

    folder: Path
    own: Path | None = None

    def files(self, group: str) -> list[str]:
        """Return the names that can be used as ``group=NAME``."""
        return sorted({path.stem for folder in self._folders for path in (folder / group).glob("*.yaml")})

    @property
    def groups(self) -> set[str]:
        """Return the names of the config groups, such as ``recipe`` and ``parallel``."""
        return {path.name for folder in self._folders for path in folder.iterdir() if path.is_dir()}

    @property
    def _folders(self) -> list[Path]:
        return [self.folder] if self.own is None else [self.folder, self.own]


def split_config_dir(arguments: list[str], recipes: Path) -> tuple[list[str], Recipes]:
    """Return a command line without ``--config-dir DIR``, and the recipes including those in DIR.

    Raises UserError if DIR is not a folder, or holds a file that cannot be read or has the name of a built-in recipe.
    """
    rest, own = [], None
    words = iter(arguments)
    for word in words:
        if word == "--config-dir" or word.startswith("--config-dir="):
            if own is not None:
                raise UserError("--config-dir is given twice: use one folder")
            own = word.partition("=")[2] if "=" in word else next(words, "")
        else:
            rest.append(word)
    return rest, with_own(recipes, own)


def with_own(recipes: Path, own: str | None) -> Recipes:
    """Return the recipes including those of the user's folder ``own``. Raises UserError like ``split_config_dir``."""
    if own is None:
        return Recipes(recipes)
    if not own or not user_path(own).is_dir():
        raise UserError(f"--config-dir '{own}' is not a folder: name one that holds recipe/NAME.yaml")
    groups = [path.name for path in recipes.iterdir() if path.is_dir()]
    for file in sorted(file for group in groups for file in user_path(own).glob(f"{group}/*.y*ml")):
        name = file.relative_to(user_path(own))
        if file.suffix == ".yml":
            raise UserError(f"--config-dir '{own}': Hydra does not read {name}: name it {name.with_suffix('.yaml')}")
        if (recipes / name).is_file():
            raise UserError(f"--config-dir '{own}': {name} is the name of a built-in recipe: use another name")
        read_yaml(file, "repair it")
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        if file.parent.name in GLOBAL and not first.replace(" ", "").startswith("#@package_global_"):
            raise UserError(f"--config-dir '{own}': the first line of {name} must be '# @package _global_'")
    for name in ("schema.yaml", "config.yaml"):
        if (user_path(own) / name).exists():
            raise UserError(f"--config-dir '{own}': {name} would replace a file of this program: move it away")
    return Recipes(recipes, user_path(own))


def compose_config(overrides: list[str], recipes: Path | Recipes) -> DictConfig:
    """Return ``recipes/config.yaml`` with the overrides applied and their types checked.

    Values of text keys are quoted for Hydra, so that they are used as typed. Without quotes Hydra's grammar parses
    2026_01_01 as a number and rejects /data/lr=1e-3. Raises UserError if an override cannot be used.

    Example::

        >>> composed = compose_config(["recipe=tiny_ttt", "train.steps=7"], recipes)
        >>> config = to_config(composed)
        >>> config.train.steps, config.ttt.enabled
        (7, True)
    """
    recipes = recipes if isinstance(recipes, Recipes) else Recipes(recipes)
    _check_recipe(overrides, recipes)
    _check_keys(overrides, recipes)
    quoted = [_quote(override) for override in overrides]
    for override in quoted:
        _check_grammar(override)
    try:
        return _compose(quoted, recipes)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, quoted, recipes)) from error
    except RecursionError as error:
        raise UserError(
            "the defaults lists of the recipes refer to each other in a circle: remove one entry"
        ) from error
    except (ValueError, OverflowError, TypeError, yaml.YAMLError) as error:  # from OmegaConf, for numbers such as 1e400
        raise UserError(_explain(error, quoted, recipes)) from error


def _compose(overrides: list[str], recipes: Recipes) -> DictConfig:
    more = [] if recipes.own is None else [f"hydra.searchpath=[{_quoted(f'file://{recipes.own.resolve()}')}]"]
    with initialize_config_dir(str(recipes.folder.resolve()), version_base="1.3"):
        return compose("config", overrides=[*overrides, *more])


def to_config(composed: DictConfig) -> Config:
    """Convert a composed configuration to dataclasses. Raises UserError if a required key has no value."""
    try:
        missing = sorted(_missing(OmegaConf.to_container(composed, resolve=False)))
        if missing:
            raise UserError(f"{missing[0]} has no value: choose a recipe (recipe=tiny_ttt) or set {missing[0]}=...")
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{key}{first_line(error)}") from error
    except (ValueError, TypeError, RecursionError, ZeroDivisionError) as error:  # an interpolation's arithmetic
        raise UserError(f"the configuration cannot be resolved: {first_line(error)}") from error


def _missing(node, prefix: str = "") -> list[str]:
    if node == "???":
        return [prefix.rstrip(".")]
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [key for name, value in inner for key in _missing(value, f"{prefix}{name}.")]


def _check_recipe(overrides: list[str], recipes: Recipes) -> None:
    known = recipes.files("recipe")
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "recipe" and value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean recipe={near[0]}?" if near else f"recipes: {', '.join(known)}"
            raise UserError(f"recipe={value} does not exist; {hint}")


def _check_keys(overrides: list[str], recipes: Recipes) -> None:
    """Raise UserError unless every override is key=value with an existing key. Keys cannot be added or removed."""
    groups = recipes.groups
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key or key[0] in "+~-":
            bare = key.lstrip("+~-")
            example = f"{bare}=..." if _plain(bare) in KEYS else "train.steps=100"
            raise UserError(f"'{_shown(override)}' is not understood: write settings as key=value, such as {example}")
        if key in groups:
            choices = recipes.files(key)
            if value not in choices:
                raise UserError(f"{key}={value} does not exist; use one of {', '.join(choices)}")
        elif key in REMOVED:
            raise UserError(f"{_shown(override)}: key '{key}' was removed: {REMOVED[key]}")
        elif _plain(key) not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            last = key.rsplit(".", 1)[-1]
            near = near or [known for known in sorted(KEYS) if known.rsplit(".", 1)[-1] == last]
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{_shown(override)}: unknown key '{key[:100]}'{hint}")
        elif value == "null" and not KEYS[_plain(key)].optional and key != "ttt.layers":
            raise UserError(f"{key}=null cannot be used: the key must have a value")


def _quote(override: str) -> str:
    """Quote the value of a text key, unless it is already quoted, or is null and the key may be null."""
    key, _, value = override.partition("=")
    key = re.sub(r"\[(\d+)\]", r".\1", key)
    if key in SOURCE_LISTS:
        return f"{key}={re.sub(_PATH_IN_LIST, _quote_path, value)}"
    if _plain(key) not in TEXT or (value == "null" and KEYS[_plain(key)].optional):
        return f"{key}={value}"
    return f"{key}={_quoted(value)}"


def _quote_path(found: re.Match) -> str:
    return f"{found[1]}{_quoted(found[2])}"


def _quoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value
    # Hydra reads a backslash before a quote as its escape
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def _check_grammar(override: str) -> None:
    """Raise UserError if Hydra's grammar rejects the override."""
    try:
        OverridesParser.create().parse_override(override).value()
    except (HydraException, ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{_shown(override)} is not understood: put text with other characters than letters, digits and ./_- in "
            f"quotes, such as \"{override.partition('=')[0]}='...'\""
        ) from error


def _explain(error: BaseException, overrides: list[str], recipes: Recipes) -> str:
    """Return a sentence that names the override at fault: the first that also fails without the others."""
    recipe = [override for override in overrides if override.startswith("recipe=")]
    for override in overrides:
        try:
            _compose(recipe if override in recipe else [*recipe, override], recipes)
        except (HydraException, OmegaConfBaseException, ValueError, OverflowError, TypeError, RecursionError) as alone:
            name = _plain(override.partition("=")[0])
            key = KEYS.get(name)
            use = f": use {KINDS[key.type]}" if key is not None and key.type in KINDS else ""
            use = f": use {name}=[{{path: data/mine}}]" if name in SOURCE_LISTS else use
            return f"{_shown(override)} cannot be used ({_cause(alone)}){use}"
    cause = _cause(error)
    hints = [f": {hint}" for key, hint in REMOVED.items() if f"'{key.rpartition('.')[2]}'" in cause]
    return cause + "".join(hints)


def _shown(override: str) -> str:
    return override if len(override) <= 100 else f"{override[:97]}..."


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    said = first_line(error)
    if said.endswith("raised while composing config:"):  # for a recipe: the next lines give the reason
        where, (_, what, *more) = said.rpartition(": ")[0], str(error).strip().splitlines()
        key = next((line.strip() for line in more if line.strip().startswith("full_key:")), "")
        said = f"{where}: {what.strip()}{' ' if key else ''}{key}"
    return re.sub(r"\s+", " ", said)[:200]


def _plain(key: str) -> str:
    """Return a key's name in the schema, without list indices."""
    return re.sub(r"[.\[]\d+\]?", "", key)
