"""What ends a process of ours, in one queue: signals, and the ends of its connections.

Every signal that asks to end is blocked in all threads, and one thread waits for them: no handler
runs anywhere, least of all in the thread inside NBD_DO_IT, which a signal would end. The main
thread waits for whatever comes first. A second signal ends the process without draining, unless it
comes within a second: timeout(1) and a terminal that closes send theirs twice. A signal that was
ignored from the start, as by nohup(1), stays ignored.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDoneError
from typing import Final, NoReturn, TypeVar

from rbdnbd.errors import Interrupted

log = logging.getLogger(__name__)

T = TypeVar("T")

SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_GRACE_SECONDS: Final = 5.0
_ONE_SIGNAL_SECONDS: Final = 1.0


class Life:
    """The signals and endings of this process; made in the main thread before any other starts."""

    def __init__(self) -> None:
        self._endings: queue.SimpleQueue[int | str | None] = queue.SimpleQueue()
        self._signals = {each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def ended(self, reason: str) -> None:
        """Report the end of what this process lives for; "" for an orderly one. Any thread."""
        self._endings.put(reason)

    def wait(self) -> int | str:
        """Return the number of a signal, or the reason that `ended` was given. Main thread."""
        ending = self._endings.get()
        assert ending is not None, "an action is still under way"
        return ending

    def during(self, action: Callable[[], T], meanwhile: Callable[[], object] | None = None) -> T:
        """Return what a slow, blocking action returns, or raise `Interrupted` on a signal.

        The action runs in a thread of its own. After a signal it is given a moment to finish, so
        that what it has made is undone by whoever called; one that hangs ends the process. What is
        to be done `meanwhile` must not take long.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)
            self._endings.put(None)

        threading.Thread(target=run, name="start", daemon=True).start()
        if meanwhile:
            meanwhile()
        ending = self._endings.get()
        if ending is None:
            return future.result()
        try:
            future.exception(_GRACE_SECONDS)
        except NotDoneError:
            _leave(int(ending), "leaving in the middle of what does not end")
        raise Interrupted(int(ending))

    def _listen(self) -> None:
        number = signal.sigwait(self._signals)
        log.info("%s: draining", signal.Signals(number).name)
        self._endings.put(int(number))
        patience = time.monotonic() + _ONE_SIGNAL_SECONDS
        while (left := patience - time.monotonic()) > 0:
            signal.sigtimedwait(self._signals, left)
        number = signal.sigwait(self._signals)
        _leave(number, "told again, leaving without draining")


def _leave(number: int, why: str) -> NoReturn:
    """End without waiting for threads that may never return from librados."""
    log.error("%s: %s", signal.Signals(number).name, why)
    os._exit(128 + number)
