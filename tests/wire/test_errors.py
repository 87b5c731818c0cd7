"""The table between host error numbers and NBD errors, and what a client is told.

    EPERM 1, EIO 5, ENOMEM 12, EINVAL 22, ENOSPC 28, EOVERFLOW 75, ENOTSUP 95, ESHUTDOWN 108

Spec: proto.md "Error values".
"""

from __future__ import annotations

import errno
import os

import pytest

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
    escaped,
)
from nbdimg.wire.constants import NbdError
from nbdimg.wire.errors import describe, nbd_error

ON_THE_WIRE = {1, 5, 12, 22, 28, 75, 95, 108}


@pytest.mark.parametrize(
    ("host", "wire"),
    [
        (errno.EPERM, 1),
        (errno.EACCES, 1),
        (errno.EROFS, 1),
        (errno.EIO, 5),
        (errno.ENOMEM, 12),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EOVERFLOW, 75),
        (errno.EOPNOTSUPP, 95),
        (errno.ENOTSUP, 95),
        (errno.ESHUTDOWN, 108),
    ],
)
def test_host_error_becomes_the_nbd_error_of_the_same_meaning(host: int, wire: int) -> None:
    assert int(nbd_error(host)) == wire


@pytest.mark.parametrize("host", [errno.EBADF, errno.ENXIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, 0, -1, 10**9])
def test_host_error_that_the_protocol_has_no_number_for_is_eio(host: int) -> None:
    assert int(nbd_error(host)) == 5


def test_no_host_error_is_eio() -> None:
    assert int(nbd_error(None)) == 5


def test_every_host_error_becomes_a_number_of_the_specification() -> None:
    assert {int(nbd_error(host)) for host in errno.errorcode} == ON_THE_WIRE
    assert {int(error) for error in NbdError} == ON_THE_WIRE


# What a client is told


def test_describe_request_error_keeps_its_sentence_and_offset() -> None:
    error = RequestError(errno.ENOSPC, "beyond the end at 512", 512)
    assert describe(error) == (NbdError.ENOSPC, "beyond the end at 512", 512)


def test_describe_request_error_keeps_offset_zero_and_no_offset_apart() -> None:
    assert describe(RequestError(errno.EIO, "x", 0))[2] == 0
    assert describe(RequestError(errno.EIO, "x"))[2] is None


def test_describe_host_error_tells_its_text_and_no_path() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/srv/images/customer.img")
    assert describe(error) == (NbdError.ENOSPC, "No space left on device", None)


def test_describe_host_error_of_two_files_tells_neither() -> None:
    error = OSError(errno.EIO, "Input/output error", "/srv/a.img", None, "/srv/b.img")
    assert "/srv" not in describe(error)[1]


@pytest.mark.parametrize("error", [OSError(), OSError("no number")], ids=["empty", "text"])
def test_describe_host_error_without_a_number_is_eio_with_a_sentence(error: OSError) -> None:
    assert describe(error) == (NbdError.EIO, "I/O error", None)


@pytest.mark.parametrize("kind", [ImageError, UnrecognizedFormat, UnsupportedFeature, CorruptImage, ImageFailed])
def test_describe_image_error_is_eio_without_the_path(kind: type[ImageError]) -> None:
    number, text, offset = describe(kind("/srv/images/customer.img", "refcount block is damaged", 65536))
    assert (number, text, offset) == (NbdError.EIO, "refcount block is damaged", None)


@pytest.mark.parametrize("error", [NbdimgError("odd"), ConfigError("odd"), ProtocolError("odd"), ListenError("odd")])
def test_describe_any_other_error_is_eio(error: NbdimgError) -> None:
    assert describe(error) == (NbdError.EIO, "odd", None)


# The exceptions themselves


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (ConfigError, NbdimgError),
        (ListenError, NbdimgError),
        (ProtocolError, NbdimgError),
        (RequestError, NbdimgError),
        (ImageError, NbdimgError),
        (UnrecognizedFormat, ImageError),
        (UnsupportedFeature, ImageError),
        (CorruptImage, ImageError),
        (ImageLocked, ImageError),
        (ImageFailed, ImageError),
    ],
)
def test_exception_tree_is_the_one_drawn(kind: type[Exception], base: type[Exception]) -> None:
    assert kind.__bases__ == (base,)


def test_image_error_names_path_and_place() -> None:
    error = CorruptImage("/srv/disk.img", "L2 entry beyond the file", 4096)
    assert str(error) == "/srv/disk.img: L2 entry beyond the file"
    assert (error.path, error.offset) == ("/srv/disk.img", 4096)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("disk", "'disk'"),
        ("a\nb\x1b[2J\0", r"'a\nb\x1b[2J\x00'"),
        ("\u202e", r"'\u202e'"),
        (b"disk\xff", r"'disk\\xff'"),
        ("x" * 80, "'" + "x" * 80 + "'"),
        ("x" * 81, "'" + "x" * 80 + "'…"),
        (b"x" * 100_000, "'" + "x" * 80 + "'…"),
    ],
)
def test_escaped_input_is_printable_and_short(text: str | bytes, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped(text).isprintable()
