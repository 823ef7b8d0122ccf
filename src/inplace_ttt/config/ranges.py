"""Check the ranges of values, which the types in schema.py state, and report a violation in one sentence."""

import functools
import re
import typing
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from inplace_ttt.config.errors import UserError

LARGE = 1000  # larger upper bounds only exclude absurd values, so a message names them only if they are exceeded
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def OneOf(*choices: str) -> AfterValidator:
    """Return a validator that accepts only these strings."""

    def check(value: str) -> str:
        if value not in choices:
            raise PydanticCustomError("range", f"is not known: use one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


def Odd() -> AfterValidator:
    """Return a validator that accepts odd numbers."""

    def check(value: int) -> int:
        if value % 2 == 0:
            raise PydanticCustomError("range", "is even: use an odd number, so that the kernel is centred")
        return value

    return AfterValidator(check)


def Path() -> AfterValidator:
    """Return a validator that accepts strings that can be a path."""

    def check(value: str) -> str:
        if not value.strip():
            raise PydanticCustomError("range", "is empty: name a path")
        if _UNPRINTABLE.search(value) or len(value) > 4000:
            raise PydanticCustomError("range", "is not a valid path: use at most 4000 printable characters")
        return value

    return AfterValidator(check)


def Word() -> AfterValidator:
    """Return a validator that accepts names of runs and projects, which occur in paths, commands and titles."""

    def check(value: str) -> str:
        if not value.strip():
            raise PydanticCustomError("range", "is empty: give a name")
        if _UNPRINTABLE.search(value) or "/" in value or value in (".", "..") or len(value.encode()) > 128:
            raise PydanticCustomError("range", "is not a valid name: use at most 128 printable characters, and no '/'")
        return value

    return AfterValidator(check)


def check_ranges(section, prefix: str = "") -> None:
    """Raise UserError for the first value of a section that is out of range.

    Args:
        section: a dataclass of schema.py.
        prefix: put before the names of keys in the message, such as ``model.``.
    """
    try:
        cls: Any = type(section)
        _adapter(cls).validate_python(asdict(section))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(_sentence(type(section), prefix, dict(first))) from None


def check_key(name: str, value) -> None:
    """Raise UserError if ``value`` is not allowed for a key such as ``parallel.timeout_minutes``."""
    from inplace_ttt.config.schema import Config

    section, _, key = name.partition(".")
    cls = typing.get_type_hints(Config)[section]
    try:
        TypeAdapter(typing.get_type_hints(cls, include_extras=True)[key]).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(_sentence(cls, f"{section}.", {**first, "loc": (key, *first["loc"])})) from None


@functools.cache
def _adapter(cls: Any) -> TypeAdapter:
    return TypeAdapter(cls)


def _sentence(cls: type, prefix: str, error: dict) -> str:
    place, value = error["loc"], error["input"]
    key = prefix + ".".join(map(str, place))
    shown = str(value) if len(str(value)) <= 80 else f"{str(value)[:77]}..."
    if error["type"] == "range":
        return f"{key}={shown if shown.isprintable() and shown.strip() else repr(shown)} {error['msg']}"
    bounds, optional = _bounds(cls, place)
    allowed = _describe(value, bounds) + (", or null" if optional else "")
    if error["type"] == "finite_number":
        return f"{key}={shown} is not a finite number: use {allowed}"
    if error["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{key}={shown} is out of range: use {allowed}"
    return f"{key}={shown} cannot be used: {error['msg']}"


def _bounds(cls: type, place: tuple) -> tuple[dict[type, float], bool]:
    """Return the bounds of the key at ``place``, by type (Ge, Gt, Le, Lt), and whether the key may be null."""
    hint: Any = cls
    bounds: dict[type, float] = {}
    optional = False
    for step in place:
        if isinstance(step, str) and is_dataclass(hint):
            hint = typing.get_type_hints(hint, include_extras=True)[step]
        elif isinstance(step, int):
            hint = next(iter(typing.get_args(hint)), None)
        bounds, optional = {}, False
        while hint is not None:
            if typing.get_origin(hint) is Annotated:
                hint, *extras = typing.get_args(hint)
                for extra in extras:
                    if isinstance(extra, Ge | Gt | Le | Lt):
                        bounds[type(extra)] = getattr(extra, type(extra).__name__.lower())
            elif type(None) in typing.get_args(hint):
                optional = True
                (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
            else:
                break
    return bounds, optional


def _describe(value, bounds: dict[type, float]) -> str:
    least, above = bounds.get(Ge), bounds.get(Gt)
    most, below = bounds.get(Le), bounds.get(Lt)
    if least is not None and 0 < least < 1e-20:  # the smallest fp32 numbers
        if isinstance(value, int | float) and 0 < value < least:
            return f"{least} or more"
        least, above = None, 0
    upper = most if below is None else below
    if upper is not None and (upper <= LARGE or (least is None and above is None)):
        end = f"{most:,}" if below is None else f"below {below:,}"
        start = f"above {above:,}" if least is None else f"{least:,}"
        return f"a number {'from ' if least is not None else ''}{start} {'to' if least is not None else 'and'} {end}"
    if upper is not None and isinstance(value, int | float) and value > upper:
        return f"{upper:,} or less"
    if above is not None:
        return f"a number above {above:,}"
    return f"{least:,} or more" if least is not None else "a number such as 1.0"
