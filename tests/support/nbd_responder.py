"""The least that answers the kernel: one thread, one socket, blocks in a dictionary."""

from __future__ import annotations

import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress

BLOCK = 512
READ, WRITE, DISC, FLUSH, TRIM = range(5)


class Responder:
    """Serves blocks of zeroes that remember what is written; `requests` are (type, offset, length).

    `client` is the end for the kernel. A `silent` one takes requests and answers none. The thread
    ends with the connection and closes its end. Run as a program, this module serves the socket
    that is its stdin, in the same way, until it is silent after so many requests and is killed.
    """

    def __init__(
        self, blocks: dict[int, bytes] | None = None, server: socket.socket | None = None
    ) -> None:
        self.blocks = dict(blocks or {})
        self.requests: list[tuple[int, int, int]] = []
        self.silent = False
        self._server, self.client = (server, server) if server else socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave the kernel alone."""
        with suppress(OSError):  # closed by the thread
            self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self.client.close()
        assert not self._thread.is_alive()

    def leave(self) -> None:
        """Take nothing that is sent from now on, answer what was sent, and hang up."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RD)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def saw(self, kind: int, length: int) -> bool:
        """Tell whether there was such a request."""
        return any(request[0] == kind and request[2] == length for request in self.requests)

    def _serve(self) -> None:
        with self._server:
            while len(header := self._server.recv(28, socket.MSG_WAITALL)) == 28:
                _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", header)
                self.requests.append((kind, offset, length))
                if kind == DISC:
                    return
                data = b""
                if kind == READ:
                    data = b"".join(
                        self.blocks.get(number, bytes(BLOCK)) for number in _numbers(offset, length)
                    )
                if kind == WRITE:
                    payload = self._server.recv(length, socket.MSG_WAITALL)
                    for position, number in enumerate(_numbers(offset, length)):
                        self.blocks[number] = payload[position * BLOCK : (position + 1) * BLOCK]
                if self.silent:
                    continue
                try:
                    self._server.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + data)
                except BrokenPipeError:
                    return


def _numbers(offset: int, length: int) -> range:
    return range(offset // BLOCK, (offset + length) // BLOCK)


if __name__ == "__main__":
    responder = Responder(server=socket.socket(fileno=0))
    while len(responder.requests) < int(sys.argv[1]):
        time.sleep(0.01)
    responder.silent = True
    while True:
        signal.pause()
