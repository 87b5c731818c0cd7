"""A server from its start to its end as a process: signals, what the service manager is told, exit status."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from nbdimg.config import ServerConfig
from nbdimg.configfile import FileConfig, Overrides, load_config
from nbdimg.server.reload import Reloader, stamp, status
from nbdimg.server.service import Service, serving
from nbdimg.server.systemd import Inherited, Notifier
from nbdimg.uri import NbdUri


async def serve_images(config: ServerConfig, inherited: Sequence[Inherited]) -> int:
    """Serve until SIGTERM or SIGINT; SIGHUP has the files of TLS read again. Returns the exit status.

    Raises: as `serving`.
    """
    stop = _StopSignals()
    notifier = Notifier()
    try:
        async with serving(config, inherited) as service:
            if config.tls is not None:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.reload_tls)
            _announce(service, notifier)
            await stop.wait_and_drain(service, notifier)
    finally:
        notifier.close()
    return _exit_status(service)


async def serve_file(
    path: str, overrides: Overrides, default_listeners: tuple[NbdUri, ...], inherited: Sequence[Inherited]
) -> int:
    """Serve what a configuration file says, which SIGHUP has read again. Returns and raises as `serve_images`."""

    def load() -> FileConfig:
        return load_config(path, overrides=overrides, default_listeners=default_listeners)

    def load_again() -> tuple[ServerConfig, bool]:
        config = load()
        return config.server, config.reload == "watch"

    stop = _StopSignals()
    is_reload_asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, is_reload_asked.set)
    seen = stamp(path)
    config = load()
    notifier = Notifier()
    try:
        async with serving(config.server, inherited) as service:
            reloader = Reloader(service, load_again, notifier, path, is_watching=config.reload == "watch", seen=seen)
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.request)
            if is_reload_asked.is_set():
                reloader.request()
            try:
                _announce(service, notifier)
                await stop.wait_and_drain(service, notifier)
            finally:
                await reloader.close()
    finally:
        notifier.close()
    return _exit_status(service)


class _StopSignals:
    """The first SIGTERM or SIGINT asks for a drain, the second for an end to it."""

    def __init__(self) -> None:
        self._is_asked = asyncio.Event()
        self._is_forced = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self._is_forced if self._is_asked.is_set() else self._is_asked).set()

    async def wait_and_drain(self, service: Service, notifier: Notifier) -> None:
        await self._is_asked.wait()
        notifier.stopping()
        loop = asyncio.get_running_loop()
        drain = loop.create_task(service.drain())
        force = loop.create_task(self._is_forced.wait())
        await asyncio.wait((drain, force), return_when=asyncio.FIRST_COMPLETED)
        force.cancel()
        drain.cancel()


def _announce(service: Service, notifier: Notifier) -> None:
    for uri in service.uris:
        print(uri)
    sys.stdout.flush()
    notifier.ready(status(service))


def _exit_status(service: Service) -> int:
    for failure in service.failures:
        logging.getLogger("nbdimg").error("%s", failure)
    return 1 if service.failures else 0
