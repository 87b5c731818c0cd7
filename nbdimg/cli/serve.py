"""`nbdimg serve`: export images until SIGTERM."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated, Any

import typer

from nbdimg.cli.options import (
    AcceptLostLog,
    AllowReferences,
    BackingKeyFile,
    KeepOverlays,
    Overlay,
    OverlayDir,
    Parent,
    key_paths,
    name_and_image,
    overlay_mode,
    parsed,
)
from nbdimg.cli.running import serve_file, serve_images
from nbdimg.config import DEFAULT_LISTENER, LOG_FORMATS, SANDBOX_MODES, TLS_MODES, TLS_VERSIONS, ExportConfig
from nbdimg.configfile import Overrides, config_without_file
from nbdimg.configfile.limits import LIMITS
from nbdimg.configfile.values import EnvironmentText, listener_uri, one_of, tcp_address
from nbdimg.errors import ConfigError
from nbdimg.formats import DRIVERS, check_format, create_image
from nbdimg.limits import Limits
from nbdimg.server.loop import run_loop
from nbdimg.server.systemd import inherit, is_for_clients
from nbdimg.units import MiB, parse_size

DEMO_PATH = "demo.img"
DEMO_SIZE = 64 * MiB

_DEFAULTS = Limits()


def serve(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]IMAGE",
            help="Images to export, each under NAME or its file's name up to the first dot. None: "
            f"{DEMO_PATH}, made when it is missing.",
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
            "--format",
            "-f",
            metavar="|".join(DRIVERS),
            help="The images' format (default: by their magic number; raw without one).",
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
    backing_key_file: BackingKeyFile = None,
    allow_references: AllowReferences = None,
    overlay: Overlay = False,
    keep_overlays: KeepOverlays = False,
    overlay_dir: OverlayDir = None,
    parent: Parent = None,
    accept_lost_log: AcceptLostLog = False,
    connections_max: Annotated[
        str | None, typer.Option(metavar="N", help=f"Clients at once (default: {_DEFAULTS.connections}).")
    ] = None,
    handshake_timeout: Annotated[
        str | None,
        typer.Option(metavar="S", help=f"Seconds for a handshake (default: {_DEFAULTS.handshake_timeout_s:g})."),
    ] = None,
    request_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help=f"Seconds for the rest of a request that has begun (default: {_DEFAULTS.request_timeout_s:g}).",
        ),
    ] = None,
    stall_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help=f"Seconds without taking a reply that waits (default: {_DEFAULTS.stall_timeout_s:g}).",
        ),
    ] = None,
    drain_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help=f"Seconds for clients to finish after SIGTERM (default: {_DEFAULTS.drain_timeout_s:g}).",
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
            metavar="|".join(TLS_MODES),
            help="TLS at nbd: listeners; nbds: listeners always require it (default: required).",
        ),
    ] = None,
    tls_min_version: Annotated[
        str | None, typer.Option(metavar="|".join(TLS_VERSIONS), help="The lowest TLS version (default: 1.3).")
    ] = None,
    tls_psk_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Pre-shared keys, lines of NAME:HEX; needs Python 3.13.")
    ] = None,
    insecure_plaintext: Annotated[
        bool, typer.Option("--insecure-plaintext", help="Allow addresses that other machines reach.")
    ] = False,
    sandbox: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(SANDBOX_MODES),
            help="Give up what serving does not need: as far as the kernel can, or not start where it cannot "
            f"(default: {SANDBOX_MODES[0]}).",
        ),
    ] = None,
    image_directory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Images that are exported later may lie in DIR too, which the sandbox leaves open; repeatable.",
        ),
    ] = None,
    admin_socket: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Serve the HTTP API at a Unix socket that only this user may open."),
    ] = None,
    admin_listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve the HTTP API on TCP, for who has the token.")
    ] = None,
    admin_token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The token for --admin-listen, one line.")
    ] = None,
    metrics_listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve metrics and health over HTTP, for everybody.")
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(LOG_FORMATS),
            help=f"Lines of the log; auto is text at a terminal, else JSON (default: {LOG_FORMATS[0]}).",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what helps to find a fault, too.")] = False,
) -> int:
    """Export disk images over NBD until SIGTERM or SIGINT."""
    tls = _given(
        key_path=tls_key,
        client_ca_path=tls_client_ca,
        crl_path=tls_crl,
        psk_path=tls_psk_file,
        mode=tls_mode,
        min_version=tls_min_version,
    )
    if tls_certificate is not None:  # without a key beside it, it has its own, and not the file's
        tls |= {"certificate_path": tls_certificate, "key_path": tls_key}
    overrides = Overrides(
        listeners=tuple(listener_uri(text) for text in listen) if listen else None,
        limits=_given(
            connections=_limit("--connections-max", "connections", connections_max),
            handshake_timeout_s=_limit("--handshake-timeout", "handshake_timeout", handshake_timeout),
            request_timeout_s=_limit("--request-timeout", "request_timeout", request_timeout),
            stall_timeout_s=_limit("--stall-timeout", "stall_timeout", stall_timeout),
            drain_timeout_s=_limit("--drain-timeout", "drain_timeout", drain_timeout),
        ),
        allows_plaintext=insecure_plaintext or None,
        tls=tls,
        admin=_given(
            socket_path=admin_socket,
            address=parsed("--admin-listen", tcp_address, admin_listen),
            token_path=admin_token_file,
        ),
        metrics_address=parsed("--metrics-listen", tcp_address, metrics_listen),
        sandbox=parsed("--sandbox", one_of(*SANDBOX_MODES), sandbox),
        image_directories=tuple(image_directory) if image_directory else None,
        log_format=parsed("--log-format", one_of(*LOG_FORMATS), log_format),
    )
    inheritance = inherit()
    default_listeners = () if any(map(is_for_clients, inheritance.listeners)) else (DEFAULT_LISTENER,)
    if config is not None:
        images_own = (
            *(images, format, read_only, description, key_file, allow_references, min_block_size != "1"),
            *(backing_key_file, parent, accept_lost_log, overlay, keep_overlays, overlay_dir),
        )
        if any(images_own):
            raise ConfigError(f"with --config images and their options stand in {config}, not on the command line")
        return run_loop(serve_file(config, overrides, default_listeners, inheritance, is_verbose=verbose))
    check_format(format)
    block_size_min = parsed("--min-block-size", parse_size, min_block_size)
    exports = tuple(
        replace(
            _export(argument),
            format=format,
            is_read_only=read_only,
            description=description,
            block_size_min=block_size_min,
            key_path=key_file,
            key_paths=key_paths(backing_key_file),
            roots=tuple(allow_references or ()),
            parent_path=parent,
            accepts_lost_log=accept_lost_log,
            overlay=overlay_mode(overlay, keep_overlays),
            overlay_directory=overlay_dir,
        )
        for argument in images or [_demo()]
    )
    server = config_without_file(exports, overrides=overrides, default_listeners=default_listeners)
    return run_loop(serve_images(server, inheritance, is_verbose=verbose))


def _given(**options: object) -> dict[str, Any]:
    """Those that the command line has."""
    return {name: value for name, value in options.items() if value is not None}


def _limit(option: str, key: str, text: str | None) -> Any:
    """The value of an option that stands for a key of `[limits]`, and has its range."""
    return parsed(option, lambda value: LIMITS[key](EnvironmentText(value)), text)


def _export(argument: str) -> ExportConfig:
    name, path = name_and_image(argument)
    return ExportConfig(path=path, name=name)


def _demo() -> str:
    if not os.path.exists(DEMO_PATH):
        create_image(DEMO_PATH, DEMO_SIZE)
    return DEMO_PATH
