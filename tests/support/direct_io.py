"""An application that keeps a device busy: direct reads and writes, so many at a time."""

from __future__ import annotations

import mmap
import os
import threading
import time
from typing import Self

LENGTH = 4096


class DirectIO:
    """`depth` threads, half of them writers, each with one request after the other in flight.

    Each keeps to a block of its own, from the device's start. `errors` are what any of them got; a
    thread ends at its first one. A context manager: at its end every thread must have ended.
    """

    def __init__(self, device: str, depth: int = 32) -> None:
        self.errors: list[OSError] = []
        self._device = device
        self._stop = threading.Event()
        self._since = [time.monotonic()] * depth
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(depth)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        assert self.stuck(0) == 0

    def stuck(self, seconds: float) -> int:
        """Return how many threads have had the same request in flight for so long."""
        now = time.monotonic()
        return sum(
            now - since >= seconds
            for since, thread in zip(self._since, self._threads, strict=True)
            if thread.is_alive()
        )

    def _run(self, number: int) -> None:
        fd = os.open(self._device, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, LENGTH) as room:
                transfer = os.pwritev if number % 2 else os.preadv
                while not self._stop.is_set():
                    self._since[number] = time.monotonic()
                    transfer(fd, [room], number * LENGTH)
        except OSError as error:
            self.errors.append(error)
        finally:
            os.close(fd)
