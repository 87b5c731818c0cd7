"""Whose passphrase is whose, along the chain of an image.

An image with a key of its own is named by a path, as every other file is, and what counts is the file to which that
leads: not the name that the image above has for it, which is that image's content and may come from anybody.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from nbdimg.errors import ConfigError


class Keys:
    """Passphrases for the encrypted images of one chain: `default`, but for those to which a name of `own` leads.

    Raises: ConfigError: two names lead to one file.
    """

    def __init__(self, default: bytes | None = None, own: Mapping[str, bytes] | None = None) -> None:
        self._default = default
        self._own: dict[str, bytes] = {}
        self._names: dict[str, str] = {}
        self._encrypted: dict[str, str] = {}
        """As the names, by real path: how the chain calls the images whose keys were asked for."""
        for name, key in (own or {}).items():
            real = os.path.realpath(name)
            if real in self._own:
                raise ConfigError(
                    f"keys are given for {self._names[real]} and {name}, which are one file, expected one key"
                )
            self._own[real], self._names[real] = key, name

    def of(self, path: str) -> bytes | None:
        """The passphrase of the encrypted image at `path`; None: none was given."""
        real = os.path.realpath(path)
        self._encrypted[real] = path
        return self._own.get(real, self._default)

    def check_asked_for(self, path: str) -> None:
        """Of the image at `path`, whose chain is open: whether that has each encrypted image that has a key of its own.

        Raises: ConfigError: it has not.
        """
        for real, name in self._names.items():
            if real not in self._encrypted:
                found = " or ".join(self._encrypted.values())
                expected = f"expected {found}" if found else "there is none"
                raise ConfigError(
                    f"{path}: a key is given for {name}, which is no encrypted image of its chain, {expected}"
                )
