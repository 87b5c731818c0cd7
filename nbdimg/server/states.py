"""What is told of a running server's exports, clients, snapshots and bitmaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nbdimg.config import OverlayMode
from nbdimg.export.export import Export
from nbdimg.formats.qcow2.bitmaps import BitmapEntry
from nbdimg.formats.qcow2.snapshots import Snapshot
from nbdimg.server.connection import Connection
from nbdimg.wire.constants import TransmissionFlag


@dataclass(frozen=True, slots=True)
class ExportState:
    """One export as it is now. `format` is the driver's name, `path` the image's as it was configured.

    `origin`: "config" for what the file or the command line named, "live" for what `Control.add` added; a snapshot's is
    that of its image. `failure`: why the image takes no writes and no flush any more, or None. `is_hidden`: removed
    with mode "hide" or "drain", and kept open for clients that are still there.
    """

    name: str
    path: str
    format: str
    size: int
    """Bytes that clients see."""
    is_read_only: bool
    description: str
    is_snapshot: bool
    is_hidden: bool
    connections: int
    in_flight: int
    """Requests that have arrived and are not answered, of all connections."""
    origin: Literal["config", "live"]
    failure: str | None
    overlay: OverlayMode | None
    overlays: int
    """Overlays that are open."""
    overlay_names: list[str]
    """Of those that are kept, by what stands behind the `@`."""


@dataclass(frozen=True, slots=True)
class ClientState:
    """One connection as it is now. `export` None: it is still in its handshake; then `is_read_only` says nothing."""

    id: int
    """Unique as long as the process lives."""
    peer: str
    """As in the log: ADDRESS:PORT, or what is known of who is at the Unix socket."""
    export: str | None
    overlay: str | None
    """The kept overlay that it has, by what stands behind the `@`."""
    tls: str | None
    """The protocol's version as "TLSv1.3"; None: plain."""
    identities: frozenset[str]
    """Proven by TLS, as `AccessRule` writes them."""
    is_read_only: bool
    since: float
    """Seconds that it has been connected."""
    in_flight: int


@dataclass(frozen=True, slots=True)
class SnapshotState:
    """An internal snapshot. `created_s`: seconds since 1970 UTC. `export`: the name that it is exported under, or None
    where it is not (`SNAPSHOT_EXPORTS_MAX`).
    """

    id: str
    name: str
    size: int
    created_s: float
    export: str | None


@dataclass(frozen=True, slots=True)
class BitmapState:
    """A dirty bitmap. `is_consistent` False: it misses what a crash has lost, and can only be removed."""

    name: str
    granularity: int
    """Bytes that a bit stands for."""
    is_enabled: bool
    """Whether it follows changes."""
    is_consistent: bool


def export_state(export: Export, clients: Sequence[Connection], *, is_live: bool, is_hidden: bool) -> ExportState:
    image, overlays = export.image, export.overlays
    lent = [] if overlays is None else list(overlays.lent)
    return ExportState(
        name=export.name,
        path=image.path,
        format=image.driver.name,
        size=export.info.size,
        is_read_only=bool(export.info.flags & TransmissionFlag.READ_ONLY),
        description=export.info.description,
        is_snapshot=export.is_snapshot,
        is_hidden=is_hidden,
        connections=len(clients),
        in_flight=sum(each.in_flight for each in clients),
        origin="live" if is_live else "config",
        failure=image.failure,
        overlay=None if overlays is None else "kept" if overlays.is_kept else "per-client",
        overlays=len(lent),
        overlay_names=sorted(_overlay_name(export, each) for each in lent) if export.keeps_overlays else [],
    )


def _overlay_name(export: Export, overlay: Export) -> str:
    return overlay.name.removeprefix(f"{export.name}@")


def client_state(connection: Connection, now_s: float) -> ClientState:
    export, overlay = connection.export, connection.overlay
    name = None
    if export is not None and overlay is not None and export.keeps_overlays:
        name = _overlay_name(export, overlay)
    return ClientState(
        id=connection.number,
        peer=connection.peer,
        export=None if export is None else export.name,
        overlay=name,
        tls=connection.tls_version,
        identities=connection.identities,
        is_read_only=connection.is_read_only,
        since=now_s - connection.started_s,
        in_flight=connection.in_flight,
    )


def snapshot_state(snapshot: Snapshot, current_size: int, export: str | None) -> SnapshotState:
    """`current_size`: of the disk, which old snapshots rely on."""
    return SnapshotState(
        id=snapshot.id,
        name=snapshot.name,
        size=current_size if snapshot.disk_size is None else snapshot.disk_size,
        created_s=snapshot.seconds + snapshot.nanoseconds / 1e9,
        export=export,
    )


def bitmap_state(entry: BitmapEntry) -> BitmapState:
    return BitmapState(
        name=entry.name,
        granularity=entry.granularity,
        is_enabled=entry.is_enabled,
        is_consistent=entry.is_consistent,
    )
