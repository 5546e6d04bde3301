"""An image in memory: the backend of the protocol tier, held to the same contract as RbdImage."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Hook = Callable[[str, int, int], None]
"""Called with the name of a call, its offset and its length before the call does anything."""


class MemoryImage:
    """Bytes in memory behind the server's `Image` interface; safe for any number of threads.

    `calls` has the names of all calls in the order they were done in. A test sets `hook` to block
    calls, or to raise what they shall fail with.
    """

    def __init__(self, size: int) -> None:
        self._data = bytearray(size)
        self._lock = threading.Lock()
        self.calls: list[str] = []
        self.hook: Hook = lambda name, offset, length: None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._data)

    @property
    def flushes(self) -> int:
        """How often the image was flushed."""
        return self.calls.count("flush")

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes."""
        with self._call("read", offset, length):
            return bytes(self._data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`."""
        with self._call("write", offset, len(data)):
            self._data[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Do nothing: memory is as stable as it gets."""
        with self._call("flush", 0, 0):
            pass

    def discard(self, offset: int, length: int) -> None:
        """Read as zeroes afterwards."""
        with self._call("discard", offset, length):
            self._data[offset : offset + length] = bytes(length)

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        """Make the range read as zeroes."""
        with self._call("write_zeroes_no_hole" if no_hole else "write_zeroes", offset, length):
            self._data[offset : offset + length] = bytes(length)

    @contextmanager
    def _call(self, name: str, offset: int, length: int) -> Iterator[None]:
        self.hook(name, offset, length)
        if offset < 0 or length < 0 or offset + length > len(self._data):
            raise OSError(errno.EINVAL, "past the end of the image")
        with self._lock:
            self.calls.append(name)
            yield


class Gate:
    """A hook that holds calls of some names until it is opened.

    `waiting` says how many, `most` how many it ever were.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._open = threading.Event()
        self._lock = threading.Lock()
        self.waiting = self.most = 0

    def __call__(self, name: str, offset: int, length: int) -> None:
        """Hold the calling thread if the call has one of the names."""
        if name in self._names:
            with self._lock:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
            assert self._open.wait(30), f"nobody opened the gate to {name}"
            with self._lock:
                self.waiting -= 1

    def open(self) -> None:
        """Let everyone through, from now on."""
        self._open.set()


def failing(error: BaseException, *names: str) -> Hook:
    """Return a hook that raises `error` from every call of these names, of any name by default."""

    def hook(name: str, offset: int, length: int) -> None:
        if not names or name in names:
            raise error

    return hook
