"""Transformer Engine: whether it is here and loads. megatron-core imports it wherever it is installed."""

import functools
import importlib.util

from inplace_ttt.config import UserError, first_line
from inplace_ttt.packages import version

PACKAGE = "transformer-engine"


@functools.cache
def unavailable_reason() -> str | None:
    """Return what keeps Transformer Engine from being used, or None.

    Raises UserError where megatron-core would fail too: it goes on without the package and without a module of it, but
    not where a library below them is missing or does not fit.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "not installed"
    found = version(PACKAGE) or "without a version"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{found} does not load: {first_line(error)[:120]}"
    except Exception as error:
        raise UserError(
            f"Transformer Engine {found} is installed and does not load ({first_line(error)[:200]}), so "
            f"megatron-core does not load either: mend it, or take it away (pip uninstall transformer-engine)"
        ) from error
    return None
