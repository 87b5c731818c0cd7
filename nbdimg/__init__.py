"""nbdimg: an NBD server for virtual disk images.

    async with nbdimg.serve(nbdimg.ServerConfig(exports=(nbdimg.ExportConfig("disk.img"),))) as service:
        print(*service.uris)

The public API is what stands in `__all__`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

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

try:
    __version__ = version("nbdimg")
except PackageNotFoundError:
    __version__ = "0+unknown"

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
