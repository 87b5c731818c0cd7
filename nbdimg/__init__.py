"""nbdimg: an NBD server for virtual disk images.

    async with nbdimg.serve(nbdimg.ServerConfig(exports=(nbdimg.ExportConfig("disk.img"),))) as service:
        print(*service.uris)

The public API is what stands in `__all__`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdimg.config import ExportConfig, ServerConfig
    from nbdimg.errors import (
        ConfigError,
        CorruptImage,
        ImageError,
        ImageFailed,
        ImageLocked,
        ListenError,
        NbdimgError,
        ProtocolError,
        RequestError,
        UnrecognizedFormat,
        UnsupportedFeature,
    )
    from nbdimg.formats import create_image, open_image
    from nbdimg.limits import Limits
    from nbdimg.server.service import Service
    from nbdimg.server.service import serving as serve
    from nbdimg.uri import NbdUri

    __version__: str

__all__ = [
    "ConfigError",
    "CorruptImage",
    "ExportConfig",
    "ImageError",
    "ImageFailed",
    "ImageLocked",
    "Limits",
    "ListenError",
    "NbdUri",
    "NbdimgError",
    "ProtocolError",
    "RequestError",
    "ServerConfig",
    "Service",
    "UnrecognizedFormat",
    "UnsupportedFeature",
    "__version__",
    "create_image",
    "open_image",
    "serve",
]

_HOMES = ("errors", "config", "limits", "uri", "formats", "server.service")
_OWN_NAMES = {"serve": "serving"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What is public is imported when it is first asked for, and then stays: `nbdimg healthcheck`, which probes run
        every few seconds, takes a tenth of the time that all of it would take.
        """
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = import_module("nbdimg.version").own_version() if name == "__version__" else _found(name)
        globals()[name] = value
        return value


def _found(name: str) -> object:
    modules = (import_module(f"nbdimg.{home}") for home in _HOMES)
    own_name = _OWN_NAMES.get(name, name)
    return next(getattr(module, own_name) for module in modules if hasattr(module, own_name))
