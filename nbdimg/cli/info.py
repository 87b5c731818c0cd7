"""`nbdimg info`: what an image says of itself."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from nbdimg.cli.bitmap import described as described_bitmap
from nbdimg.cli.opened import opening
from nbdimg.cli.options import AllowReferences, AsJson, Format, Parent
from nbdimg.cli.output import print_json, shown, sized
from nbdimg.errors import ConfigError, UnsupportedFeature, escaped
from nbdimg.formats import DRIVERS, check_format, first_that_opens, probed_format
from nbdimg.formats.gate import ConfinedGate
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.info import Info, describe
from nbdimg.formats.qcow2.luks import LuksHeader
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.snapshots import Snapshot
from nbdimg.formats.qcow2.structs import Compression, Crypt
from nbdimg.formats.vhdx import info as vhdx
from nbdimg.formats.vhdx.open import parent_references
from nbdimg.image.gate import Reference
from nbdimg.server.loop import run_loop
from nbdimg.storage.posix import PosixFile

_BLOCK_SIZE = 512
"""Unit of st_blocks, whatever the file system's own."""


def info(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image; others may have it open.")],
    backing_chain: Annotated[
        bool, typer.Option("--backing-chain", help="Open the backing files too, and tell of each.")
    ] = False,
    format: Format = None,
    allow_references: AllowReferences = None,
    parent: Parent = None,
    as_json: AsJson = False,
) -> None:
    """Tell of an image what its header, snapshots and bitmaps say.

    Nothing is locked or changed, and no other file is opened but for --backing-chain.
    """
    check_format(format)
    if parent is not None and not backing_chain:
        raise ConfigError("--parent is of use only with --backing-chain: no other file is opened without")
    images = run_loop(_collect(image, format, backing_chain, tuple(allow_references or ()), parent))
    if as_json:
        print_json(images=images)
    else:
        print("\n\n".join("\n".join(_lines(each)) for each in images))


async def _collect(
    path: str, format: str | None, is_chain: bool, roots: tuple[str, ...], parent: str | None
) -> list[dict[str, Any]]:
    async with AsyncExitStack() as files:
        with opening(path):
            top = PosixFile(path, writable=False)
        files.push_async_callback(top.close)
        with opening(path):
            format = format or await probed_format(top)
        if not is_chain:
            return [(await _described(top, format))[0]]
        with ConfinedGate(top, roots=roots, lock=False) as gate:
            return [each async for each in _chain(gate, top, format, parent, files)]


async def _chain(
    gate: ConfinedGate, file: PosixFile, format: str, parent: str | None, files: AsyncExitStack
) -> AsyncIterator[dict[str, Any]]:
    while True:
        said, header = await _described(file, format)
        yield said
        locator = header.metadata.locator if isinstance(header, vhdx.Info) else None
        if parent is not None and locator is None:
            raise ConfigError(f"{file.path}: a parent is given, expected that of a differencing vhdx image")
        if locator is not None:
            file = await first_that_opens(parent_references(file.path, locator, parent), gate.open)
            parent = None
            files.push_async_callback(file.close)
            continue
        if isinstance(header, vhdx.Info) or header is None or header.backing_name is None:
            return
        offset = header.backing_name_offset
        if header.backing_format not in DRIVERS:
            found = "not given" if header.backing_format is None else escaped(header.backing_format)
            raise UnsupportedFeature(
                file.path,
                f"the format of backing file {escaped(header.backing_name)} is {found}, known are {', '.join(DRIVERS)}",
                offset,
            )
        format = header.backing_format
        file = await gate.open(Reference(file.path, "backing file", header.backing_name, offset, is_writable=False))
        files.push_async_callback(file.close)


async def _described(file: PosixFile, format: str) -> tuple[dict[str, Any], Header | vhdx.Info | None]:
    """Sizes in bytes. Raises: ImageError: it is malformed, or cannot be read."""
    with opening(file.path):
        return await _read(file, format)


async def _read(file: PosixFile, format: str) -> tuple[dict[str, Any], Header | vhdx.Info | None]:
    common = {
        "path": file.path,
        "format": format,
        "size": file.size,
        "size_on_disk": os.fstat(file.descriptor).st_blocks * _BLOCK_SIZE,
        "file_size": file.size,
    }
    if format == "vhdx":
        said = await vhdx.describe(file)
        return {**common, "size": said.metadata.virtual_size, **_vhdx_fields(said)}, said
    if format != "qcow2":
        return common, None
    header = await read_header(file)
    found = await describe(file, header)
    return {**common, "size": header.size, **_fields(found)}, header


def _fields(found: Info) -> dict[str, Any]:
    header = found.header
    return {
        "compat": header.version,
        "cluster_size": header.cluster_size,
        "refcount_bits": header.refcount_bits,
        "extended_l2": header.has_subclusters,
        "compression_type": Compression(header.compression).name.lower(),
        "lazy_refcounts": header.has_lazy_refcounts,
        "dirty": header.is_dirty,
        "corrupt": header.is_corrupt,
        "backing": header.backing_name,
        "backing_format": header.backing_format,
        "data_file": header.data_file_name if header.has_data_file else None,
        "data_file_raw": header.is_data_file_raw,
        "encryption": _encryption(header, found.luks),
        "unknown_features": found.unknown_features,
        "snapshots": [_snapshot(each, header.size) for each in found.snapshots],
        "bitmaps": [described_bitmap(each) for each in found.bitmaps],
        "stale_bitmaps": found.has_stale_bitmaps,
    }


def _vhdx_fields(found: vhdx.Info) -> dict[str, Any]:
    header, metadata, locator = found.headers.current, found.metadata, found.metadata.locator
    return {
        "subformat": found.subformat,
        "block_size": metadata.block_size,
        "logical_sector_size": metadata.logical_sector_size,
        "physical_sector_size": metadata.physical_sector_size,
        "disk_id": str(metadata.disk_id),
        "creator": found.creator,
        "sequence_number": header.sequence_number,
        "header_slot": found.headers.slot + 1,
        "valid_headers": 1 if found.headers.other is None else 2,
        "file_write_guid": str(header.file_write_guid),
        "data_write_guid": str(header.data_write_guid),
        "log_guid": str(header.log_guid),
        "log_version": header.log_version,
        "header_version": header.version,
        "log_offset": header.log_offset,
        "log_length": header.log_length,
        "log": found.log,
        "log_problem": found.log_problem,
        "regions": [
            {"id": str(each.guid), "offset": each.offset, "length": each.length, "required": each.is_required}
            for each in found.regions.entries
        ],
        "damaged_region_tables": [slot + 1 for slot in found.regions.damaged_slots],
        "parent_locator": None if locator is None else locator.values,
        "user_items": [{"id": str(each.id), "length": each.length} for each in found.user_items],
    }


def _encryption(header: Header, luks: LuksHeader | None) -> dict[str, Any] | None:
    if luks is None:
        return None if header.crypt_method == Crypt.NONE else {"format": "aes"}
    return {
        "format": "luks",
        "cipher": f"{luks.cipher}-{luks.mode}",
        "hash": luks.hash_name,
        "key_bits": 8 * luks.key_size,
        "uuid": luks.uuid,
        "slots": [
            {"active": slot.is_active, "iterations": slot.iterations if slot.is_active else None}
            for slot in luks.key_slots
        ],
    }


def _snapshot(snapshot: Snapshot, size: int) -> dict[str, Any]:
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "size": size if snapshot.disk_size is None else snapshot.disk_size,
        "vm_state_size": snapshot.vm_state_size,
        "seconds": snapshot.seconds,
        "nanoseconds": snapshot.nanoseconds,
    }


# For people


def _lines(said: dict[str, Any]) -> Iterator[str]:
    """What is as usual is left out."""
    yield f"image:         {shown(said['path'])}"
    yield f"format:        {said['format']}" + (f" version {said['compat']}" if "compat" in said else "")
    yield f"virtual size:  {sized(said['size'])}"
    yield f"size on disk:  {sized(said['size_on_disk'])}"
    if said["format"] == "vhdx":
        yield from _vhdx_lines(said)
    if "compat" not in said:
        return
    yield f"cluster size:  {said['cluster_size']}"
    yield f"compression:   {said['compression_type']}"
    yield f"refcounts:     {said['refcount_bits']} bits" + (", lazy" if said["lazy_refcounts"] else "")
    if said["extended_l2"]:
        yield f"extended L2:   yes, subclusters of {said['cluster_size'] // 32}"
    if said["dirty"]:
        yield "dirty:         yes, it was not closed cleanly, or somebody has it open"
    if said["corrupt"]:
        yield "corrupt:       yes, only a repair may write to it"
    if said["backing"] is not None:
        format = "not given" if said["backing_format"] is None else shown(said["backing_format"])
        yield f"backing file:  {shown(said['backing'])} (format: {format})"
    if said["data_file"] is not None:
        yield f"data file:     {shown(said['data_file'])}" + (" (raw)" if said["data_file_raw"] else "")
    yield from _encryption_lines(said["encryption"])
    if said["unknown_features"]:
        yield f"unknown here:  {', '.join(said['unknown_features'])}"
    for each in said["snapshots"]:
        date = datetime.fromtimestamp(each["seconds"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        state = f", VM state of {sized(each['vm_state_size'])}" if each["vm_state_size"] else ""
        yield f"snapshot:      {shown(each['id'])} {shown(each['name'])}, {date}, {sized(each['size'])}{state}"
    for each in said["bitmaps"]:
        state = "enabled" if each["enabled"] else "disabled"
        state += "" if each["consistent"] else ", inconsistent or in use"
        yield f"bitmap:        {shown(each['name'])}, {state}, granularity {each['granularity']}"
    if said["stale_bitmaps"]:
        yield "bitmaps:       not valid, the image was changed without them"


def _encryption_lines(found: dict[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    if found["format"] == "aes":
        yield "encryption:    legacy AES"
        return
    yield f"encryption:    LUKS, {shown(found['cipher'])}, {found['key_bits']}-bit key, {shown(found['hash'])}"
    active = [
        f"{index} ({slot['iterations']} iterations)" for index, slot in enumerate(found["slots"]) if slot["active"]
    ]
    yield f"key slots:     {', '.join(active) or 'none'}"


def _vhdx_lines(said: dict[str, Any]) -> Iterator[str]:
    yield f"subformat:     {said['subformat']}"
    yield f"block size:    {said['block_size']}"
    yield f"sectors:       {said['logical_sector_size']} logical, {said['physical_sector_size']} physical"
    yield f"disk id:       {said['disk_id']}"
    yield f"creator:       {shown(said['creator'])}"
    yield f"header:        {said['header_slot']} of {said['valid_headers']}, sequence number {said['sequence_number']}"
    yield f"file write:    {said['file_write_guid']}"
    yield f"data write:    {said['data_write_guid']}"
    yield f"log:           {said['log']}, {said['log_length']} bytes at {said['log_offset']}"
    if said["log_problem"] is not None:
        yield f"log problem:   {shown(said['log_problem'])}; what follows is without what it holds"
    for each in said["regions"]:
        required = "" if each["required"] else ", not required"
        yield f"region:        {each['id']}, {each['length']} bytes at {each['offset']}{required}"
    for copy in said["damaged_region_tables"]:
        yield f"damaged:       region table {copy}"
    for key, value in (said["parent_locator"] or {}).items():
        yield f"parent:        {shown(key)} = {shown(value)}"
    for each in said["user_items"]:
        yield f"user item:     {each['id']}, {each['length']} bytes"
