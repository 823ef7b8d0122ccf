"""Versions of installed packages."""

import importlib.metadata


def version(package: str) -> str | None:
    """Return the version of a package; None where it is not installed, as a source tree on PYTHONPATH is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
