"""Passphrases: read from files, and whose is whose along the chain of an image.

An image with a key of its own is named by a path, as every other file is, and what counts is the file to which that
leads: not the name that the image above has for it, which is that image's content and may come from anybody.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from nbdimg.errors import ConfigError
from nbdimg.storage.short import read_short
from nbdimg.units import KiB

KEY_FILE_SIZE_MAX = 64 * KiB
"""No passphrase is longer; it keeps a device or an image named by mistake out of memory."""

KEY_FILE_PATIENCE_S = 10.0
"""For what a shell's `<(program)` writes."""


def read_key_file(path: str | os.PathLike[str]) -> bytes:
    """The passphrase in a file: its bytes, without the one newline that an editor or `echo` puts at the end.

    Nothing else is stripped, and no mode of the file is refused: secrets of container systems are often readable by
    a group. (QEMU takes a secret's file as it is, newline included.)

    Raises:
        ConfigError: the file cannot be read, is empty, or larger than KEY_FILE_SIZE_MAX; it is a FIFO that nobody
            has written to within KEY_FILE_PATIENCE_S.
    """
    try:
        content = read_short(path, KEY_FILE_SIZE_MAX, KEY_FILE_PATIENCE_S)
    except OSError as error:
        raise ConfigError(f"key file {os.fspath(path)}: {error.strerror}") from None
    if len(content) > KEY_FILE_SIZE_MAX:
        raise ConfigError(f"key file {os.fspath(path)} has more than {KEY_FILE_SIZE_MAX} bytes")
    passphrase = content.removesuffix(b"\n")
    if not passphrase:
        raise ConfigError(f"key file {os.fspath(path)} is empty, expected a passphrase")
    return passphrase


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
