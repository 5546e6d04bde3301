"""A client with nothing between a test and the bytes: it can break the protocol, libnbd cannot.

Written from NetworkBlockDevice/nbd, doc/proto.md, not from rbdnbd's own modules.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from types import TracebackType

READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE = 1, 2
EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28

OPT_GO = 7
_REQUEST = struct.Struct(">IHHQQI")
_LIMIT = 10.0


def refusal(command: int, offset: int, length: int, flags: int, size: int) -> int:
    """Return the error that a request to a writable export of this size is refused with, or 0."""
    legal = FUA | NO_HOLE if command == WRITE_ZEROES else FUA
    if flags & ~legal or command not in (READ, WRITE, FLUSH, TRIM, WRITE_ZEROES):
        return EINVAL
    if command == FLUSH:
        return EINVAL if offset or length else 0
    if not length:
        return EINVAL
    if offset + length > size:
        return ENOSPC if command in (WRITE, WRITE_ZEROES) else EINVAL
    return 0


class RawClient:
    """The client's end of a connection; every wait ends after 10 s with `TimeoutError`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(_LIMIT)
        self._cookies = itertools.count(1)
        self._reads: dict[int, int] = {}

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        """Receive exactly `length` bytes; `EOFError` when the server hangs up before."""
        received = bytearray()
        while len(received) < length:
            data = self.sock.recv(length - len(received))
            if not data:
                raise EOFError(f"the server hung up after {len(received)} of {length} bytes")
            received += data
        return bytes(received)

    def ended(self) -> bool:
        """Wait for what comes next; tell whether it is the end of the connection."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def take_all(self) -> None:
        """Take whatever the server sends until it hangs up."""
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(1 << 20):
                pass

    def greet(self, flags: int = 3) -> None:
        """Take the server's greeting and answer with the client flags."""
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.send(struct.pack(">I", flags))

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send one option; return its replies up to the one that is no intermediate one."""
        self.send(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        replies = []
        while not replies or replies[-1][0] in (2, 3):
            magic, to, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, to) == (0x3E889045565A9, number)
            replies.append((kind, self.receive(length)))
        return replies

    def go(self) -> RawClient:
        """Negotiate the default export."""
        self.greet()
        assert self.option(OPT_GO, bytes(6))[-1] == (1, b"")
        return self

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
    ) -> int:
        """Send one request, with a payload's length unless told another; return its cookie."""
        cookie = next(self._cookies) if cookie is None else cookie
        length = length or len(payload)
        if command == READ:
            self._reads[cookie] = length
        header = _REQUEST.pack(0x25609513, flags, command, cookie, offset, length)
        self.send(header + payload)
        return cookie

    def reply(self) -> tuple[int, int, bytes]:
        """Receive one reply as (cookie, error, data), whichever request it answers."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698, f"expected a simple reply, got magic {magic:#x}"
        return cookie, error, self.receive(0 if error else self._reads.get(cookie, 0))

    def call(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> tuple[int, bytes]:
        """Send one request and wait for its reply; return (error, data)."""
        sent = self.request(command, offset, length, flags, payload)
        cookie, error, data = self.reply()
        assert cookie == sent, f"expected a reply to {sent}, got one to {cookie}"
        return error, data

    def read(self, offset: int, length: int) -> bytes:
        """Read, and expect success."""
        error, data = self.call(READ, offset, length)
        assert error == 0
        return data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write, and expect success."""
        assert self.call(WRITE, offset, flags=flags, payload=data) == (0, b"")
