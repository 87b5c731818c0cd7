"""What a guest reads of an image."""

from __future__ import annotations

from nbdimg.image.image import Image


async def bytes_of(image: Image, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(b"\xaa" * length))
    for segment in await image.read(offset, view):
        if segment.is_hole:
            start = segment.offset - offset
            view[start : start + segment.length] = bytes(segment.length)
    return bytes(view)


async def read_all(image: Image) -> bytes:
    return await bytes_of(image, 0, image.size)
