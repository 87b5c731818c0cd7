"""The HTTP listeners of a process: the API at a Unix socket and, with a token, at an address; health and metrics alone
at another.

They open before the first image does and close behind the last one: whoever asks meanwhile is told what is going on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from http.client import BAD_REQUEST

from aiohttp import web

from nbdimg.admin.app import application, sign
from nbdimg.admin.backend import Backend
from nbdimg.admin.guard import Guard, TokenFile
from nbdimg.admin.problems import failed, malformed, of_aiohttp
from nbdimg.config import AdminConfig, ServerConfig, TcpAddress
from nbdimg.errors import ConfigError
from nbdimg.server.checks import check_addresses, check_admin
from nbdimg.server.listen import is_loopback, listen_private, listen_tcp, remove_socket
from nbdimg.server.systemd import ADMIN_NAME, Inherited

CONNECTIONS_MAX = 64
"""At one listener; the next is closed on accept. Probes, a scraper and a few people need less."""

IDLE_TIMEOUT_S = 30.0
"""For a connection's next request, up to the end of its header."""

LINGER_S = 2.0
"""How long the rest of a refused body is read, so that its client reads the refusal."""

SHUTDOWN_TIMEOUT_S = 2.0
"""For responses that are being sent when the server ends."""

logger = logging.getLogger("nbdimg")

_silent = logging.Logger("nbdimg.http", logging.CRITICAL + 1)
"""aiohttp reports what is wrong with a client's bytes with a traceback; the client is told, and that is enough."""


@asynccontextmanager
async def admin_listening(config: ServerConfig, inherited: Sequence[Inherited]) -> AsyncIterator[Backend]:
    """Answer HTTP until the block ends. `Backend.attach` must be called when there is something to tell of.

    Args: inherited: sockets that listen already, named "admin" or "metrics".

    Raises:
        ConfigError: the token file is not as it must be, or a listener is exposed without leave.
        ListenError: an address cannot be listened on.
    """
    check_admin(config)
    check_addresses(config)
    backend = Backend()
    async with AsyncExitStack() as stack:
        for each in inherited:
            await _adopt(stack, backend, each)
        if config.admin is not None:
            await _open_admin(stack, backend, config.admin)
        if config.metrics_address is not None:
            sockets, address = listen_tcp(config.metrics_address)
            await _serve(stack, application(backend, Guard(host=_own_host(address)), is_admin=False), sockets)
            logger.info("metrics and health are at http://%s", address)
        yield backend


async def _adopt(stack: AsyncExitStack, backend: Backend, inherited: Inherited) -> None:
    is_admin = inherited.name == ADMIN_NAME
    if is_admin and inherited.uri.socket is None:
        raise ConfigError(
            f"socket {ADMIN_NAME} of LISTEN_FDS: expected a Unix socket, the admin API has no token there"
        )
    await _serve(stack, application(backend, Guard(), is_admin=is_admin), [inherited.socket])


async def _open_admin(stack: AsyncExitStack, backend: Backend, config: AdminConfig) -> None:
    if config.socket_path is not None:
        sock = listen_private(config.socket_path)
        stack.callback(remove_socket, config.socket_path, os.stat(config.socket_path).st_ino)
        await _serve(stack, application(backend, Guard(), is_admin=True), [sock])
        logger.info("the admin API is at %s", config.socket_path)
    if config.address is not None:
        assert config.token_path is not None
        token = TokenFile(config.token_path)
        sockets, address = listen_tcp(config.address)
        await _serve(stack, application(backend, Guard(token, _own_host(address)), is_admin=True), sockets)
        logger.info("the admin API is at http://%s", address)
        if not is_loopback(address.host):
            logger.warning("http://%s: in plain text, anybody on the way can read the admin API's token", address)


def _own_host(address: TcpAddress) -> str | None:
    return address.host.lower() if is_loopback(address.host) else None


async def _serve(stack: AsyncExitStack, app: web.Application, sockets: Sequence[socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    runner = web.AppRunner(app, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    server = runner.server
    assert server is not None

    def protocol() -> asyncio.Protocol:
        if len(server.connections) >= CONNECTIONS_MAX:
            return _Refused()
        return _Connection(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,  # on the loop, before anybody has asked who it is: 1 MiB of gzip can hold 1 GiB
            logger=_silent,
            keepalive_timeout=IDLE_TIMEOUT_S,
            lingering_time=LINGER_S,
        )

    for sock in sockets:
        listener = await loop.create_server(protocol, sock=sock)
        stack.callback(listener.close)


class _Connection(web.RequestHandler):
    """One of HTTP. What never becomes a request is refused as requests are."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Raises: ConnectionError: an answer is under way already."""
        if request.writer.output_size:
            raise ConnectionError("it failed behind the beginning of its answer")
        response = malformed(message or "") if status == BAD_REQUEST else failed(exc)
        sign(response)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Args: resp: an exception of aiohttp's where it has refused a request before the application saw it."""
        if isinstance(resp, web.HTTPException):
            resp = of_aiohttp(resp)
            sign(resp)
        return await super().finish_response(request, resp, start_time)


class _Refused(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
