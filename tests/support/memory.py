"""An image in memory: the backend of the protocol tier, held to the same contract as RbdImage."""

from __future__ import annotations

import errno
import threading


class MemoryImage:
    """Bytes in memory behind the server's `Image` interface; safe for any number of threads."""

    def __init__(self, size: int) -> None:
        self._data = bytearray(size)
        self._lock = threading.Lock()
        self.flushes = 0

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes."""
        self._check(offset, length)
        with self._lock:
            return bytes(self._data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`."""
        self._check(offset, len(data))
        with self._lock:
            self._data[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Count: memory is as stable as it gets."""
        with self._lock:
            self.flushes += 1

    def discard(self, offset: int, length: int) -> None:
        """Read as zeroes afterwards."""
        self.write_zeroes(offset, length, no_hole=False)

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        """Make the range read as zeroes."""
        self._check(offset, length)
        with self._lock:
            self._data[offset : offset + length] = bytes(length)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > len(self._data):
            raise OSError(errno.EINVAL, "past the end of the image")
