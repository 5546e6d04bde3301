"""An image in memory whose calls wait until a test lets them go, in whichever order it likes."""

from __future__ import annotations

import errno
import threading
from typing import NamedTuple

HOLD_SECONDS = 30
CALL_SECONDS = 5


class Key(NamedTuple):
    """What a call asks of the image; `data` is a write's."""

    name: str
    offset: int = 0
    length: int = 0
    data: bytes = b""

    def __str__(self) -> str:
        return f"{self.name} of {self.length} at {self.offset} {self.data[:1].hex()}".rstrip()


class Call:
    """One call that is held. Its effect and its return are two things, in the test's hands."""

    def __init__(self, key: Key, source: bytes) -> None:
        self.key = key
        self.source = source
        """A write's data where the server keeps them, which it must until the call returns."""
        self.result: bytes | OSError = b""
        self.gone = threading.Event()


class HeldImage:
    """Bytes in memory behind the server's `Image` interface. The data change in `perform` alone."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._held: list[Call] = []
        self._changed = threading.Condition()
        self._open = False

    def wait_for(self, count: int) -> list[Call]:
        """Wait until so many calls are held; return all that are, in the order of their keys."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._held) >= count, CALL_SECONDS)
            return sorted(self._held, key=lambda call: call.key)

    def perform(self, call: Call, fail: int = 0) -> None:
        """Do what a call asks, or have it fail with an errno; it does not return yet."""
        name, offset, length, data = call.key
        assert call.source == data, "the data of a write have changed meanwhile"
        with self._changed:
            self._held.remove(call)
        if not fail and offset + length > len(self.data):
            fail = errno.EINVAL
        if fail:
            call.result = OSError(fail, "as the test wants it")
        elif name == "read":
            call.result = bytes(self.data[offset : offset + length])
        elif name != "flush":
            self.data[offset : offset + length] = data or bytes(length)

    def resize(self, size: int) -> None:
        """Cut bytes off, or add zeroes."""
        grown = size - len(self.data)
        del self.data[size:]
        self.data.extend(bytes(max(0, grown)))

    def open(self) -> None:
        """Hold nothing any more."""
        with self._changed:
            self._open = True
            for call in self._held:
                call.gone.set()

    def read(self, offset: int, length: int) -> bytes:
        """Return what was there when it was performed."""
        return self._hold(Key("read", offset, length))

    def write(self, offset: int, data: bytes) -> None:
        """Write."""
        self._hold(Key("write", offset, len(data), bytes(data)), data)

    def flush(self) -> None:
        """Flush."""
        self._hold(Key("flush"))

    def discard(self, offset: int, length: int) -> None:
        """Read as zeroes afterwards."""
        self._hold(Key("discard", offset, length))

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        """Read as zeroes afterwards."""
        self._hold(Key("write_zeroes_no_hole" if no_hole else "write_zeroes", offset, length))

    def _hold(self, key: Key, source: bytes = b"") -> bytes:
        call = Call(key, source)
        with self._changed:
            if self._open:
                raise OSError(errno.ESHUTDOWN, "the test is over")
            self._held.append(call)
            self._changed.notify_all()
        assert call.gone.wait(HOLD_SECONDS), f"nobody let {key.name} at {key.offset} go"
        if isinstance(call.result, OSError):
            raise call.result
        return call.result
