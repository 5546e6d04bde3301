"""Memory of the event loop's: buffers that are used again, and replies that wait to be sent."""

from __future__ import annotations

import socket
from typing import Final

KEPT_BYTES: Final = 32 << 20
"""Of buffers that wait to be used again: as much as the largest request."""
_SENT_AT_ONCE: Final = 1024  # IOV_MAX


class Buffers:
    """Buffers that were used before, by their size: fresh memory costs more than what it holds."""

    def __init__(self) -> None:
        self._free: dict[int, list[bytearray]] = {}
        self.kept = 0

    def take(self, length: int) -> bytearray:
        """Return a buffer of exactly this size, with anything in it."""
        free = self._free.get(length)
        if not free:
            return bytearray(length)
        self.kept -= length
        buffer = free.pop()
        if not free:  # a size that nobody may ever ask for again
            del self._free[length]
        return buffer

    def give_back(self, buffer: bytearray) -> None:
        """Keep a buffer for the next request of its size."""
        length = len(buffer)
        if self.kept + length <= KEPT_BYTES:
            self.kept += length
            self._free.setdefault(length, []).append(buffer)

    def clear(self) -> None:
        """Let go of all that is kept."""
        self._free.clear()
        self.kept = 0


class Replies:
    """What has yet to be sent on a socket; a buffer is given back when all before it is sent."""

    def __init__(self, sock: socket.socket, buffers: Buffers) -> None:
        self._sock = sock
        self._buffers = buffers
        self._pieces: list[bytes | bytearray | memoryview] = []
        self._lent: list[bytearray] = []
        self.unsent = 0
        """Bytes."""
        self.count = 0
        """Replies that may be among them: it falls to 0 when everything is sent."""
        self.whole = 0
        """Pieces that have left whole, since everything was sent."""

    def add(self, header: bytes, data: bytearray | None) -> None:
        """Have a reply be sent behind the others."""
        self._pieces.append(header)
        self.unsent += len(header)
        self.count += 1
        if data is not None:
            self._pieces.append(data)
            self._lent.append(data)
            self.unsent += len(data)

    def send(self) -> None:
        """Send what the socket takes. Raises `OSError` when the peer takes no more, ever."""
        while self.unsent:
            try:
                sent = self._sock.sendmsg(self._pieces[:_SENT_AT_ONCE])
            except BlockingIOError:
                return
            self.unsent -= sent
            if self.unsent:
                self._drop(sent)
        self.clear()

    def clear(self) -> None:
        """Forget what is not sent."""
        for buffer in self._lent:
            self._buffers.give_back(buffer)
        self._lent.clear()
        self._pieces.clear()
        self.unsent = self.count = self.whole = 0

    @property
    def next_piece(self) -> int:
        """Bytes of the piece that leaves next."""
        return len(self._pieces[0])

    def _drop(self, sent: int) -> None:
        """Drop the first `sent` bytes."""
        whole = 0
        for piece in self._pieces:
            if sent < len(piece):
                break
            sent -= len(piece)
            whole += 1
        del self._pieces[:whole]
        self.whole += whole
        if sent:
            self._pieces[0] = memoryview(self._pieces[0])[sent:]
