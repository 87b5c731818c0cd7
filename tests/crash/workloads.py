"""What guests do while an image is crashed, whatever its format."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from nbdimg.formats import resize_image
from nbdimg.image.image import Image
from tests.support.crash import SECTOR, Client, ExportTarget, requests

KiB = 1024

Workload = Callable[[Client, random.Random], Awaitable[None]]


def clients(count: int, requests_each: int, length_max: int, *, flushes: float = 0.12) -> Workload:
    """`count` connections at once, each with so many requests of at most `length_max` bytes (see `requests`)."""

    async def workload(client: Client, rng: random.Random) -> None:
        each = [random.Random(rng.random()) for _ in range(count)]
        await asyncio.gather(
            *(requests(client, own, requests_each, length_max=length_max, flushes=flushes) for own in each)
        )

    return workload


three_clients = clients(3, 15, 8 * KiB)


def discard_and_reuse(unit: int, rounds: int) -> Workload:
    """Whole units are trimmed, or zeroed, and others written where there was nothing: what one gives up, the next
    wants. Half of the time a flush comes between, or runs beside the writes.
    """

    async def workload(client: Client, rng: random.Random) -> None:
        count = client.size // unit
        for _ in range(rounds):
            units = rng.sample(range(count), min(count, 6))
            gone, new = units[:3], units[3:]
            for index in gone:
                give_up = client.trim if rng.random() < 0.7 else client.zero
                await give_up(index * unit, unit)
            if rng.random() < 0.5:
                await client.flush()
            writes = [client.write(index * unit, client.pattern(index * unit, unit)) for index in new]
            await asyncio.gather(*writes, *([client.flush()] if rng.random() < 0.5 else []))

    return workload


some = clients(2, 5, 8 * KiB)
"""Requests before and after a change."""


# Changes of tables, between requests


def image_of(client: Client) -> Image:
    assert isinstance(client.target, ExportTarget)
    return client.target.image


async def change_alone(client: Client, change: Awaitable[object]) -> None:
    """A change of tables while the export stands still, as a running server makes it."""
    assert isinstance(client.target, ExportTarget)
    async with client.target.export.standstill():
        await change


async def give_size(client: Client, size: int) -> None:
    image = image_of(client)
    await client.resize(size, lambda: change_alone(client, resize_image(image, size, may_shrink=True)))


def sizes(*parts: float, between: Workload = some) -> Workload:
    """The disk gets these shares of the size that it had at first, one after the other."""

    async def workload(client: Client, rng: random.Random) -> None:
        size = client.size
        await between(client, rng)
        for part in parts:
            await give_size(client, int(size * part) // SECTOR * SECTOR)
            await between(client, rng)

    return workload
