"""Check for Transformer Engine, which megatron-core imports if it is installed."""

import functools
import importlib.util
import logging
import warnings

from inplace_ttt.config import UserError, first_line
from inplace_ttt.packages import version

PACKAGE = "transformer-engine"


@functools.cache
def unavailable_reason() -> str | None:
    """Return the reason why Transformer Engine cannot be used, or None.

    Raises UserError if megatron-core cannot be imported either. It tolerates a missing package or module of Transformer
    Engine, but not a missing or incompatible shared library.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "not installed"
    found = version(PACKAGE) or "without a version"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{found} cannot be imported: {first_line(error)[:120]}"
    except Exception as error:
        raise UserError(
            f"Transformer Engine {found} is installed but cannot be imported ({first_line(error)[:200]}), so "
            f"megatron-core cannot be imported either: repair it, or uninstall it (pip uninstall transformer-engine)"
        ) from error
    return None


def before_megatron_core() -> None:
    """Prepare the import of megatron-core; call this before it.

    Without Transformer Engine or apex, megatron-core prints warnings about missing packages, which
    ``launch/preflight.py`` reports: silence them, by their source. Raises UserError if a broken install of Transformer
    Engine would make the import fail.
    """
    for module in (r"megatron\.core", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns if there is no CUDA compiler
    logging.getLogger("megatron").setLevel(logging.ERROR)  # deprecation warnings about the container and our settings
    unavailable_reason()
