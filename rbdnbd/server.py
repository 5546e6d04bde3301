"""The transmission phase of one connection: worker threads, replies, drain.

One worker thread for each request in flight, as leader and followers: an idle worker takes the
reading turn, reads one request, passes the turn on, performs the request with a blocking call of
the image, and sends its own reply. No dispatcher and no queue between threads: a request belongs to
one thread from its header to its reply. Workers are started when a request arrives and no idle one
is left, up to a limit.

Each request is validated, then performed, then answered. One that fails validation still has its
payload read, so that the stream stays in step. An error of the image goes back as the error number
nearest to its errno and is logged with offset and length; nothing is masked as success.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from dataclasses import replace
from typing import Final, Protocol

from rbdnbd.stats import Stats
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
    nbd_error,
    parse_request,
    simple_reply,
    validate,
)

log = logging.getLogger(__name__)

WORKERS: Final = 128
"""Requests of one connection in flight: the kernel's queue depth (nbd.c, tag_set.queue_depth)."""

_DISCARDED_AT_ONCE: Final = 1 << 20
_DRAIN_INTERVAL: Final = 0.005


class Image(Protocol):
    """What the server needs of an image: blocking calls that any thread may make.

    Offsets and lengths are bytes within the image. Every failure is an `OSError` with its errno; a
    call that returns has done all of what it was asked.
    """

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`; it is stable after a later `flush`."""

    def flush(self) -> None:
        """Return when every write that has returned before is stable."""

    def discard(self, offset: int, length: int) -> None:
        """Let go of the space; what is read there afterwards is anything."""

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        """Make the range read as zeroes; with `no_hole` its space stays allocated."""


class Connection:
    """One client in the transmission phase, on a connected stream socket closed at the end."""

    def __init__(
        self, sock: socket.socket, image: Image, export: Export, *, workers: int = WORKERS
    ) -> None:
        self.stats = Stats()
        self._sock = sock
        self._image = image
        self.export = export
        self._limit = workers
        self._workers: list[threading.Thread] = []
        self._in_flight: dict[int, tuple[Request, float]] = {}
        self._turn = threading.Lock()
        self._sending = threading.Lock()
        self._ended = False
        self._reason = ""

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
        return self._reason

    def stop(self, patience: float = 0.0) -> None:
        """Take no further request; those that have been taken are answered. Any thread, any time.

        The kernel's driver hangs up when its next request cannot be sent (nbd_mark_nsock_dead), so
        that replies which are still on their way are lost: for at most `patience` seconds it is
        given them before the socket is shut.
        """
        self._ended = True
        deadline = time.monotonic() + patience
        while self._in_flight and time.monotonic() < deadline:
            time.sleep(_DRAIN_INTERVAL)
        _shutdown(self._sock, socket.SHUT_RD)

    def abort(self) -> None:
        """Hang up without waiting for a peer that does not take its replies."""
        self._ended = True
        _shutdown(self._sock, socket.SHUT_RDWR)

    def resize(self, size: int) -> None:
        """Have requests be held against a new size, in bytes, from now on. Any thread."""
        self.export = replace(self.export, size=size)

    def ended(self) -> bool:
        """Tell whether no further request will be read."""
        return self._ended

    def in_flight(self) -> list[tuple[Request, float]]:
        """Return the requests being performed and the `time.monotonic` when each was read."""
        return list(self._in_flight.values())

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            self._answer(*taken)
            del taken  # an idle worker holds on to no payload

    def _answer(self, request: Request, payload: bytes) -> None:
        """Validate, then perform, then reply."""
        error = validate(request, self.export)
        data = b""
        if not error:
            error, data = self._perform(request, payload)
        self._reply(request, error, data)

    def _take(self) -> tuple[Request, bytes] | None:
        """Wait for the reading turn and read one request; None when there will be no more."""
        with self._turn:
            if self._ended:
                return None
            try:
                request = parse_request(self._receive(REQUEST_SIZE))
                if request.type == CMD_DISC:
                    self._ended = True
                    return None
                self._in_flight[threading.get_ident()] = (request, time.monotonic())
                payload = self._payload(request) if request.type == CMD_WRITE else b""
            except (OSError, EOFError, MemoryError, ProtocolError) as error:
                self._in_flight.pop(threading.get_ident(), None)
                self._end(error)
                return None
            if len(self._in_flight) == len(self._workers) < self._limit:
                self._add_worker()
            return request, payload

    def _end(self, error: Exception) -> None:
        if not self._ended:
            self._ended = True
            self._reason = str(error)

    def _add_worker(self) -> None:
        worker = threading.Thread(target=self._work, name=f"nbd-{len(self._workers)}", daemon=True)
        try:
            worker.start()
        except RuntimeError as error:  # no more threads to be had: go on with those there are
            self._limit = len(self._workers)
            log.warning("%d workers, no more can be started: %s", self._limit, error)
        else:
            self._workers.append(worker)

    def _receive(self, length: int) -> bytes:
        """Read exactly `length` bytes; without a copy if they arrive in one piece."""
        data = self._sock.recv(length, socket.MSG_WAITALL)
        if len(data) == length:
            return data
        received = bytearray(data)
        while len(received) < length:
            if not data:
                raise EOFError("the peer hung up" + (" in mid-request" if received else ""))
            data = self._sock.recv(length - len(received), socket.MSG_WAITALL)
            received += data
        return bytes(received)

    def _payload(self, request: Request) -> bytes:
        """Read a WRITE's payload; one that is too long to be taken is read and thrown away."""
        if request.length <= MAX_PAYLOAD:
            return self._receive(request.length) if request.length else b""
        left = request.length
        while left:
            left -= len(self._receive(min(left, _DISCARDED_AT_ONCE)))
        return b""

    def _perform(self, request: Request, payload: bytes) -> tuple[int, bytes]:
        """Do what a valid request asks for; return its NBD error, 0 for none, and data to send."""
        try:
            data = perform(self._image, request, payload)
        except OSError as error:
            number, cause = nbd_error(error.errno or errno.EIO), str(error)
        except MemoryError:
            number, cause = nbd_error(errno.ENOMEM), "out of memory"
        except Exception as error:  # an answer is owed whatever happens, and it is not success
            number, cause = nbd_error(errno.EIO), repr(error)
        else:
            return 0, data
        log.error(
            "%s of %d bytes at %d failed: %s", request.name, request.length, request.offset, cause
        )
        return number, b""

    def _reply(self, request: Request, error: int, data: bytes) -> None:
        """Send one reply whole, and count it."""
        header = simple_reply(request.cookie, error)
        with self._sending:
            try:
                _send(self._sock, header, data)
            except OSError as failure:
                self._end(failure)
                _shutdown(self._sock, socket.SHUT_RDWR)
            _, started = self._in_flight.pop(threading.get_ident())
            self.stats.record(request.type, request.length, time.monotonic() - started, error)


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
            raise OSError(errno.EIO, f"short read of {len(data)} bytes")
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


def _send(sock: socket.socket, header: bytes, data: bytes) -> None:
    """Send header and data in one call, and the rest of it should the kernel take only a part."""
    sent = sock.sendmsg([header, data]) if data else sock.send(header)
    total = len(header) + len(data)
    if sent < total:
        sock.sendall(memoryview(header + data)[sent:])


def _shutdown(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # it is shut already, or closed
        sock.shutdown(how)
