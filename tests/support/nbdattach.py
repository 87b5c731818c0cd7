"""Attach /dev/nbdN to a server, and attach it again whenever the connection ends. Runs inside the guest.

It does what `nbd-client -persist` promises and, with kernels of these years, does not do: 3.24 ends as soon as it has
attached, and 3.27 sees the connection end and makes no other. The kernel's side is the real one: with
NBD_ATTR_DEAD_CONN_TIMEOUT it keeps requests while there is no connection, and NBD_CMD_RECONFIGURE gives it a new
one, on which what was not answered is sent again.

    python3 -I -S nbdattach.py HOST PORT EXPORT...        the exports as /dev/nbd0, /dev/nbd1...

Source: Linux include/uapi/linux/nbd-netlink.h, genetlink.h. It needs nothing but builtin modules and `socket`.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import time

NETLINK_GENERIC = 16
CONTROL_FAMILY = 0x10
GET_FAMILY, FAMILY_ID, FAMILY_NAME = 3, 1, 2
NLM_F_REQUEST_ACK = 0x5
NLMSG_ERROR = 2
CONNECT, RECONFIGURE = 1, 3
INDEX, SIZE, BLOCK_SIZE, TIMEOUT, SERVER_FLAGS, SOCKETS, DEAD_TIMEOUT = 1, 2, 3, 4, 5, 7, 8
SOCKET_ITEM = SOCKET_FD = 1
EXPORT_NAME = 1
BLOCK = 4096
RETRY_S = 0.1
TIMEOUT_S = 5
"""What was sent and not answered when a connection ended is sent again after so long; the kernel's default is 30."""
DEAD_TIMEOUT_S = 600
"""How long requests wait for a connection; a guest's clock may run faster than its host's."""


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


class Netlink:
    """A socket to the kernel's generic netlink, and the number of its family "nbd"."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        self._socket.bind((0, 0))
        reply = self.call(CONTROL_FAMILY, GET_FAMILY, attribute(FAMILY_NAME, b"nbd\0"))
        self.family = self._attributes(reply)[FAMILY_ID]

    def call(self, family: int, command: int, attributes: bytes) -> bytes:
        """The answer's attributes. Raises: OSError: what the kernel says."""
        payload = struct.pack("=BBH", command, 1, 0) + attributes
        self._socket.send(struct.pack("=IHHII", 16 + len(payload), family, NLM_F_REQUEST_ACK, 1, 0) + payload)
        answer = b""
        while True:
            message = self._socket.recv(65536)
            while message:
                length, kind = struct.unpack_from("=IH", message)
                if kind == NLMSG_ERROR:
                    (error,) = struct.unpack_from("=i", message, 16)
                    if error:
                        raise OSError(-error, os.strerror(-error))
                    return answer
                answer, message = message[20:length], message[(length + 3) & ~3 :]

    @staticmethod
    def _attributes(data: bytes) -> dict[int, int]:
        """Those of 16 bits."""
        found = {}
        while data:
            length, kind = struct.unpack_from("=HH", data)
            if length == 6:
                (found[kind],) = struct.unpack_from("=H", data, 4)
            data = data[(length + 3) & ~3 :]
        return found


def receive(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise OSError("the server left in the handshake")
    return data


def connect(host: str, port: int, export: str) -> tuple[socket.socket, int, int]:
    """A negotiated connection, and the export's size and flags. Raises: OSError."""
    sock = socket.socket()
    sock.settimeout(10)
    sock.connect((host, port))
    receive(sock, 18)
    name = export.encode()
    sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", EXPORT_NAME, len(name)) + name)
    size, flags = struct.unpack(">QH", receive(sock, 10))
    sock.settimeout(None)
    return sock, size, flags


class Device:
    """/dev/nbd`index`."""

    def __init__(self, netlink: Netlink, host: str, port: int, export: str, index: int) -> None:
        self.netlink = netlink
        self.server = host, port, export
        self.index = index
        self.socket, size, flags = connect(*self.server)
        self._configure(CONNECT, u64(SIZE, size) + u64(BLOCK_SIZE, BLOCK) + u64(SERVER_FLAGS, flags))

    def _configure(self, command: int, more: bytes) -> None:
        """Give the kernel the socket. Raises: OSError: it does not know yet that the last one has ended."""
        sockets = attribute(SOCKETS, attribute(SOCKET_ITEM, u32(SOCKET_FD, self.socket.fileno())))
        times = u64(TIMEOUT, TIMEOUT_S) + u64(DEAD_TIMEOUT, DEAD_TIMEOUT_S)
        self.netlink.call(self.netlink.family, command, u32(INDEX, self.index) + times + sockets + more)

    def attach_again(self) -> None:
        while True:
            time.sleep(RETRY_S)
            try:
                self.socket, _, _ = connect(*self.server)
                self._configure(RECONFIGURE, b"")
                return
            except OSError as error:
                print(f"nbd{self.index}: {error}", flush=True)


def main() -> None:
    host, port, *exports = sys.argv[1:]
    netlink = Netlink()
    devices = [Device(netlink, host, int(port), export, index) for index, export in enumerate(exports)]
    while True:
        ended = select.poll()
        for device in devices:
            ended.register(device.socket, 0)
        descriptors = [descriptor for descriptor, _ in ended.poll()]
        for device in devices:
            if device.socket.fileno() in descriptors:
                device.attach_again()


if __name__ == "__main__":
    main()
