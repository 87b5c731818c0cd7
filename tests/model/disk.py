"""Random changes of an image, and the bytes that it should hold by them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from nbdimg.image.image import Image
from tests.support.reading import bytes_of


@dataclass
class Disk:
    """The image `disk.FORMAT` in a directory, and what it should hold."""

    directory: Path
    seed: int
    model: bytearray
    lengths: tuple[int, ...]
    """Of changes, in bytes."""
    weights: tuple[int, int, int, int, int]
    """Of writes, zeroes, trims, reads and flushes."""
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = random.Random(self.seed)

    def sample(self, size: int, unit: int) -> bytes:
        """Random, constant and empty runs, of `unit` bytes each."""
        generator, parts = self.generator, []
        for _ in range(0, size, unit):
            kind = generator.random()
            filler = bytes([generator.randrange(256)]) * unit
            parts.append(bytes(unit) if kind < 0.4 else generator.randbytes(unit) if kind < 0.6 else filler)
        return b"".join(parts)[:size]

    def fail(self, what: str) -> str:
        return f"{what}; seed {self.seed}; last steps: {self.log[-6:]}"

    def range(self, unit: int) -> tuple[int, int]:
        """Offset and length of a change; some begin at a multiple of `unit`, half of them are of whole sectors."""
        generator, size = self.generator, len(self.model)
        offset = generator.randrange(size)
        if generator.random() < 0.4:
            offset -= offset % unit
        length = min(generator.choice(self.lengths), size - offset)
        if generator.random() < 0.5:
            offset &= ~511
            length = min((length + 511) & ~511, size - offset)
        return offset, length

    async def step(self, image: Image, offset: int, length: int) -> None:
        generator, model = self.generator, self.model
        kind = generator.choices(("write", "zero", "trim", "read", "flush"), self.weights)[0]
        self.log.append(f"{kind} {offset}+{length}")
        if kind == "write":
            data = generator.randbytes(length)
            is_fast = generator.random() < 0.7
            if not (is_fast and image.try_write(offset, memoryview(data))):
                await image.write(offset, data)
            model[offset : offset + length] = data
        elif kind == "zero":
            await image.zero(offset, length, may_unmap=generator.random() < 0.5, is_fast_only=False)
            model[offset : offset + length] = bytes(length)
        elif kind == "trim":
            await image.trim(offset, length)
            self._trimmed(offset, await bytes_of(image, offset, length))
        elif kind == "flush":
            await image.flush()
        await self.check(image, offset, length, "read")

    async def check(self, image: Image, offset: int, length: int, when: str) -> None:
        is_same = await bytes_of(image, offset, length) == self.model[offset : offset + length]
        assert is_same, self.fail(when)

    def _trimmed(self, offset: int, found: bytes) -> None:
        """Each 512 bytes are as they were, or zeroes where they changed."""
        for start in range(0, len(found), 512):
            new = found[start : start + 512]
            old = self.model[offset + start : offset + start + len(new)]
            is_kept = old == new or all(after in (before, 0) for before, after in zip(old, new, strict=True))
            assert is_kept, self.fail(f"trim changed {offset + start}")
        self.model[offset : offset + len(found)] = found
