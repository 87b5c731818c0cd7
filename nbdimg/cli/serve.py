"""`nbdimg serve`: export images until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from dataclasses import replace
from typing import Annotated

import typer

from nbdimg.config import DEFAULT_LISTENER, ExportConfig, ServerConfig
from nbdimg.errors import ConfigError
from nbdimg.formats import DRIVERS, check_format, create_image
from nbdimg.limits import Limits
from nbdimg.server.loop import run_loop
from nbdimg.server.service import serving
from nbdimg.units import MiB, parse_size
from nbdimg.uri import NbdUri

DEMO_PATH = "demo.img"
DEMO_SIZE = 64 * MiB

_DEFAULTS = Limits()


def serve(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]IMAGE",
            help=f"Images to export, each under NAME or its file's stem. None: {DEMO_PATH}, made when it is missing.",
        ),
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="Where to listen: nbd://HOST:PORT or nbd+unix:///?socket=PATH; repeatable "
            f"(default: {DEFAULT_LISTENER}).",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DRIVERS), help="The images' format (default: by their magic number; raw without one)."
        ),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", "-r", help="Refuse every change.")] = False,
    description: Annotated[str, typer.Option(metavar="TEXT", help="What clients see beside the name.")] = "",
    min_block_size: Annotated[
        str, typer.Option(metavar="BYTES", help="Advertised minimum block size, a power of two up to 64K.")
    ] = "1",
    key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The passphrase of encrypted images, from a file.")
    ] = None,
    allow_references: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Backing and data files may lie in DIR too, not only in the image's own directory; repeatable.",
        ),
    ] = None,
    connections_max: Annotated[int, typer.Option(metavar="N", min=1, help="Clients at once.")] = _DEFAULTS.connections,
    handshake_timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Seconds for a handshake.")
    ] = _DEFAULTS.handshake_timeout_s,
    request_timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Seconds for the rest of a request that has begun.")
    ] = _DEFAULTS.request_timeout_s,
    stall_timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Seconds without taking a reply that waits.")
    ] = _DEFAULTS.stall_timeout_s,
    drain_timeout: Annotated[
        float, typer.Option(metavar="S", min=0, help="Seconds for clients to finish after SIGTERM.")
    ] = _DEFAULTS.drain_timeout_s,
    insecure_plaintext: Annotated[
        bool, typer.Option("--insecure-plaintext", help="Allow addresses that other machines reach.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log connections too.")] = False,
) -> int:
    """Export disk images over NBD until SIGTERM or SIGINT."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.DEBUG if verbose else logging.INFO, format="nbdimg: %(levelname)s: %(message)s"
    )
    check_format(format)
    block_size_min = parse_size(min_block_size)
    exports = tuple(
        replace(
            _export(argument),
            format=format,
            is_read_only=read_only,
            description=description,
            block_size_min=block_size_min,
            key_path=key_file,
            roots=tuple(allow_references or ()),
        )
        for argument in images or [_demo()]
    )
    config = ServerConfig(
        exports=exports,
        listeners=tuple(NbdUri.parse(text) for text in listen) if listen else (DEFAULT_LISTENER,),
        limits=Limits(
            connections=connections_max,
            handshake_timeout_s=handshake_timeout,
            request_timeout_s=request_timeout,
            stall_timeout_s=stall_timeout,
            drain_timeout_s=drain_timeout,
        ),
        allows_plaintext=insecure_plaintext,
    )
    for uri in config.listeners:
        if uri.name:
            raise ConfigError(f"{uri}: a listener has no export name, write NAME=IMAGE for that")
    return run_loop(_serve(config))


def _export(argument: str) -> ExportConfig:
    """`NAME=IMAGE` or `IMAGE`. An existing file whose own name has a `=` is taken as it is."""
    name, equals, path = argument.partition("=")
    if not equals or os.path.exists(argument):
        return ExportConfig(path=argument)
    if not name or not path:
        raise ConfigError(f"{argument!r}: expected NAME=IMAGE with both parts")
    return ExportConfig(path=path, name=name)


def _demo() -> str:
    if not os.path.exists(DEMO_PATH):
        create_image(DEMO_PATH, DEMO_SIZE)
    return DEMO_PATH


async def _serve(config: ServerConfig) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    is_forced = asyncio.Event()

    def on_signal() -> None:
        (is_forced if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    async with serving(config) as service:
        for uri in service.uris:
            print(uri)
        sys.stdout.flush()
        await stop.wait()
        drain = loop.create_task(service.drain())
        force = loop.create_task(is_forced.wait())
        await asyncio.wait((drain, force), return_when=asyncio.FIRST_COMPLETED)
        force.cancel()
        drain.cancel()
    for failure in service.failures:
        logging.getLogger("nbdimg").error("%s", failure)
    return 1 if service.failures else 0
