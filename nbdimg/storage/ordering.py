"""Order on disk as data: a plan is stages of writes with a barrier behind each.

Planning is pure and lives in the formats; running is the same for all. A plan holds bytes, not tables: what changes
while it runs is for the next plan.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from nbdimg.storage.file import BlockFile


@dataclass(frozen=True, slots=True)
class Write:
    """`data` goes to `offset` bytes into the plan's file."""

    offset: int
    data: bytes


Stage = tuple[Write, ...]
"""Writes in any order among themselves; all are durable before the next stage begins."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`stages` for one file. An empty stage is a barrier alone: it makes the data written before it durable."""

    file: BlockFile
    stages: tuple[Stage, ...]


async def run(plan: Plan) -> None:
    """Carry out a plan. Raises: OSError, when no write is under way any more: from that stage on nothing is durable."""
    for stage in plan.stages:
        if stage:
            writes = (plan.file.pwrite(write.offset, write.data) for write in stage)
            for outcome in await asyncio.gather(*writes, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
        await plan.file.fdatasync()
