"""The receiving half of a connection in the loop's thread.

All requests that the socket holds are taken with one receive, and as many as there would be
workers: a client that takes no replies is not read from any more. A small payload is copied out of
what was received. A large one is received where it stays until the image has it, and the next
header then comes alone, or its payload would be copied too.
"""

from __future__ import annotations

import socket
from abc import abstractmethod
from typing import Final

from rbdnbd.buffers import Replies
from rbdnbd.distrust import REQUEST, Peer
from rbdnbd.loop import Loop
from rbdnbd.transmission import Transmission
from rbdnbd.wire import (
    CMD_DISC,
    CMD_WRITE,
    MAX_PAYLOAD,
    REQUEST_SIZE,
    Export,
    Request,
    parse_request,
)

_LARGE: Final = 32 << 10


class Performance:
    """One request from its header to its reply, as an operation of the loop's."""

    __slots__ = ("data", "member", "request", "started", "written")

    def __init__(self, member: Receiving, request: Request, started: float) -> None:
        self.member = member
        self.request = request
        self.started = started
        self.data: bytes | bytearray = b""
        self.written = False

    def finish(self, result: int | Exception, now: float) -> None:
        """Go on with the flush that FUA asks for, or reply."""
        self.member.finished(self, result, now)


class Receiving(Transmission):
    """One client in the transmission phase, as far as its requests; the loop's thread calls."""

    def __init__(self, loop: Loop, sock: socket.socket, export: Export, limit: int) -> None:
        super().__init__(sock, export)
        self.watched = 0
        self._loop = loop
        self._limit = limit
        self._performances: dict[Performance, None] = {}
        self._replies = Replies(sock, loop.buffers)
        self._rest = b""  # received, but not a whole request, or one too many
        self._payload: tuple[Performance, memoryview] | None = None
        self._thrown_away = 0  # bytes that are still to come
        self._large = False
        self._deaf = False
        self._requests = 0  # that were taken so far
        self._starved = False

    @abstractmethod
    def _start(self, performance: Performance, now: float) -> None:
        """Go on with a request that has been received whole."""

    @abstractmethod
    def fileno(self) -> int:
        """Return the socket's descriptor."""

    @abstractmethod
    def proceed(self, readable: bool, now: float) -> int | None:
        """Receive, start, send; return the events to wait for, None when all is over."""

    @abstractmethod
    def leave(self, reason: str = "") -> None:
        """Let `serve` return."""

    @abstractmethod
    def finished(self, performance: Performance, result: int | Exception, now: float) -> None:
        """Go on with what was performed."""

    def _has_room(self) -> bool:
        room = len(self._performances) + self._replies.count < self._limit
        return room and not self._starved

    def _has_memory(self, request: Request) -> bool:
        """Tell whether there is memory for a request; if not, none is taken for the time being."""
        self._starved = self._peer is not None and not self._peer.take(request)
        return not self._starved

    def _note_request(self, peer: Peer) -> None:
        """Note whether the client has begun a request and not ended it."""
        left = self._thrown_away + (len(self._payload[1]) if self._payload else 0)
        part = len(self._rest) if len(self._rest) < REQUEST_SIZE else 0
        if (left or part) and not self._deaf:
            peer.begin(REQUEST, left or REQUEST_SIZE, (self._requests, not left))
        else:
            peer.end(REQUEST)

    def _wants_more(self) -> bool:
        """Tell whether the socket is to be read: for the rest of a payload, or for a request."""
        if self._deaf:
            return False
        if self._payload or self._thrown_away:
            return True
        return not self._ended and len(self._rest) < REQUEST_SIZE and self._has_room()

    def _hear_no_more(self, error: Exception) -> None:
        """End the receiving side; a request that did not come whole is forgotten."""
        self._deaf = True
        if self._payload:
            del self._performances[self._payload[0]]
            self._payload = None
        self._thrown_away = 0
        self._end(error)

    def _receive(self, now: float) -> None:
        if self._payload:
            self._receive_payload(now)
            return
        received = self._loop.received
        if self._thrown_away:
            self._thrown_away -= self._into(received[: self._thrown_away], "in mid-request")
            return
        begun = len(self._rest)
        received[:begun] = self._rest
        window = received[begun:REQUEST_SIZE] if self._large else received[begun:]
        count = self._into(window, "in mid-request" if begun else "")
        self._take(received[: begun + count], now)
        if self._payload and count == len(window):
            self._receive_payload(now)

    def _receive_payload(self, now: float) -> None:
        assert self._payload
        performance, window = self._payload
        count = self._into(window, "in mid-request")
        if count < len(window):
            self._payload = (performance, window[count:])
        else:
            self._payload = None
            self._start(performance, now)

    def _into(self, window: memoryview, where: str) -> int:
        count = self._sock.recv_into(window)
        if not count:
            raise EOFError("the peer hung up" + (f" {where}" if where else ""))
        return count

    def _take_rest(self, now: float) -> None:
        """Start what there was no room for before."""
        received = self._loop.received[: len(self._rest)]
        received[:] = self._rest
        self._take(received, now)

    def _take(self, received: memoryview, now: float) -> None:
        """Start every whole request of what was received, and keep the rest."""
        position, end = 0, len(received)
        while end - position >= REQUEST_SIZE and self._has_room():
            request = parse_request(received, position)
            if not self._has_memory(request):
                break
            position += REQUEST_SIZE
            self._requests += 1
            if request.type == CMD_DISC:
                if self.trace:
                    self.trace.request(request)
                self._ended = self._deaf = True
                break
            performance = Performance(self, request, now)
            self._performances[performance] = None
            if request.type != CMD_WRITE:
                self._large = False
                self._start(performance, now)
                continue
            position = self._take_payload(performance, received, position, now)
        self._rest = bytes(received[position:])

    def _take_payload(
        self, performance: Performance, received: memoryview, position: int, now: float
    ) -> int:
        """Take a WRITE's payload as far as it was received; return where the next request begins.

        One that is too long to be taken is thrown away.
        """
        length = performance.request.length
        end = min(position + length, len(received))
        self._large = length >= _LARGE
        if length > MAX_PAYLOAD:
            self._thrown_away = length - (end - position)
            self._start(performance, now)
        elif end - position == length:
            performance.data = bytes(received[position:end])
            self._start(performance, now)
        else:
            performance.data = self._loop.buffers.take(length)
            view = memoryview(performance.data)
            view[: end - position] = received[position:end]
            self._payload = (performance, view[end - position :])
        return end
