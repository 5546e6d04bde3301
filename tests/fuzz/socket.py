"""A socket with nothing behind it: the bytes of one input, received in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_FIRST: Final = 24


class MemorySocket:
    """What both engines need of a stream socket whose peer sends `data` and then hangs up.

    None of the first receives returns more than `piece` bytes, MSG_WAITALL or not. In each of the
    first turns no more than `taken` bytes are sent, where that is given; `turn` begins the next.
    """

    def __init__(self, data: bytes, piece: int, taken: int | None = None) -> None:
        self._data = data
        self._piece = piece
        self._taken = self._left = taken
        self._receives = self._turns = 0
        self.position = 0
        self.sent = bytearray()

    def turn(self) -> None:
        """Take replies again."""
        self._turns += 1
        self._left = self._taken if self._turns < _FIRST else None

    def unlimited(self) -> None:
        """Take every reply at once, as a socket does that blocks."""
        self._left = None

    def recv(self, length: int, flags: int = 0) -> bytes:
        """Return what comes next, b"" at the end."""
        self._receives += 1
        if self._receives < _FIRST:
            length = min(length, self._piece)
        data = self._data[self.position : self.position + length]
        self.position += len(data)
        return data

    def recv_into(self, window: memoryview) -> int:
        """Fill a window as far as `recv` does."""
        data = self.recv(len(window))
        window[: len(data)] = data
        return len(data)

    def sendmsg(self, pieces: Sequence[bytes]) -> int:
        """Take all of it, or what is left of this turn."""
        data = b"".join(pieces)
        if self._left is not None:
            if not self._left:
                raise BlockingIOError
            data = data[: self._left]
            self._left -= len(data)
        self.sent += data
        return len(data)

    def sendall(self, data: bytes) -> None:
        """Take all of it."""
        self.sent += data

    def setblocking(self, flag: bool) -> None:
        """Do nothing: nothing here blocks."""

    def shutdown(self, how: int) -> None:
        """Do nothing: nobody is there."""

    def close(self) -> None:
        """Do nothing."""
