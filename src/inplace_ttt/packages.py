"""Find the versions of installed packages."""

import importlib.metadata


def version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed (such as a source tree on PYTHONPATH)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
