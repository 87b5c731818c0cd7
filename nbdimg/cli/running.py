"""A server from its start to its end as a process: signals, what the service manager is told, exit status."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from nbdimg.cli.streams import flush, take_no_wait_at_stderr
from nbdimg.config import ServerConfig
from nbdimg.configfile import FileConfig, Overrides, load_config
from nbdimg.errors import escaped
from nbdimg.server import handover, sandbox
from nbdimg.server.live import Control
from nbdimg.server.log import start_logging
from nbdimg.server.reload import Reloader, stamp, status
from nbdimg.server.service import Service, serving
from nbdimg.server.systemd import Inheritance, Inherited, Notifier, is_for_clients
from nbdimg.uri import NbdUri


async def serve_images(config: ServerConfig, inheritance: Inheritance, *, is_verbose: bool) -> int:
    """Serve until SIGTERM or SIGINT. SIGHUP has the files of TLS read again; without TLS it is a terminal that went
    away, and ends the server in order. Returns the exit status.

    Raises: as `serving`.
    """
    stop = _StopSignals(signal.SIGINT, *([signal.SIGHUP] if config.tls is None else []))
    hangups = None if config.tls is None else _Hangups()
    notifier = _prepare(config, None, inheritance, is_verbose=is_verbose)
    try:
        async with (
            _administered(config, inheritance.listeners) as attach,
            _serving(config, inheritance, notifier) as service,
        ):
            attach(service, Control(service, None))
            if hangups is not None:
                hangups.answer_by(service.reload_tls)
            _announce(service, notifier)
            await stop.wait_and_drain(service, notifier)
        service.server.estate.settle(notifier)
    finally:
        notifier.close()
    return _exit_status(service)


async def serve_file(
    path: str,
    overrides: Overrides,
    default_listeners: tuple[NbdUri, ...],
    inheritance: Inheritance,
    *,
    is_verbose: bool,
) -> int:
    """Serve what a configuration file says, which SIGHUP has read again. Returns and raises as `serve_images`."""

    def load() -> FileConfig:
        return load_config(path, overrides=overrides, default_listeners=default_listeners)

    def load_again() -> tuple[ServerConfig, bool]:
        config = load()
        return config.server, config.reload == "watch"

    stop = _StopSignals(signal.SIGINT)
    hangups = _Hangups()
    seen = stamp(path)
    config = load()
    notifier = _prepare(config.server, path, inheritance, is_verbose=is_verbose)
    try:
        server = config.server
        async with (
            _administered(server, inheritance.listeners) as attach,
            _serving(server, inheritance, notifier) as service,
        ):
            reloader = Reloader(service, load_again, notifier, path, is_watching=config.reload == "watch", seen=seen)
            attach(service, Control(service, reloader))
            hangups.answer_by(reloader.request)
            try:
                _announce(service, notifier)
                await stop.wait_and_drain(service, notifier)
            finally:
                reloader.stop()
        service.server.estate.settle(notifier)
    finally:
        notifier.close()
    return _exit_status(service)


def _prepare(config: ServerConfig, path: str | None, inheritance: Inheritance, *, is_verbose: bool) -> Notifier:
    """What comes before images and threads. Each image and each client takes descriptors: as many as are allowed."""
    take_no_wait_at_stderr()
    start_logging(config.log_format, is_verbose=is_verbose)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    notifier = Notifier()
    sandbox.confine(config, path, [each.uri for each in inheritance.listeners])
    return notifier


@asynccontextmanager
async def _administered(
    config: ServerConfig, inherited: Sequence[Inherited]
) -> AsyncIterator[Callable[[Service, Control], None]]:
    """HTTP where it is asked for, until the block ends; what is yielded is given the service when it is there.

    Its libraries take a third of a second to import, so a server without it does not import them.
    """
    for_http = [each for each in inherited if not is_for_clients(each)]
    if config.admin is None and config.metrics_address is None and not for_http:
        yield lambda service, control: None
        return
    from nbdimg.admin.listeners import admin_listening

    async with admin_listening(config, for_http) as backend:
        yield backend.attach


def _serving(
    config: ServerConfig, inheritance: Inheritance, notifier: Notifier
) -> AbstractAsyncContextManager[Service]:
    listeners = list(filter(is_for_clients, inheritance.listeners))
    return serving(config, listeners, partial(handover.claim, inheritance, notifier))


class _Hangups:
    """SIGHUP from now on; what comes before there is an answer is answered then. There is one handler all the time: a
    loop forgets a signal that it was about to tell of when its handler is replaced.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._answer: Callable[[], None] | None = None
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_signal)

    def _on_signal(self) -> None:
        if self._answer is None:
            self._is_asked = True
        else:
            self._answer()

    def answer_by(self, answer: Callable[[], None]) -> None:
        self._answer = answer
        if self._is_asked:
            answer()


class _StopSignals:
    """The first signal asks for a drain, the second for an end to it.

    Args: keyboard: besides SIGTERM; those that come from a terminal, and that whoever started the process may have it
        ignore (nohup, `&` in a script).
    """

    def __init__(self, *keyboard: signal.Signals) -> None:
        self._is_asked = asyncio.Event()
        self._is_forced = asyncio.Event()
        heard = (each for each in keyboard if signal.getsignal(each) is not signal.SIG_IGN)
        for number in (signal.SIGTERM, *heard):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self._is_forced if self._is_asked.is_set() else self._is_asked).set()

    async def wait_and_drain(self, service: Service, notifier: Notifier) -> None:
        await self._is_asked.wait()
        notifier.stopping()
        service.server.estate.is_open = notifier.keeps_descriptors
        loop = asyncio.get_running_loop()
        drain = loop.create_task(service.drain())
        force = loop.create_task(self._is_forced.wait())
        await asyncio.wait((drain, force), return_when=asyncio.FIRST_COMPLETED)
        force.cancel()
        drain.cancel()
        await asyncio.wait((drain,))
        if not drain.cancelled():
            drain.result()


def _announce(service: Service, notifier: Notifier) -> None:
    # What is there stays. With a thousand exports a full collection holds all clients up for 20 ms, again and again.
    gc.freeze()
    sandbox.announce()
    if not service.config.exports:
        logging.getLogger("nbdimg").warning("nothing is exported: the configuration has no [[exports]]")
    _print_uris(service)
    for export in (each for each in service.registry if each.keeps_overlays):
        name, asked = escaped(export.name), escaped(export.asked_as)
        logging.getLogger("nbdimg").info(
            "overlays of %s are kept: a client asks for %s, with a NAME of its own", name, asked
        )
    notifier.ready(status(service))


def _print_uris(service: Service) -> None:
    """A full disk or a reader that has gone keeps no server from serving."""
    refused: OSError | None = None
    try:
        for uri in service.uris:
            print(uri)
    except OSError as error:
        refused = error
    if (refused := flush(sys.stdout) or refused) is not None:
        logging.getLogger("nbdimg").warning("the URIs of exports were not printed: %s", refused.strerror)


def _exit_status(service: Service) -> int:
    for failure in service.failures:
        logging.getLogger("nbdimg").error("%s", failure)
    return 1 if service.failures else 0
