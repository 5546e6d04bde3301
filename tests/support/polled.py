"""Any blocking image as one whose requests are started and found finished later."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import cast

from rbdnbd.events import EventConnection
from rbdnbd.loop import Loop, Operation
from rbdnbd.server import threads
from rbdnbd.transmission import WORKERS, Engine, Image

ENGINES = ("threads", "events")


@contextmanager
def engine(name: str, image: Image, workers: int = WORKERS) -> Iterator[Engine]:
    """Serve connections of an image with one of the engines."""
    if name == "threads":
        yield threads(image, workers=workers)
        return
    with polled(image) as pollable, Loop(pollable) as loop:
        yield lambda sock, export: EventConnection(loop, sock, export, limit=workers)


@contextmanager
def polled(image: Image) -> Iterator[PolledImage]:
    """Perform what is started in threads."""
    with ThreadPoolExecutor(256) as pool:
        polled = PolledImage(image, pool)
        try:
            yield polled
        finally:
            pool.shutdown()
            os.close(polled.fileno())


class PolledImage:
    """A blocking image behind the loop's interface."""

    def __init__(self, image: Image, pool: ThreadPoolExecutor) -> None:
        self._image, self._pool = image, pool
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._finished: deque[tuple[Operation, int | Exception]] = deque()

    def fileno(self) -> int:
        """Return the eventfd."""
        return self._event

    def start_read(self, operation: Operation, offset: int, buffer: bytearray) -> None:
        """Fill the whole buffer."""

        def read() -> int:
            data = self._image.read(offset, len(buffer))
            buffer[: len(data)] = data
            return len(data)

        self._start(operation, read)

    def start_write(self, operation: Operation, offset: int, data: bytes | bytearray) -> None:
        """Write all of it, and copy nothing: the buffer is the image's until it has finished."""
        self._start(operation, lambda: self._image.write(offset, cast(bytes, data)))

    def start_flush(self, operation: Operation) -> None:
        """Flush."""
        self._start(operation, self._image.flush)

    def start_discard(self, operation: Operation, offset: int, length: int) -> None:
        """Discard."""
        self._start(operation, lambda: self._image.discard(offset, length))

    def start_write_zeroes(
        self, operation: Operation, offset: int, length: int, *, no_hole: bool
    ) -> None:
        """Write zeroes."""
        self._start(operation, lambda: self._image.write_zeroes(offset, length, no_hole=no_hole))

    def finished(self) -> list[tuple[Operation, int | Exception]]:
        """Return what is done."""
        done = []
        while self._finished:
            done.append(self._finished.popleft())
        return done

    def _start(self, operation: Operation, perform: Callable[[], int | None]) -> None:
        def run() -> None:
            result: int | Exception
            try:
                result = perform() or 0
            except Exception as error:
                result = error
            self._finished.append((operation, result))
            os.eventfd_write(self._event, 1)

        self._pool.submit(run)
