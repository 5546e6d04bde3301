"""The transmission phase of one connection in the loop's thread: `--io-engine events`.

The other engine beside the worker threads of `rbdnbd.server`: the same validation, the same
replies, the same figures. All requests that the socket holds are taken with one receive and
started; all replies that are ready leave with one send. A request is an operation from its header
to its reply, and as many are taken as there would be workers: a client that takes no replies is
not read from any more.

A small payload is copied out of what was received. A large one is received where it stays until
the image has it, and the next header then comes alone, or its payload would be copied too.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from typing import Final

from rbdnbd.buffers import Replies
from rbdnbd.loop import Loop
from rbdnbd.transmission import WORKERS, Transmission, failure, short_read, shut_down
from rbdnbd.wire import (
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    MAX_PAYLOAD,
    REQUEST_SIZE,
    Export,
    ProtocolError,
    Request,
    parse_request,
    simple_reply,
    validate,
)

_LARGE: Final = 32 << 10


class Performance:
    """One request from its header to its reply, as an operation of the loop's."""

    __slots__ = ("data", "member", "request", "started", "written")

    def __init__(self, member: EventConnection, request: Request, started: float) -> None:
        self.member = member
        self.request = request
        self.started = started
        self.data: bytes | bytearray = b""
        self.written = False

    def finish(self, result: int | Exception, now: float) -> None:
        """Go on with the flush that FUA asks for, or reply."""
        self.member.finished(self, result, now)


class EventConnection(Transmission):
    """One client in the transmission phase, as a member of a loop, which calls all else here."""

    def __init__(
        self, loop: Loop, sock: socket.socket, export: Export, *, limit: int = WORKERS
    ) -> None:
        super().__init__(sock, export)
        self.watched = 0
        self._loop, self._image = loop, loop.image
        self._limit = limit
        self._performances: dict[Performance, None] = {}
        self._rest = b""  # received, but not a whole request, or one too many
        self._payload: tuple[Performance, memoryview] | None = None
        self._thrown_away = 0  # bytes that are still to come
        self._large = False
        self._replies = Replies(sock, loop.buffers)
        self._deaf = False
        self._left = threading.Event()

    def serve(self) -> str:
        """Have the loop serve to the end."""
        self._sock.setblocking(False)
        self._loop.add(self)
        self._left.wait()
        self._sock.close()
        return self._reason

    def in_flight(self) -> list[tuple[Request, float]]:
        """Return the requests being performed and the `time.monotonic` when each was read."""
        return [(each.request, each.started) for each in list(self._performances)]

    def _owes(self) -> bool:
        return bool(self._performances or self._replies.unsent)

    def _look_up(self) -> None:
        self._loop.wake()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def leave(self, reason: str = "") -> None:
        """Let `serve` return."""
        if reason:
            self._end(RuntimeError(reason))
        self._left.set()

    def proceed(self, readable: bool, now: float) -> int | None:
        """Receive, start, send; return the events to wait for, None when all is over."""
        self._send()
        try:
            if readable and self._wants_more():
                self._receive(now)
                self._send()
            while len(self._rest) >= REQUEST_SIZE and self._has_room() and not self._ended:
                self._take_rest(now)
                self._send()
        except BlockingIOError:
            pass
        except (OSError, EOFError, MemoryError, ProtocolError) as error:
            self._hear_no_more(error)
        self._send()
        if self._ended and not self._owes():
            return None
        events = select.EPOLLIN if self._wants_more() else 0
        return events | (select.EPOLLOUT if self._replies.unsent else 0)

    def finished(self, performance: Performance, result: int | Exception, now: float) -> None:
        """Reply to what was performed, or flush first if that is asked for."""
        request = performance.request
        if isinstance(result, Exception):
            self._reply(performance, failure(request, result), now)
        elif request.type == CMD_READ:
            error = 0 if result == request.length else failure(request, short_read(result))
            self._reply(performance, error, now)
        elif request.flags & CMD_FLAG_FUA and request.type != CMD_FLUSH and not performance.written:
            performance.written = True
            self._begin(performance, now, self._image.start_flush)
        else:
            self._reply(performance, 0, now)

    def _has_room(self) -> bool:
        return len(self._performances) + self._replies.count < self._limit

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

    # ---- receiving

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
            position += REQUEST_SIZE
            if request.type == CMD_DISC:
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

    # ---- performing and replying

    def _start(self, performance: Performance, now: float) -> None:
        """Validate and start what was asked for, or reply at once why not."""
        if error := validate(performance.request, self.export):
            self._reply(performance, error, now)
        else:
            self._begin(performance, now, self._perform)

    def _begin(
        self, performance: Performance, now: float, begin: Callable[[Performance], None]
    ) -> None:
        """Start one call of the image, or reply at once why it cannot be started."""
        try:
            begin(performance)
        except Exception as cause:  # an answer is owed whatever happens, and it is not success
            self._reply(performance, failure(performance.request, cause), now)

    def _perform(self, performance: Performance) -> None:
        flags, command, _, offset, length = performance.request
        if command == CMD_READ:
            buffer = performance.data = self._loop.buffers.take(length)
            self._image.start_read(performance, offset, buffer)
        elif command == CMD_WRITE:
            self._image.start_write(performance, offset, performance.data)
        elif command == CMD_FLUSH:
            self._image.start_flush(performance)
        elif command == CMD_TRIM:
            self._image.start_discard(performance, offset, length)
        else:
            no_hole = bool(flags & CMD_FLAG_NO_HOLE)
            self._image.start_write_zeroes(performance, offset, length, no_hole=no_hole)

    def _reply(self, performance: Performance, error: int, now: float) -> None:
        """Queue one reply, and count it."""
        request, data = performance.request, performance.data
        del self._performances[performance]
        buffer = data if isinstance(data, bytearray) else None
        if buffer is not None and (error or request.type != CMD_READ):
            self._loop.buffers.give_back(buffer)
            buffer = None
        self._replies.add(simple_reply(request.cookie, error), buffer)
        self.stats.record(request.type, request.length, now - performance.started, error)

    def _send(self) -> None:
        if not self._replies.unsent:
            return
        try:
            self._replies.send()
        except OSError as error:
            self._replies.clear()
            self._hear_no_more(error)
            shut_down(self._sock, socket.SHUT_RDWR)
