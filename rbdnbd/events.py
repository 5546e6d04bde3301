"""The transmission phase of one connection in the loop's thread: `--io-engine events`.

The other engine beside the worker threads of `rbdnbd.server`: the same validation, the same
replies, the same figures. All requests that the socket holds are taken with one receive and
started; all replies that are ready leave with one send. A request is an operation from its header
to its reply.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable

from rbdnbd.distrust import REPLIES, Peer, cost
from rbdnbd.loop import Loop
from rbdnbd.receiving import Performance, Receiving
from rbdnbd.transmission import WORKERS, short_read, shut_down
from rbdnbd.wire import (
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    REQUEST_SIZE,
    Export,
    ProtocolError,
    Request,
    simple_reply,
    validate,
)


class EventConnection(Receiving):
    """One client in the transmission phase, as a member of a loop, which calls all else here."""

    def __init__(
        self, loop: Loop, sock: socket.socket, export: Export, *, limit: int = WORKERS
    ) -> None:
        super().__init__(loop, sock, export, limit)
        self._image = loop.image
        self._answered = 0  # bytes, of requests whose replies may not have been sent
        self._left = threading.Event()

    def serve(self) -> str:
        """Have the loop serve to the end."""
        self._sock.setblocking(False)
        self._loop.add(self)
        self._left.wait()
        self._sock.close()
        if self._peer:
            self._peer.leave()
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
        """Receive, start, send; return the events to wait for, None when all is over.

        After what was sent last it is looked whether there is room for what was received before:
        nothing else may come that would have it looked for.
        """
        self._starved = False
        self._send()
        try:
            if readable and self._wants_more():
                self._receive(now)
                self._send()
            while len(self._rest) >= REQUEST_SIZE and self._has_room() and not self._ended:
                self._take_rest(now)
                self._send()
        except BlockingIOError:  # before a whole request, or in a payload: there is no rest
            self._send()
        except (OSError, EOFError, MemoryError, ProtocolError) as error:
            self._hear_no_more(error)
            self._send()
        if self._ended and not self._owes():
            return None
        if self._peer:
            self._note_request(self._peer)
        events = select.EPOLLIN if self._wants_more() else 0
        return events | (select.EPOLLOUT if self._replies.unsent else 0)

    def finished(self, performance: Performance, result: int | Exception, now: float) -> None:
        """Reply to what was performed, or flush first if that is asked for."""
        request = performance.request
        if isinstance(result, Exception):
            self._reply(performance, self.failure(request, result), now)
        elif request.type == CMD_READ:
            error = 0 if result == request.length else self.failure(request, short_read(result))
            self._reply(performance, error, now)
        elif request.flags & CMD_FLAG_FUA and request.type != CMD_FLUSH and not performance.written:
            performance.written = True
            self._begin(performance, now, self._image.start_flush)
        else:
            self._reply(performance, 0, now)

    def _start(self, performance: Performance, now: float) -> None:
        """Validate and start what was asked for, or reply at once why not.

        Raises `EOFError` if nobody waits for it any more.
        """
        try:
            self._hear_if_repeated()
        except EOFError:
            del self._performances[performance]
            raise
        if self.trace:
            self.trace.request(performance.request, performance.data)
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
            self._reply(performance, self.failure(performance.request, cause), now)

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
        header = simple_reply(request.cookie, error)
        if self.trace:
            self.trace.reply(header)
        self._replies.add(header, buffer)
        self._answered += cost(request)
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
        if self._peer:
            self._note_replies(self._peer)

    def _note_replies(self, peer: Peer) -> None:
        """Note whether the client takes its replies, and give back what it has taken."""
        if self._replies.unsent:
            peer.begin(REPLIES, self._replies.next_piece, self._replies.whole)
            return
        peer.end(REPLIES)
        answered, self._answered = self._answered, 0
        peer.give_back(answered)
