"""What images may open besides themselves.

`ConfinedGate` is for one image and the chain below it: regular files beneath the top image's own directory, or beneath
directories that the operator names. `DenyGate` is for images of unknown origin, and where nothing beyond the image is
of interest.

    name            meaning
    base.qcow2      relative to the directory of the image that holds the name, beneath whichever root holds that
    /images/base    only if a root holds it by name; then opened beneath that root
    nbd://host/x    a colon before the first slash is a protocol to QEMU; refused, so no image makes the server dial out

The kernel keeps every open beneath its root (storage/beneath.py); what is decided by the name here only chooses the
root. A `..` that leads from one root into another is followed by name alone, without regard to symlinks.

A file that the operator names for an image is allowed as the image itself is, wherever it lies. Its directory is not:
what that file refers to lies beneath the roots like everything else.
"""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from nbdimg.errors import ImageError, ImageLocked, escaped
from nbdimg.image.gate import Reference
from nbdimg.storage.beneath import Root
from nbdimg.storage.file import BlockFile
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile
from nbdimg.storage.workers import workers

CHAIN_DEPTH_MAX = 16
"""Files that one image may open, all kinds together: real chains are shorter, and each file costs a descriptor."""

SYSTEM_DIRECTORIES = ("/dev", "/proc", "/sys")
"""Nothing in them is an image, though the kernel calls some of it regular files. A root inside one is the operator's
own choice (/dev/shm)."""


def _message(reference: Reference, found: str) -> str:
    if reference.is_given:
        return f"{reference.field} {escaped(reference.name)} {found}"
    return f"{reference.field} {escaped(reference.name)} {found} (offset {reference.offset})"


def _refusal(reference: Reference, found: str) -> ImageError:
    return ImageError(reference.owner_path, _message(reference, found), reference.offset)


class DenyGate:
    """Opens nothing."""

    async def open(self, reference: Reference) -> BlockFile:
        """Raises: ImageError."""
        raise _refusal(reference, "is another file, allowed is none")


class ConfinedGate:
    """The gate of one image and of everything that it leads to; closed when the chain is open.

    `image` is the top image, open. `roots` are directories that are allowed besides its own. `lock` as for the top
    image: backing files are locked as readers, and a file that is opened for writing as an image is.

    The constructor follows paths, and so may wait. Raises: OSError: from it, when a root cannot be opened.
    """

    def __init__(
        self,
        image: PosixFile,
        *,
        roots: Iterable[str | os.PathLike[str]] = (),
        depth_max: int = CHAIN_DEPTH_MAX,
        lock: bool = True,
    ) -> None:
        self._depth_max = depth_max
        self._lock = lock
        self._identities = {image.identity}
        self._roots: list[Root] = []
        try:
            for directory in (os.path.dirname(image.path) or ".", *roots):
                self._roots.append(Root(directory))
        except OSError:
            self.close()
            raise
        self._directories = {image.path: self._roots[0].path}
        """Where a relative name starts, by the path of the file that holds it."""
        self._roots.sort(key=lambda root: len(root.path))
        """A root before those within it: whatever may be opened beneath the inner one may be beneath the outer."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the roots. Files that were opened stay open."""
        for root in self._roots:
            root.close()

    async def open(self, reference: Reference) -> PosixFile:
        """See `OpenGate.open`."""
        opened = len(self._identities) - 1
        if opened >= self._depth_max:
            raise _refusal(reference, f"is file {opened + 1} of this image's chain, allowed are {self._depth_max}")
        return await workers().run(self._open, reference)

    def _open(self, reference: Reference) -> PosixFile:
        file = self._open_given(reference) if reference.is_given else self._open_named(reference)
        try:
            self._admit(reference, file)
            directory = _directory_of(file) if reference.is_given else os.path.dirname(file.path)
        except BaseException:
            os.close(file.descriptor)
            raise
        self._identities.add(file.identity)
        self._directories[file.path] = directory
        return file

    def _open_given(self, reference: Reference) -> PosixFile:
        try:
            return PosixFile(reference.name, writable=reference.is_writable)
        except OSError as error:
            raise _refusal(reference, f"cannot be opened: {error.strerror}") from error

    def _open_named(self, reference: Reference) -> PosixFile:
        self._check_name(reference)
        root, path = self._locate(reference)
        try:
            try:
                return root.open(path, writable=reference.is_writable)
            except FileNotFoundError:
                other = _but_for_case(root, path) if reference.ignores_case else None
                if other is None:
                    raise
                return root.open(other, writable=reference.is_writable)
        except (OSError, UnicodeEncodeError) as error:
            raise self._refusal(reference, _failure(error)) from error

    def _check_name(self, reference: Reference) -> None:
        name = reference.name
        if not name:
            raise self._refusal(reference, "is empty")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise self._refusal(reference, "has control characters or is not UTF-8")
        protocol, colon, _ = name.partition("/")[0].partition(":")
        if colon:
            found = f"has the protocol {escaped(protocol)} (a file of that name is written with './' before it)"
            raise self._refusal(reference, found)

    def _locate(self, reference: Reference) -> tuple[Root, str]:
        """The root that holds what is meant, and the way down from it."""
        directory = self._directories.get(reference.owner_path)
        if directory is None:
            raise self._refusal(reference, "is named by a file that is not of this chain")
        if reference.name.startswith("/"):
            target = "/" + reference.name.lstrip("/")
        else:
            target = os.path.join(directory, reference.name)
        plain = os.path.normpath(target)
        root, path = next(self._candidates(target, plain), (None, ""))
        for system in SYSTEM_DIRECTORIES:
            if _below(plain, system) is not None and (root is None or _below(root.path, system) is None):
                raise self._refusal(reference, f"lies in {system}")
        if root is None:
            raise self._refusal(reference, "leads outside")
        return root, path

    def _candidates(self, target: str, plain: str) -> Iterator[tuple[Root, str]]:
        """Roots that hold the absolute path `target`, best first, with the path from there.

        The path as it was written goes to the kernel wherever it can; `plain` is the same path with its `..` resolved
        by name.
        """
        for form in (target, plain):
            for root in self._roots:
                for name in (root.path, root.alias):
                    path = _below(form, name)
                    if path is not None and os.path.normpath(path).partition("/")[0] != "..":
                        yield root, path

    def _admit(self, reference: Reference, file: PosixFile) -> None:
        if file.identity in self._identities:
            raise _refusal(reference, "is a file that this chain holds already, allowed is each one once")
        if self._lock:
            try:
                lock_image(file.descriptor, file.path, writable=reference.is_writable)
            except ImageLocked as error:
                raise ImageLocked(
                    reference.owner_path, _message(reference, f"is in use: {error}"), reference.offset
                ) from error

    def _refusal(self, reference: Reference, found: str) -> ImageError:
        places = " or ".join(dict.fromkeys(root.path for root in self._roots))
        return _refusal(
            reference, f"{found}, allowed is a regular file beneath {places} or a directory of --allow-references"
        )


def _below(path: str, directory: str) -> str | None:
    """The way from `directory` down to `path`, both absolute, by name; None if it is not below."""
    prefix = directory.rstrip("/") + "/"
    return path[len(prefix) :].lstrip("/") if path.startswith(prefix) else None


def _directory_of(file: PosixFile) -> str:
    return os.path.dirname(os.path.realpath(file.path))


def _but_for_case(root: Root, path: str) -> str | None:
    """The path of a file beside `path` whose name is the same but for case: of several the first by code point.

    Raises: OSError: there is no such directory, or it is outside.
    """
    directory, name = os.path.split(path)
    folded = name.casefold()
    found = min((each for each in root.names(directory) if each.casefold() == folded), default=None)
    return None if found is None else os.path.join(directory, found)


def _failure(error: OSError | UnicodeEncodeError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"has characters that a file name in {error.encoding} cannot have"
    if error.errno == errno.EXDEV:
        return "leads outside"
    if error.errno == errno.ELOOP:
        return "leads through a link that is not followed"
    if error.errno == errno.ENXIO:
        return "cannot be opened: it is a socket or a device that does not exist"
    return f"cannot be opened: {error.strerror}"
