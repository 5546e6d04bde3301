"""What a peer that nobody knows may hold, and how long it may take for what it has begun.

The kernel's own end of a socket pair is trusted. The clients of a listening socket are not: each of
them may have so much memory for payloads and for replies that it has not taken, and all of them
together no more than the server has for them. Whoever wants more is not read from until others are
done, but a little is everybody's own, so that nobody is kept out by those who hoard. And what a
peer has begun, a request or the taking of a reply, it must end in time. To do nothing at all is
allowed for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from rbdnbd.wire import CMD_READ, CMD_WRITE, MAX_PAYLOAD, Request

SERVER_BYTES: Final = 256 << 20
"""For payloads and replies of all connections, beyond what is each one's own."""
CONNECTION_BYTES: Final = 64 << 20
OWN_BYTES: Final = 256 << 10
"""What a connection always has, whatever others hold."""
WORKERS_OF_ALL: Final = 1024
"""Threads of all connections, beyond the one that each has (rbdnbd.server)."""
SECONDS: Final = 30.0
"""For what a peer has begun, beyond the time that it takes at `BYTES_A_SECOND`."""
BYTES_A_SECOND: Final = 256 << 10

REQUEST: Final = "a request"
REPLIES: Final = "taking its replies"
"""What a peer can have begun."""


class Distrust:
    """What the connections of one server share; any thread may call."""

    def __init__(
        self,
        *,
        memory: int = SERVER_BYTES,
        own: int = OWN_BYTES,
        workers: int = WORKERS_OF_ALL,
        seconds: float = SECONDS,
        bytes_a_second: int = BYTES_A_SECOND,
    ) -> None:
        self.memory = memory
        self.own = own
        self.seconds = seconds
        self.bytes_a_second = bytes_a_second
        self.lock = threading.Lock()
        self.used = self.most_used = 0
        """Bytes beyond what is each connection's own: now, and at most so far."""
        self.workers = workers
        """Threads that may yet be started."""
        self.waiting: set[Peer] = set()

    def peer(self, wake: Callable[[], None]) -> Peer:
        """Return the account of one connection; `wake` has it try again to take memory."""
        return Peer(self, wake)


class Peer:
    """One connection's account: what it holds, and what it has begun."""

    def __init__(self, distrust: Distrust, wake: Callable[[], None]) -> None:
        self._distrust = distrust
        self._wake = wake
        self._held = self._workers = 0
        self._begun: dict[str, tuple[object, float]] = {}

    def take(self, request: Request) -> bool:
        """Take the memory that a request needs; if there is none, `wake` is called when to retry.

        A connection's one reader calls.
        """
        length = cost(request)
        shared = self._distrust
        with shared.lock:
            more = self._beyond(self._held + length) - self._beyond(self._held)
            if self._held + length > CONNECTION_BYTES or shared.used + more > shared.memory:
                shared.waiting.add(self)
                return False
            self._held += length
            shared.used += more
            shared.most_used = max(shared.most_used, shared.used)
            return True

    def give_back(self, length: int) -> None:
        """Give memory back, in bytes, and have those try again who wait for it."""
        if not length:
            return
        shared = self._distrust
        with shared.lock:
            shared.used -= self._beyond(self._held) - self._beyond(self._held - length)
            self._held -= length
            waiting, shared.waiting = shared.waiting, set()
        for peer in waiting:
            peer._wake()

    def take_worker(self) -> bool:
        """Tell whether one thread more may be started."""
        shared = self._distrust
        with shared.lock:
            taken = min(shared.workers, 1)
            shared.workers -= taken
            self._workers += taken
            return bool(taken)

    def leave(self) -> None:
        """Give everything back: the connection has ended."""
        shared = self._distrust
        with shared.lock:
            shared.waiting.discard(self)
            shared.workers += self._workers
            self._workers = 0
        self.give_back(self._held)

    def begin(self, what: str, length: int, which: object = None) -> None:
        """Have the peer be overdue if it has not ended so many bytes of `what` in time.

        To begin the same one again changes nothing; with another, time begins anew.
        """
        if what not in self._begun or self._begun[what][0] != which:
            shared = self._distrust
            limit = shared.seconds + length / shared.bytes_a_second
            self._begun[what] = (which, time.monotonic() + limit)

    def end(self, what: str) -> None:
        """Hear that what was begun is done, if it was begun."""
        self._begun.pop(what, None)

    def overdue(self, now: float) -> str:
        """Return what has not been ended in time, "" for nothing."""
        late = (what for what, (_, deadline) in list(self._begun.items()) if now > deadline)
        return next(late, "")

    def _beyond(self, held: int) -> int:
        return max(0, held - self._distrust.own)


def cost(request: Request) -> int:
    """Return how many bytes of payload or reply a request has."""
    carries = request.type in (CMD_READ, CMD_WRITE) and request.length <= MAX_PAYLOAD
    return request.length if carries else 0
