"""Bytes on a blocking stream socket: exactly so many of them, or all."""

from __future__ import annotations

import socket
from typing import Final

_THROWN_AWAY_AT_ONCE: Final = 1 << 20


def receive(sock: socket.socket, length: int, begun: bytes = b"") -> bytes:
    """Read exactly `length` bytes, `begun` among them; without a copy if they arrive in one piece.

    Raises EOFError if the peer hangs up before, and `OSError`.
    """
    data = sock.recv(length - len(begun), socket.MSG_WAITALL)
    if len(data) == length:
        return data
    received = bytearray(begun + data)
    while len(received) < length:
        if not data:
            raise EOFError("the peer hung up" + (" in mid-request" if received else ""))
        data = sock.recv(length - len(received), socket.MSG_WAITALL)
        received += data
    return bytes(received)


def throw_away(sock: socket.socket, length: int) -> None:
    """Read exactly `length` bytes that nobody wants; raises as `receive` does."""
    while length:
        length -= len(receive(sock, min(length, _THROWN_AWAY_AT_ONCE)))


def send(sock: socket.socket, pieces: list[bytes]) -> None:
    """Send all of it in one call, and the rest should the kernel take only a part."""
    sent = sock.sendmsg(pieces)
    if sent < sum(map(len, pieces)):
        sock.sendall(memoryview(b"".join(pieces))[sent:])
