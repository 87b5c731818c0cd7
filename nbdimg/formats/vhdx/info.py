"""What an image says of itself: nothing is locked or changed, no other file is opened.

A log that is to be replayed is replayed in memory, and one that cannot be is ignored, so that a damaged file still says
what it can. Somebody may be writing to the image: then parts may not fit each other, or be found malformed.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.check import log_state
from nbdimg.formats.vhdx.header import Headers, creator_of, load_headers
from nbdimg.formats.vhdx.metadata import Item, Metadata
from nbdimg.formats.vhdx.parts import load_parts
from nbdimg.formats.vhdx.region import Regions
from nbdimg.formats.vhdx.replay import open_replayed
from nbdimg.storage.file import BlockFile, read


@dataclass(frozen=True, slots=True)
class Info:
    """`log` says what there is to replay, `log_problem` why it cannot be."""

    creator: str
    headers: Headers
    log: str
    log_problem: str | None
    regions: Regions
    metadata: Metadata

    @property
    def subformat(self) -> str:
        if self.metadata.has_parent:
            return "differencing"
        return "fixed" if self.metadata.leaves_blocks_allocated else "dynamic"

    @property
    def user_items(self) -> list[Item]:
        return [item for item in self.metadata.items if item.is_user]


async def describe(file: BlockFile) -> Info:
    """Raises: CorruptImage, UnsupportedFeature: naming what was found, what is allowed, and the offset. OSError."""
    headers = await load_headers(file)
    log, problem = await log_state(file, headers)
    parts = await load_parts(await open_replayed(file, headers.current, ignore_log=problem is not None), headers)
    return Info(
        creator=creator_of(await read(file, 0, len(s.FILE_SIGNATURE) + s.CREATOR_SIZE)),
        headers=headers,
        log=log,
        log_problem=None if problem is None else str(problem),
        regions=parts.regions,
        metadata=parts.metadata,
    )
