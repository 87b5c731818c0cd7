"""Passphrases from files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from nbdimg.errors import ConfigError
from nbdimg.formats import keys
from nbdimg.formats.keys import read_key_file


@pytest.mark.parametrize(
    ("content", "passphrase"),
    [
        (b"secret", b"secret"),
        (b"secret\n", b"secret"),
        (b"secret\n\n", b"secret\n"),
        (b" s\r\n", b" s\r"),
        (b"\xff\0\n", b"\xff\0"),
    ],
)
def test_key_file_loses_one_newline_and_nothing_else(tmp_path: Path, content: bytes, passphrase: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    assert read_key_file(tmp_path / "key") == passphrase


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\n", "is empty"), (bytes(65537), "has more than 65536 bytes")],
)
def test_key_file_without_a_passphrase_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_key_file(tmp_path / "key")


def test_key_file_that_is_a_fifo_is_read_to_its_end_and_not_waited_for_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for piece in (b"se", b"cret\n"):
                file.write(piece)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_key_file(path) == b"secret"
    writer.join()
    monkeypatch.setattr(keys, "KEY_FILE_PATIENCE_S", 0.05)
    with pytest.raises(ConfigError, match="it is a FIFO, and its writer does not come to an end"):
        read_key_file(path)
    with path.open("r+b", buffering=0) as held:
        held.write(b"secret")
        with pytest.raises(ConfigError, match="it is a FIFO"):
            read_key_file(path)
