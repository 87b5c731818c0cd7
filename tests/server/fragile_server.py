"""A small NBD server that breaks on purpose: the control of the harnesses that hunt for a server's faults.

`fragile_server.py SOCKET exit|hang`: GO, EXPORT_NAME and simple READs of zeroes work (every other command succeeds
too, whatever its offset), until a request asks for a command above 99. Then the process dies, or stops serving
everyone without dying.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time

COMMAND_LIMIT = 99
EXPORT = struct.pack(">QH", 1 << 20, 0x0001)
HANG_S = 3600


def exactly(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def shake_hands(sock: socket.socket) -> None:
    sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
    exactly(sock, 4)
    while True:
        magic, option, length = struct.unpack(">8sII", exactly(sock, 16))
        if magic != b"IHAVEOPT" or length > 1 << 20:
            raise EOFError
        exactly(sock, length)
        head = struct.pack(">QI", 0x0003E889045565A9, option)
        if option == 1:
            sock.sendall(EXPORT)
            return
        if option == 7:
            sock.sendall(head + struct.pack(">II", 3, 12) + b"\0\0" + EXPORT + head + struct.pack(">II", 1, 0))
            return
        sock.sendall(head + struct.pack(">II", 0x80000001, 0))


def serve(sock: socket.socket, lock: threading.Lock, mode: str) -> None:
    try:
        shake_hands(sock)
        while True:
            magic, _, command, cookie, _, length = struct.unpack(">IHHQQI", exactly(sock, 28))
            if magic != 0x25609513 or length > 1 << 20 or command == 2:
                return
            if command > COMMAND_LIMIT:
                if mode == "exit":
                    os._exit(1)
                with lock:
                    time.sleep(HANG_S)
            if command == 1:
                exactly(sock, length)
            with lock:
                sock.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes(length if command == 0 else 0))
    except (EOFError, OSError, struct.error):
        return
    finally:
        sock.close()


def main() -> None:
    path, mode = sys.argv[1:]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(128)
    os.rename(path + ".new", path)
    lock = threading.Lock()
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock, lock, mode), daemon=True).start()


if __name__ == "__main__":
    main()
