"""Sockets as they are opened and accepted."""

from __future__ import annotations

import socket

import pytest

from nbdimg.config import TcpAddress
from nbdimg.server.listen import listen_tcp, prepare
from tests.support.rawclient import try_connect


def test_tcp_client_that_vanishes_is_noticed_in_two_minutes() -> None:
    """Idle, the kernel asks for it; with bytes on their way to it, it does not repeat them for longer."""
    (listener,), address = listen_tcp(TcpAddress("127.0.0.1", 0))
    with listener, socket.create_connection((address.host, address.port)):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            prepare(accepted)
            assert not accepted.getblocking()
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

            def tcp(option: int) -> int:
                return accepted.getsockopt(socket.IPPROTO_TCP, option)

            idle_s = tcp(socket.TCP_KEEPIDLE) + tcp(socket.TCP_KEEPINTVL) * tcp(socket.TCP_KEEPCNT)
            assert (idle_s, tcp(socket.TCP_USER_TIMEOUT)) == (120, 120_000)
            assert tcp(socket.TCP_NODELAY)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_every_address_of_ipv6_is_none_of_ipv4() -> None:
    (listener,), address = listen_tcp(TcpAddress("::", 0))
    with listener:
        assert try_connect(("127.0.0.1", address.port)) is None
        with socket.create_connection(("::1", address.port)):
            pass
