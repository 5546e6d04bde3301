"""A turn that one thread has at a time, and that is passed on to whoever has waited least.

Of the workers of a connection few are needed at most times. The one that was busy last is still in
the processor's caches; a lock, which is first come, first served, would have all of them take part.
"""

from __future__ import annotations

import threading


class Turn:
    """One turn; each thread that takes it has a `call` of its own."""

    def __init__(self) -> None:
        self._queue = threading.Lock()
        self._taken = False
        self._waiting: list[threading.Lock] = []

    @staticmethod
    def call() -> threading.Lock:
        """Return what one thread waits at, again and again."""
        call = threading.Lock()
        call.acquire()
        return call

    def take(self, call: threading.Lock) -> None:
        """Wait for the turn."""
        with self._queue:
            if not self._taken:
                self._taken = True
                return
            self._waiting.append(call)
        call.acquire()

    def pass_on(self) -> None:
        """Let the next one have the turn."""
        with self._queue:
            if not self._waiting:
                self._taken = False
                return
            call = self._waiting.pop()
        call.release()

    def is_waited_for(self) -> bool:
        """Tell whether anybody waits for it."""
        return bool(self._waiting)
