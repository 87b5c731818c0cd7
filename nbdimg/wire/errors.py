"""The only table between host error numbers and NBD errors. Spec: proto.md "Error values"."""

from __future__ import annotations

import errno

from nbdimg.errors import ImageError, NbdimgError, RequestError
from nbdimg.wire.constants import NbdError

_NBD_ERRORS = {
    errno.EPERM: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.EIO: NbdError.EIO,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EOVERFLOW: NbdError.EOVERFLOW,
    errno.EOPNOTSUPP: NbdError.ENOTSUP,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def nbd_error(number: int | None) -> NbdError:
    """The NBD error for a host errno. What the protocol has no number for is an I/O error, not the client's mistake."""
    return _NBD_ERRORS.get(number or 0, NbdError.EIO)


def describe(error: OSError | NbdimgError) -> tuple[NbdError, str, int | None]:
    """The NBD error, the sentence for the client, and the failing offset where one is known.

    Paths stay on the server: a client learns what failed, not where the file lies.
    """
    if isinstance(error, RequestError):
        return nbd_error(error.errno), str(error), error.offset
    if isinstance(error, OSError):
        return nbd_error(error.errno), error.strerror or "I/O error", None
    if isinstance(error, ImageError):
        return NbdError.EIO, str(error).removeprefix(f"{error.path}: "), None
    return NbdError.EIO, str(error), None
