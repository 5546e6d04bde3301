"""One thread around one epoll, which sleeps until a socket or the image has something to do.

The loop knows neither NBD nor librbd: a `Member` is a socket that wants to go on when it can be
read or written, and a `PollableImage` is where requests are started and found finished later. No
thread hands anything to another, and no thread of the image's ever waits for the interpreter.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from typing import Final, Protocol

from rbdnbd.buffers import Buffers

READABLE: Final = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
RECEIVED_AT_ONCE: Final = 256 << 10
_IDLE_SECONDS: Final = 5.0


class PollableImage(Protocol):
    """What the loop needs of an image; the loop's thread alone calls, and nothing blocks.

    What is started is finished later: `operation` then comes back from `finished`, and until then
    nobody else touches the buffer. Offsets and lengths are bytes. What cannot even be started
    raises `OSError`.
    """

    def fileno(self) -> int:
        """Return an eventfd that is readable when `finished` has something to tell."""

    def start_read(self, operation: Operation, offset: int, buffer: bytearray) -> None:
        """Fill the whole buffer."""

    def start_write(self, operation: Operation, offset: int, data: bytes | bytearray) -> None:
        """Write all of `data`; it is stable after a later flush."""

    def start_flush(self, operation: Operation) -> None:
        """Make stable what was finished before."""

    def start_discard(self, operation: Operation, offset: int, length: int) -> None:
        """Let go of the space."""

    def start_write_zeroes(
        self, operation: Operation, offset: int, length: int, *, no_hole: bool
    ) -> None:
        """Make the range read as zeroes; with `no_hole` its space stays allocated."""

    def finished(self) -> list[tuple[Operation, int | Exception]]:
        """Return what was done since the last call: how many bytes were read, or why it failed."""


class Operation(Protocol):
    """Something that was started: whoever started it is told the result, and the time it is."""

    @property
    def member(self) -> Member:
        """The member that goes on afterwards."""

    def finish(self, result: int | Exception, now: float) -> None:
        """Take the result of what was started last."""


class Member(Protocol):
    """A socket in the loop. `watched` is the loop's own."""

    watched: int

    def fileno(self) -> int:
        """Return the socket's descriptor, the same at all times."""

    def proceed(self, readable: bool, now: float) -> int | None:
        """Do what can be done; return the epoll events to wait for, None when all is over."""

    def leave(self, reason: str = "") -> None:
        """Hear that the loop has let go of the socket, or why it can serve nobody any more."""


class Loop:
    """The thread that serves all members of one image, for the time of a `with`."""

    def __init__(self, image: PollableImage) -> None:
        self.image = image
        self.buffers = Buffers()
        self.received = memoryview(bytearray(RECEIVED_AT_ONCE))
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._members: dict[int, Member] = {}
        self._new: deque[Member] = deque()
        self._stopping = False
        self._over = ""
        self._thread = threading.Thread(target=self._run, name="nbd-loop", daemon=True)

    def __enter__(self) -> Loop:
        self._epoll.register(self._wake, select.EPOLLIN)
        # Each write to an eventfd is an edge, whether or not it is read (epoll(7)).
        self._epoll.register(self.image.fileno(), select.EPOLLIN | select.EPOLLET)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread; a member that is still served leaves, so that nobody waits for it."""
        self._stopping = True
        self.wake()
        self._thread.join()
        self._epoll.close()
        os.close(self._wake)

    def add(self, member: Member) -> None:
        """Serve a socket from now on. Any thread."""
        self._new.append(member)
        if self._over:
            member.leave(self._over)
        self.wake()

    def wake(self) -> None:
        """Have every member proceed. Any thread."""
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        over = "the event loop has ended"
        try:
            self._serve()
        except BaseException as error:  # a defect: better no device than one that waits for ever
            over = f"the event loop has failed: {error!r}"
            raise
        finally:
            self._over = over
            self._admit()
            for member in self._members.values():
                member.leave(over)

    def _serve(self) -> None:
        while not self._stopping:
            events = self._epoll.poll(_IDLE_SECONDS if self.buffers.kept else None)
            now = time.monotonic()
            for member, readable in self._touched(events, now).items():
                wanted = member.proceed(readable, now)
                if wanted != member.watched:
                    self._watch(member, wanted)
            if not events:
                self.buffers.clear()

    def _touched(self, events: list[tuple[int, int]], now: float) -> dict[Member, bool]:
        """Return the members that have something to do, and whether they can read."""
        touched: dict[Member, bool] = {}
        for number, event in events:
            if member := self._members.get(number):
                touched[member] = bool(event & READABLE)
            elif number == self._wake:
                os.eventfd_read(number)
                self._admit()
                for member in self._members.values():
                    touched.setdefault(member, False)
            else:
                for operation, result in self.image.finished():
                    operation.finish(result, now)
                    touched.setdefault(operation.member, False)
        return touched

    def _admit(self) -> None:
        while self._new:
            member = self._new.popleft()
            member.watched = 0
            self._members[member.fileno()] = member

    def _watch(self, member: Member, wanted: int | None) -> None:
        """Wait for these events on a member's socket; 0 for none, None to let go of it."""
        number = member.fileno()
        if not member.watched and wanted:
            self._epoll.register(number, wanted)
        elif member.watched and not wanted:
            self._epoll.unregister(number)
        elif wanted:
            self._epoll.modify(number, wanted)
        member.watched = wanted or 0
        if wanted is None:
            del self._members[number]
            member.leave()
