r"""The parent locator: pairs of keys and values that say which file is the parent, and where it may be.

    parent_linkage        {GUID}: the parent's DataWriteGuid when the child was made
    parent_linkage2       {GUID}: a second one that is right too, while a merge is under way
    relative_path         ..\base\parent.vhdx, from the child's directory
    volume_path           \\?\Volume{GUID}\base\parent.vhdx
    absolute_win32_path   \\?\d:\base\parent.vhdx

They are tried in this order. A volume or a drive means nothing on this system: of those paths only the last component
counts, looked for in the child's own directory. When no file has one of these names, case is ignored.
Spec: [MS-VHDX] 2.6.2.6.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from nbdimg.errors import CorruptImage, ImageError, UnsupportedFeature, escaped
from nbdimg.formats.vhdx import structs as s

LINKAGE = "parent_linkage"
LINKAGE2 = "parent_linkage2"
RELATIVE_PATH = "relative_path"
VOLUME_PATH = "volume_path"
ABSOLUTE_PATH = "absolute_win32_path"
PATH_KEYS = (RELATIVE_PATH, VOLUME_PATH, ABSOLUTE_PATH)

_GUID = re.compile(r"(\{)?([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})(?(1)\})")
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class Locator:
    """`values` as stored; `offset` is where the item lies in the file."""

    values: dict[str, str]
    linkage: UUID
    linkage2: UUID | None = None
    offset: int = 0

    def to_bytes(self) -> bytes:
        """The item's content."""
        assert 0 < len(self.values) <= s.LOCATOR_PAIRS_MAX
        head = [s.LOCATOR.pack(s.VHDX_LOCATOR.bytes_le, 0, len(self.values))]
        start = s.LOCATOR.size + len(self.values) * s.LOCATOR_PAIR.size
        text = b""
        for key, value in self.values.items():
            first, second = key.encode("utf-16-le"), value.encode("utf-16-le")
            key_offset = start + len(text)
            head.append(s.LOCATOR_PAIR.pack(key_offset, key_offset + len(first), len(first), len(second)))
            text += first + second
        return b"".join(head) + text


def parent_locator(linkage: UUID, relative_path: str) -> Locator:
    """The locator of a new child; `/` is stored as `\\`."""
    return Locator({LINKAGE: f"{{{linkage}}}", RELATIVE_PATH: relative_path.replace("/", "\\")}, linkage)


def parse_locator(path: str, data: bytes, offset: int) -> Locator:
    """Parse an item's content, which lies at `offset` in the file.

    Raises: CorruptImage, UnsupportedFeature: naming field, what was found, what is allowed, and the offset.
    """
    return _Parser(path, data, offset).locator()


class _Parser:
    def __init__(self, path: str, data: bytes, offset: int) -> None:
        self._path = path
        self._data = data
        self._offset = offset

    def _refuse(self, what: str, found: object, allowed: str, place: int) -> CorruptImage:
        at = self._offset + place
        return CorruptImage(self._path, f"{what} is {found}, expected {allowed} (file offset {at})", at)

    def locator(self) -> Locator:
        if len(self._data) < s.LOCATOR.size:
            raise self._refuse("the parent locator's length", len(self._data), f"at least {s.LOCATOR.size}", 0)
        kind, _, count = s.LOCATOR.unpack_from(self._data)
        if kind != s.VHDX_LOCATOR.bytes_le:
            raise UnsupportedFeature(
                self._path,
                f"the parent locator's type is {UUID(bytes_le=kind)}, known is {s.VHDX_LOCATOR} (VHDX) "
                f"(file offset {self._offset})",
                self._offset,
            )
        pairs_max = min(s.LOCATOR_PAIRS_MAX, (len(self._data) - s.LOCATOR.size) // s.LOCATOR_PAIR.size)
        if not 1 <= count <= pairs_max:
            raise self._refuse("the parent locator's KeyValueCount", count, f"1 to {pairs_max}", 18)
        values: dict[str, str] = {}
        places: dict[str, int] = {}
        for index in range(count):
            place = s.LOCATOR.size + index * s.LOCATOR_PAIR.size
            key_offset, value_offset, key_length, value_length = s.LOCATOR_PAIR.unpack_from(self._data, place)
            key = self._text("key", key_offset, key_length, place, place + 8)
            if key in values:
                raise self._refuse(f"the parent locator's key {escaped(key)}", "there twice", "there once", place)
            values[key] = self._text("value", value_offset, value_length, place + 4, place + 10)
            places[key] = value_offset
        if LINKAGE not in values:
            raise self._refuse("parent_linkage", "missing", "in the parent locator", 0)
        linkage2 = self._guid(LINKAGE2, values, places) if LINKAGE2 in values else None
        return Locator(values, self._guid(LINKAGE, values, places), linkage2, self._offset)

    def _text(self, what: str, offset: int, length: int, offset_place: int, length_place: int) -> str:
        name = f"the parent locator's {what}"
        if length == 0 or length % 2:
            raise self._refuse(f"the length of {name}", length, "even and more than 0", length_place)
        if not s.LOCATOR.size <= offset <= len(self._data) - length:
            allowed = f"{s.LOCATOR.size} to {len(self._data) - length}, within the item"
            raise self._refuse(f"the offset of {name}", offset, allowed, offset_place)
        data = self._data[offset : offset + length]
        try:
            text = data.decode("utf-16-le")
        except UnicodeDecodeError:
            raise self._refuse(name, data[:40].hex(), "UTF-16", offset) from None
        if "\0" in text:
            raise self._refuse(name, escaped(text), "without NUL", offset)
        return text

    def _guid(self, key: str, values: dict[str, str], places: dict[str, int]) -> UUID:
        match = _GUID.fullmatch(values[key])
        if match is None:
            raise self._refuse(key, escaped(values[key]), "a GUID in braces", places[key])
        return UUID(match[2])


def candidates(locator: Locator) -> list[str]:
    """Names under which the parent may be found, best first: relative to the child's directory or, when a tool of this
    system wrote them, absolute. Empty: the locator holds no path.

    `..\\a\\p.vhdx` gives `../a/p.vhdx`, then `p.vhdx`; `\\\\?\\D:\\a\\p.vhdx` gives `p.vhdx`.
    """
    names = (name for key in PATH_KEYS if key in locator.values for name in _names(key, locator.values[key]))
    return list(dict.fromkeys(names))


def _names(key: str, value: str) -> Iterator[str]:
    way = value.replace("\\", "/")
    basename = way.rpartition("/")[2]
    if basename in ("", ".", ".."):
        return
    if way.startswith("/"):
        if not way.startswith("//") and key != VOLUME_PATH:
            yield way
    elif key == RELATIVE_PATH and not _DRIVE.match(way):
        while way.startswith("./"):
            way = way[2:].lstrip("/")
        yield _plain(way)
    yield _plain(basename)


def _plain(name: str) -> str:
    """A colon before the first slash would be taken for a protocol."""
    return f"./{name}" if ":" in name.partition("/")[0] else name


def verify_linkage(path: str, locator: Locator, parent_path: str, data_write_guid: UUID) -> None:
    """Check that a parent is the one that the child at `path` was made from, and unchanged since.

    Raises: ImageError: it is not; the message names the GUIDs.
    """
    if data_write_guid in (locator.linkage, locator.linkage2):
        return
    second = f" or {locator.linkage2} (parent_linkage2)" if locator.linkage2 else ""
    raise ImageError(
        path,
        f"DataWriteGuid of the parent {parent_path} is {data_write_guid}, expected {locator.linkage} (parent_linkage)"
        f"{second}: it was changed after this child was made, or is another file (file offset {locator.offset})",
        locator.offset,
    )
