"""Which nbdimg this is."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def own_version() -> str:
    """As the package was installed; read from its files once."""
    try:
        return version("nbdimg")
    except PackageNotFoundError:
        return "0+unknown"
