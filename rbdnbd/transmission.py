"""What both engines share of the transmission phase: what an image is, and how a connection ends.

An engine serves the requests of one connection: `rbdnbd.server` with a thread for each of them,
`rbdnbd.events` with one thread for all. They validate, perform and reply alike.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

from rbdnbd.distrust import Distrust, Peer
from rbdnbd.stats import Stats
from rbdnbd.trace import Trace
from rbdnbd.wire import Export, Request, nbd_error

log = logging.getLogger(__name__)

WORKERS: Final = 128
"""Requests of one connection in flight: the kernel's queue depth (nbd.c, tag_set.queue_depth)."""

_DRAIN_INTERVAL: Final = 0.005
_LASTING: Final = {errno.ESHUTDOWN, errno.EROFS}
_SAY_SECONDS: Final = 60.0


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


class Lasting:
    """What requests of one image fail with for as long as it lasts: said once a minute."""

    def __init__(self) -> None:
        self._said: dict[int, float] = {}
        self._lock = threading.Lock()

    def is_news(self, number: int) -> bool:
        """Tell whether an errno has not been said for a minute; then it is, by the caller."""
        now = time.monotonic()
        with self._lock:
            if now - self._said.get(number, -_SAY_SECONDS) < _SAY_SECONDS:
                return False
            self._said[number] = now
            return True

    def has(self, number: int) -> bool:
        """Tell whether requests have failed with an errno."""
        return number in self._said


class Transmission(ABC):
    """One client in the transmission phase, on a connected stream socket closed at the end.

    Any thread may call its methods, at any time.
    """

    def __init__(self, sock: socket.socket, export: Export) -> None:
        self.stats = Stats()
        self.export = export
        self.trace: Trace | None = None
        """Told of every request and every reply; set before `serve`."""
        self.lasting = Lasting()
        """What has been said of the image, with those who serve it too; set before `serve`."""
        self.has_siblings = False
        """The peer sends again elsewhere what is not answered when it hangs up; before `serve`."""
        self._sock = sock
        self._ended = False
        self._reason = ""
        self._lost = False
        self._peer: Peer | None = None

    def distrust(self, distrust: Distrust) -> None:
        """Hold the client to limits, which the kernel's own end has none of; before `serve`."""
        self._peer = distrust.peer(self._look_up)

    def hang_up_if_overdue(self, now: float) -> None:
        """Abort the connection of a client that has not ended in time what it began."""
        if self._peer and (what := self._peer.overdue(now)):
            self._end(TimeoutError(f"it has not ended in time {what}"))
            self.abort()

    @abstractmethod
    def serve(self) -> str:
        """Serve until the client leaves or `stop` is called, and every request read is answered.

        Returns why it ended, for the log; "" for a client that said goodbye (NBD_CMD_DISC) or was
        stopped.
        """

    @abstractmethod
    def in_flight(self) -> list[tuple[Request, float]]:
        """Return the requests being performed and the `time.monotonic` when each was read."""

    def stop(self, patience: float = 0.0) -> None:
        """Take no further request; those that have been taken are answered.

        The kernel's driver hangs up when its next request cannot be sent (nbd_mark_nsock_dead), so
        that replies which are still on their way are lost: for at most `patience` seconds it is
        given them before the socket is shut.
        """
        self._ended = True
        deadline = time.monotonic() + patience
        while self._owes() and time.monotonic() < deadline:
            time.sleep(_DRAIN_INTERVAL)
        shut_down(self._sock, socket.SHUT_RD)
        self._look_up()

    def abort(self) -> None:
        """Hang up without waiting for a peer that does not take its replies."""
        self._ended = True
        shut_down(self._sock, socket.SHUT_RDWR)
        self._look_up()

    def resize(self, size: int) -> None:
        """Have requests be held against a new size, in bytes, from now on."""
        self.export = replace(self.export, size=size)

    def ended(self) -> bool:
        """Tell whether no further request will be read."""
        return self._ended

    def hung_up(self) -> bool:
        """Tell whether the peer has hung up, even if what it sent before is not read yet."""
        if self._lost:
            return True
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLRDHUP)
            return bool(poll.poll(0))
        except ValueError:  # closed by us
            return False

    def _hear_if_repeated(self) -> None:
        """Raise `EOFError` for a request that was received, but has been sent again elsewhere.

        It must not be performed: the repeated one may have been answered already, and what was
        written there after that would be overwritten.
        """
        if self.has_siblings and self.hung_up():
            raise EOFError("the peer hung up")

    @abstractmethod
    def _owes(self) -> bool:
        """Tell whether a reply has yet to be sent."""

    def _look_up(self) -> None:  # noqa: B027
        """Have whoever serves see what has changed, if the socket does not tell."""

    def failure(self, request: Request, error: Exception) -> int:
        """Log why a request failed and return the NBD error that answers it, never 0.

        When this client was blocklisted, or another one keeps the lock, requests fail from then on:
        that is said once a minute, not of each.
        """
        if isinstance(error, OSError):
            number, cause = nbd_error(error.errno or errno.EIO), str(error)
        elif isinstance(error, MemoryError):
            number, cause = nbd_error(errno.ENOMEM), "out of memory"
        else:
            number, cause = nbd_error(errno.EIO), repr(error)
        lasting = error.errno if isinstance(error, OSError) and error.errno in _LASTING else None
        if lasting is None:
            where = f"{request.length} bytes at {request.offset}"
            log.error("%s of %s failed: %s", request.name, where, cause)
        elif self.lasting.is_news(lasting):
            log.error("requests of %s fail from now on: %s", self.export.name, cause)
        return number

    def _end(self, error: Exception) -> None:
        if not self._ended:
            self._ended = True
            self._reason = str(error)
            self._lost = isinstance(error, EOFError | ConnectionError)


Engine = Callable[[socket.socket, Export], Transmission]
"""Makes what serves a client on a connected socket, for an image that it knows."""


def of_one_image(engine: Engine, trace: Trace | None) -> Engine:
    """Return an engine whose connections write one trace, and say together what lasts."""
    lasting = Lasting()

    def connect(sock: socket.socket, export: Export) -> Transmission:
        connection = engine(sock, export)
        connection.trace = trace
        connection.lasting = lasting
        return connection

    return connect


def short_read(length: int) -> OSError:
    """Return what an image has failed with that read less than it was asked for."""
    return OSError(errno.EIO, f"short read of {length} bytes")


def shut_down(sock: socket.socket, how: int) -> None:
    """Shut a socket down that may be shut already, or closed."""
    with contextlib.suppress(OSError):  # it is shut already, or closed
        sock.shutdown(how)
