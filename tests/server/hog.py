"""A greedy but honest client in a process of its own: `hog.py SOCKET`, until it is killed.

It keeps 16 reads of 4 MiB in flight and takes the replies as fast as they come; prints a line after the first one.
"""

from __future__ import annotations

import socket
import sys

from tests.support.rawclient import Client
from tests.support.rawprotocol import MIB

READ_LENGTH = 4 * MIB
DEPTH = 16
IMAGE_SIZE = 32 * MIB


def main() -> None:
    with Client(sys.argv[1]) as client:
        client.greet()
        client.negotiate("disk", structured=False)
        requests = client.reads(DEPTH, READ_LENGTH, stride=MIB)
        data = [request.serialize() for request in requests]
        client.send(b"".join(data))
        buffer = memoryview(bytearray(16 + READ_LENGTH))
        for count in range(sys.maxsize):
            client.sock.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
            client.send(data[count % DEPTH])
            if count == 0:
                print("busy", flush=True)


if __name__ == "__main__":
    main()
