"""The connections of one mapping: served side by side, asked and ended as one.

All of them are of one image, so that a FLUSH on any covers what was answered on each. The mapping
lives until the last one has ended.

The driver treats a connection that has siblings in its own way: when a request on it takes longer
than the queue's timer, it hangs up and sends the request again on another one, even if the server
is merely slow (nbd_xmit_timeout, from Linux 4.12 on). So that a cluster which hangs does not cost
the device, the kernel gets another connection for each that it hangs up on. While too many requests
of the old ones are still being performed, that one is not read: however long the cluster hangs,
what is started has a bound. Done twice, a request does no harm: librbd keeps to the order in which
one process writes to an object, and what has been received of a connection that was dropped, but
not been started, is not started any more.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from rbdnbd.errors import RbdnbdError
from rbdnbd.stats import Stats, total
from rbdnbd.transmission import WORKERS, Engine, Transmission
from rbdnbd.wire import Export, Request

log = logging.getLogger(__name__)

DRAIN_SECONDS: Final = 30.0
"""Time for the kernel to take the replies that are owed to it when a mapping ends."""
_LOOK_SECONDS: Final = 0.25
_ON_THE_WAY_SECONDS: Final = 0.2  # from the driver's sending a request to our reading it
_POLL_SECONDS: Final = 0.005

Give = Callable[[Callable[[], socket.socket]], None]
"""Gives the kernel a socket that it makes by calling what it is given."""


class _Member:
    """One connection, and what has become of it at the kernel's end."""

    def __init__(self, transmission: Transmission) -> None:
        self.transmission = transmission
        self.thread = threading.Thread()
        self.taken: bool | None = None  # None: not known yet
        self.missed = False  # the kernel had hung up at the last look
        self.replaced = False


class Connections:
    """All connections of one mapping, for the time of a `with`; any thread may call its methods."""

    def __init__(
        self, connect: Engine, export: Export, ended: Callable[[str], None], *, several: bool
    ) -> None:
        """`ended` is told why when none is left; "" is the kernel's goodbye (NBD_CMD_DISC)."""
        self.goodbye = threading.Event()
        self.export = export
        self._connect, self._tell, self._several = connect, ended, several
        self._lock = threading.Lock()
        self._replacing = threading.Lock()
        self._stopping = threading.Event()
        self._members: list[_Member] = []
        self._past = Stats()
        self._attached = False
        self._reason = "the kernel hung up at once"
        self._give: Give | None = None
        self._watcher = threading.Thread(target=self._watch, name="connections", daemon=True)

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *_: object) -> None:
        """Answer what was read, and hang up on a kernel that does not take its replies."""
        with self._replacing:
            self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        deadline = time.monotonic() + DRAIN_SECONDS
        members = self._all()
        for each in members:
            each.transmission.stop(max(0.0, deadline - time.monotonic()))
        for each in members:
            each.thread.join(max(0.0, deadline - time.monotonic()))
        for each in members:
            each.transmission.abort()
        for each in members:
            each.thread.join()

    def offer(self) -> socket.socket:
        """Serve one more connection from now on; return the kernel's end."""
        return self._begin()[1]

    def attached(self, give: Give | None) -> None:
        """Hear that the kernel has taken what it was offered, and how it is given more.

        From now on an end counts. Without `give` a connection that ends is not replaced.
        """
        self._look_who_was_taken()
        self._attached, self._give = True, give
        if give:
            self._watcher.start()
        self._tell_if_over()

    def in_flight(self) -> list[tuple[Request, float]]:
        """Return the requests being performed and the `time.monotonic` when each was read."""
        return [asked for each in self._all() for asked in each.transmission.in_flight()]

    def stats(self) -> Stats:
        """Return the figures of all connections, past and present."""
        with self._lock:
            return total([self._past, *(each.transmission.stats for each in self._members)])

    def blocklisted(self) -> bool:
        """Tell whether requests have failed because this client was blocklisted, for ever."""
        return any(each.transmission.lasting.has(errno.ESHUTDOWN) for each in self._all())

    def resize(self, size: int) -> None:
        """Have requests be held against a new size, in bytes, from now on."""
        with self._lock:
            self.export = replace(self.export, size=size)
            for each in self._members:
                each.transmission.resize(size)

    def ended(self) -> bool:
        """Tell whether no further request will be read."""
        return all(each.transmission.ended() for each in self._all())

    def answer_what_was_sent(self, seconds: float) -> None:
        """Wait until what the kernel has sent by now is answered, for at most so many seconds."""
        deadline = time.monotonic() + seconds
        read_by = time.monotonic() + _ON_THE_WAY_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            owed = any(read < read_by for _, read in self.in_flight())
            if not owed and time.monotonic() > read_by:
                return

    def _all(self) -> list[_Member]:
        with self._lock:
            return list(self._members)

    def _begin(self) -> tuple[_Member, socket.socket]:
        ours, kernels = socket.socketpair()
        with self._lock:
            member = _Member(self._connect(ours, self.export))
            member.transmission.has_siblings = self._several
            self._members.append(member)
        member.thread = threading.Thread(
            target=self._serve, args=(member,), name="nbd-0", daemon=True
        )
        member.thread.start()
        return member, kernels

    def _serve(self, member: _Member) -> None:
        reason, dropped, transmission = "the server has failed", False, member.transmission
        try:
            self._wait_for_room(member)
            if dropped := transmission.hung_up():
                transmission.abort()
            reason = transmission.serve()
            if dropped:
                reason = "the peer hung up"
            elif reason:
                dropped = transmission.hung_up()
            elif member.taken is not False:
                self.goodbye.set()
        finally:
            self._leave(member, reason, dropped)

    def _wait_for_room(self, member: _Member) -> None:
        """Wait until what the kernel does not wait for any more is nearly done, or for the end."""

        def done_in_vain() -> int:
            each_one = (each.transmission for each in self._all())
            return sum(len(each.in_flight()) for each in each_one if each.hung_up())

        while done_in_vain() > WORKERS and not member.transmission.hung_up():
            if self._stopping.wait(_LOOK_SECONDS):
                return

    def _leave(self, member: _Member, reason: str, dropped: bool) -> None:
        if dropped and self._give and not self.goodbye.wait(_LOOK_SECONDS) and member.taken:
            self._replace(member)
        with self._lock:
            self._members.remove(member)
            self._past.add(member.transmission.stats)
            if member.taken:
                self._reason = reason
        self._tell_if_over()

    def _tell_if_over(self) -> None:
        if self._attached and all(each.taken is False for each in self._all()):
            self._tell("" if self.goodbye.is_set() else self._reason)

    def _watch(self) -> None:
        """Look for connections that the kernel has hung up on, whether or not they are read.

        A goodbye that is yet to be read looks like that as well: it has until the second look.
        """
        while not self._stopping.wait(_LOOK_SECONDS):
            for member in self._all():
                missed = member.transmission.hung_up()
                if missed and member.missed and member.taken:
                    self._replace(member)
                member.missed = missed

    def _replace(self, member: _Member) -> None:
        """Give the kernel another connection for one that it has hung up on."""
        offered: list[_Member] = []

        def offer() -> socket.socket:
            another, kernels = self._begin()
            offered.append(another)
            return kernels

        with self._replacing:
            if self._give is None or member.replaced:
                return
            if self._stopping.is_set() or self.goodbye.is_set():
                return
            try:
                self._give(offer)
            except RbdnbdError as error:
                log.warning("a connection that the kernel has dropped is not replaced: %s", error)
            else:
                member.replaced = offered[-1].taken = True
                log.warning("the kernel has dropped a connection, and was given another one")
            self._look_who_was_taken()

    def _look_who_was_taken(self) -> None:
        """Let go of what was offered to the kernel and not taken."""
        for member in self._all():
            if member.taken is None:
                member.taken = not member.transmission.hung_up()
                if not member.taken:
                    member.transmission.abort()
