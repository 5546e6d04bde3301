"""The transmission phase of one connection: worker threads, replies, drain.

One worker thread for each request in flight, as leader and followers: an idle worker takes the
reading turn, reads one request, passes the turn on, performs the request with a blocking call of
the image, and sees to its reply. No dispatcher and no queue of requests: a request belongs to one
thread from its header to its result. Workers are started when a request arrives and no idle one is
left, up to a limit.

Whoever sends a reply sends all that are ready, in one call: a worker with a small one that finds
another at it leaves it there and goes on. Threads that wait for each other are what an interpreter
with one lock is slow at.

Each request is validated, then performed, then answered. One that fails validation still has its
payload read, so that the stream stays in step. An error of the image goes back as the error number
nearest to its errno and is logged with offset and length; nothing is masked as success.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from typing import Final

from rbdnbd.distrust import REPLIES, REQUEST, cost
from rbdnbd.stream import receive, send, throw_away
from rbdnbd.transmission import (
    WORKERS,
    Engine,
    Image,
    Transmission,
    short_read,
    shut_down,
)
from rbdnbd.turn import Turn
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

log = logging.getLogger(__name__)

_SENT_AT_ONCE: Final = 512  # replies; IOV_MAX is twice that
_LARGE: Final = 256 << 10
"""A worker waits to send a reply of this size: what has yet to be sent stays within bounds."""


class Performance:
    """One request from its header to its reply."""

    __slots__ = ("data", "error", "request", "started")

    def __init__(self, request: Request, started: float) -> None:
        self.request = request
        self.started = started
        self.error = 0
        self.data = b""


class Connection(Transmission):
    """One client in the transmission phase, on a connected stream socket closed at the end."""

    def __init__(
        self, sock: socket.socket, image: Image, export: Export, *, workers: int = WORKERS
    ) -> None:
        super().__init__(sock, export)
        self._image = image
        self._limit = workers
        self._workers: list[threading.Thread] = []
        self._in_flight: dict[Performance, None] = {}
        self._unsent: deque[Performance] = deque()
        self._turn = Turn()
        self._sending = threading.Lock()
        self._changed = threading.Event()

    def serve(self) -> str:
        """Serve until the client leaves or `stop` is called, and every request read is answered.

        The calling thread is the first worker. Returns why it ended, for the log; "" for a client
        that said goodbye (NBD_CMD_DISC) or was stopped.
        """
        try:
            self._workers.append(threading.current_thread())
            self._work()
            for worker in self._workers[1:]:
                worker.join()
        finally:
            self._sock.close()
            if self._peer:
                self._peer.leave()
        return self._reason

    def in_flight(self) -> list[tuple[Request, float]]:
        """Return the requests being performed and the `time.monotonic` when each was read."""
        return [(each.request, each.started) for each in list(self._in_flight)]

    def _owes(self) -> bool:
        return bool(self._in_flight)

    def _look_up(self) -> None:
        self._changed.set()

    def _work(self) -> None:
        call = Turn.call()
        while True:
            self._turn.take(call)
            try:
                taken = self._take()
            finally:
                self._turn.pass_on()
            if taken is None:
                return
            self._answer(*taken)
            del taken  # an idle worker holds on to no payload

    def _answer(self, performance: Performance, payload: bytes) -> None:
        """Validate, then perform, then reply."""
        request = performance.request
        performance.error = validate(request, self.export)
        if not performance.error:
            performance.error, performance.data = self._perform(request, payload)
        self._reply(performance)

    def _take(self) -> tuple[Performance, bytes] | None:
        """Read one request in the reading turn; None when there will be no more."""
        if self._ended:
            return None
        performance = None
        try:
            request = parse_request(self._header())
            if request.type == CMD_DISC:
                if self.trace:
                    self.trace.request(request)
                self._ended = True
                return None
            if not self._has_memory(request):
                self._ended = True
                return None
            performance = Performance(request, time.monotonic())
            self._in_flight[performance] = None
            payload = self._payload(request) if request.type == CMD_WRITE else b""
            self._hear_if_repeated()
        except (OSError, EOFError, MemoryError, ProtocolError) as error:
            if performance:
                del self._in_flight[performance]
            self._end(error)
            return None
        if self.trace:
            self.trace.request(request, payload)
        if len(self._workers) < self._limit and not self._turn.is_waited_for():
            self._add_worker()
        return performance, payload

    def _header(self) -> bytes:
        """Wait for the next request; it has begun with its first byte."""
        if self._peer is None:
            return receive(self._sock, REQUEST_SIZE)
        header = self._sock.recv(REQUEST_SIZE)
        if 0 < len(header) < REQUEST_SIZE:
            self._peer.begin(REQUEST, REQUEST_SIZE)
            header = receive(self._sock, REQUEST_SIZE, header)
            self._peer.end(REQUEST)
        return header or receive(self._sock, REQUEST_SIZE)

    def _has_memory(self, request: Request) -> bool:
        """Wait until there is memory for a request; False if the connection ends before."""
        while self._peer and not self._peer.take(request):
            self._changed.wait()
            self._changed.clear()
            if self._ended:
                return False
        return True

    def _add_worker(self) -> None:
        if self._peer and not self._peer.take_worker():
            return
        worker = threading.Thread(target=self._work, name=f"nbd-{len(self._workers)}", daemon=True)
        try:
            worker.start()
        except RuntimeError as error:  # no more threads to be had: go on with those there are
            self._limit = len(self._workers)
            log.warning("%d workers, no more can be started: %s", self._limit, error)
        else:
            self._workers.append(worker)

    def _payload(self, request: Request) -> bytes:
        """Read a WRITE's payload; one that is too long to be taken is read and thrown away."""
        payload = b""
        if self._peer:
            self._peer.begin(REQUEST, request.length)
        if request.length > MAX_PAYLOAD:
            throw_away(self._sock, request.length)
        elif request.length:
            payload = receive(self._sock, request.length)
        if self._peer:
            self._peer.end(REQUEST)
        return payload

    def _perform(self, request: Request, payload: bytes) -> tuple[int, bytes]:
        """Do what a valid request asks for; return its NBD error, 0 for none, and data to send."""
        try:
            return 0, perform(self._image, request, payload)
        except Exception as error:  # an answer is owed whatever happens, and it is not success
            return self.failure(request, error), b""

    def _reply(self, performance: Performance) -> None:
        """Send one reply, and all others that are ready, unless another worker does."""
        self._unsent.append(performance)
        while self._unsent:
            wait = len(performance.data) >= _LARGE or len(self._unsent) >= self._limit
            if not self._sending.acquire(wait):
                return
            try:
                if len(self._unsent) == 1:  # as it mostly is
                    self._send([self._unsent.popleft()])
                elif ready := self._ready():
                    self._send(ready)
            finally:
                self._sending.release()

    def _ready(self) -> list[Performance]:
        """Return what is to be sent at once, in the order in which it was done."""
        count = min(len(self._unsent), _SENT_AT_ONCE)
        return [self._unsent.popleft() for _ in range(count)]

    def _send(self, ready: list[Performance]) -> None:
        """Send replies whole, and count them."""
        pieces = []
        for each in ready:
            header = simple_reply(each.request.cookie, each.error)
            if self.trace:
                self.trace.reply(header)
            pieces.append(header)
            if each.data:
                pieces.append(each.data)
        if self._peer:
            self._peer.begin(REPLIES, sum(map(len, pieces)))
        try:
            send(self._sock, pieces)
        except OSError as failure:
            self._end(failure)
            shut_down(self._sock, socket.SHUT_RDWR)
        now = time.monotonic()
        for each in ready:
            request = each.request
            self.stats.record(request.type, request.length, now - each.started, each.error)
            del self._in_flight[each]
        if self._peer:
            self._peer.end(REPLIES)
            self._peer.give_back(sum(cost(each.request) for each in ready))


def threads(image: Image, *, workers: int = WORKERS) -> Engine:
    """Return the engine of worker threads for an image."""
    return lambda sock, export: Connection(sock, image, export, workers=workers)


def perform(image: Image, request: Request, payload: bytes) -> bytes:
    """Carry out one validated request on the image; return the data of a READ.

    With FUA the request is answered only when it is stable: it is followed by a flush. Raises
    `OSError`, also for an image that returns less than it was asked for.
    """
    flags, command, _, offset, length = request
    data = b""
    if command == CMD_READ:
        data = image.read(offset, length)
        if len(data) != length:
            raise short_read(len(data))
        return data
    if command == CMD_WRITE:
        image.write(offset, payload)
    elif command == CMD_FLUSH:
        image.flush()
    elif command == CMD_TRIM:
        image.discard(offset, length)
    else:
        image.write_zeroes(offset, length, no_hole=bool(flags & CMD_FLAG_NO_HOLE))
    if flags & CMD_FLAG_FUA and command != CMD_FLUSH:
        image.flush()
    return data
