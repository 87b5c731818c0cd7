"""`nbdimg serve`: export images until SIGTERM."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from typing import Annotated, Any

import typer

from nbdimg.cli.running import serve_file, serve_images
from nbdimg.config import DEFAULT_LISTENER, ExportConfig, TlsConfig
from nbdimg.configfile import Overrides, config_without_file
from nbdimg.configfile.values import listener_uri
from nbdimg.errors import ConfigError
from nbdimg.formats import DRIVERS, check_format, create_image
from nbdimg.limits import Limits
from nbdimg.server.loop import run_loop
from nbdimg.server.systemd import inherited_sockets
from nbdimg.units import MiB, parse_size

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
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="What to serve and how, in TOML; read again at SIGHUP. Other options go before it."
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
    connections_max: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Clients at once.", show_default=f"{_DEFAULTS.connections}")
    ] = None,
    handshake_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S", min=0.1, help="Seconds for a handshake.", show_default=f"{_DEFAULTS.handshake_timeout_s:g}"
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0.1,
            help="Seconds for the rest of a request that has begun.",
            show_default=f"{_DEFAULTS.request_timeout_s:g}",
        ),
    ] = None,
    stall_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0.1,
            help="Seconds without taking a reply that waits.",
            show_default=f"{_DEFAULTS.stall_timeout_s:g}",
        ),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0,
            help="Seconds for clients to finish after SIGTERM.",
            show_default=f"{_DEFAULTS.drain_timeout_s:g}",
        ),
    ] = None,
    tls_certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="Offer TLS: the server's certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(metavar="FILE", help="The certificate's key (default: in the certificate's file).")
    ] = None,
    tls_client_ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="Require client certificates of this authority.")
    ] = None,
    tls_crl: Annotated[str | None, typer.Option(metavar="FILE", help="Refuse revoked client certificates.")] = None,
    tls_mode: Annotated[
        str | None,
        typer.Option(
            metavar="off|required|selective",
            help="TLS at nbd: listeners; nbds: listeners always require it.",
            show_default="required",
        ),
    ] = None,
    tls_min_version: Annotated[
        str | None, typer.Option(metavar="1.2|1.3", help="The lowest TLS version.", show_default="1.3")
    ] = None,
    tls_psk_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Pre-shared keys, lines of NAME:HEX; needs Python 3.13.")
    ] = None,
    insecure_plaintext: Annotated[
        bool, typer.Option("--insecure-plaintext", help="Allow addresses that other machines reach.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log connections too.")] = False,
) -> int:
    """Export disk images over NBD until SIGTERM or SIGINT."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.DEBUG if verbose else logging.INFO, format="nbdimg: %(levelname)s: %(message)s"
    )
    given = {
        "connections": connections_max,
        "handshake_timeout_s": handshake_timeout,
        "request_timeout_s": request_timeout,
        "stall_timeout_s": stall_timeout,
        "drain_timeout_s": drain_timeout,
    }
    tls_choices = {
        name: value for name, value in (("mode", tls_mode), ("min_version", tls_min_version)) if value is not None
    }
    overrides = Overrides(
        listeners=tuple(listener_uri(text) for text in listen) if listen else None,
        limits={name: value for name, value in given.items() if value is not None},
        allows_plaintext=insecure_plaintext or None,
        tls=_tls(tls_certificate, tls_psk_file, key=tls_key, client_ca=tls_client_ca, crl=tls_crl, **tls_choices),
    )
    inherited = inherited_sockets()
    default_listeners = () if inherited else (DEFAULT_LISTENER,)
    if config is not None:
        images_own = (images, format, read_only, description, key_file, allow_references, min_block_size != "1")
        if any(images_own):
            raise ConfigError(f"with --config images and their options stand in {config}, not on the command line")
        return run_loop(serve_file(config, overrides, default_listeners, inherited))
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
    server = config_without_file(exports, overrides=overrides, default_listeners=default_listeners)
    return run_loop(serve_images(server, inherited))


def _tls(
    certificate: str | None, psk: str | None, *, key: str | None, client_ca: str | None, crl: str | None, **choices: str
) -> TlsConfig | None:
    """None when no option of TLS is given. Raises: ConfigError: some do not go together."""
    if not any((certificate, psk, key, client_ca, crl, choices)):
        return None
    found: dict[str, Any] = choices
    return TlsConfig(certificate, key, client_ca, crl, psk, **found)


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
