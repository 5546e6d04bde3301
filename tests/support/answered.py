"""An application that remembers what was answered to it, and finds again every bit of that.

Threads store numbered versions of pages, each thread pages of its own, and note a version as soon
as the call that stored it has returned. Before a page is stored again its last version is read, so
that a loss is seen at once; `missing` looks for all of them in what somebody else has read, an
export of the image for example. A version that was under way may be there or not; one that was
answered must.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol, Self

from tests.support.waiting import wait_until

LENGTH: Final = 4096
_HEAD: Final = struct.Struct(">QQ")


def page(key: int, version: int) -> bytes:
    """Return what a version of a page consists of, of which no bit is like another page's."""
    head = _HEAD.pack(key, version)
    return head + hashlib.shake_128(head).digest(LENGTH - len(head))


def version_of(key: int, data: bytes) -> int:
    """Return which version of a page this is, 0 for a page of zeroes, -1 for no version at all."""
    if data == bytes(LENGTH):
        return 0
    version = int(_HEAD.unpack_from(data)[1]) if len(data) == LENGTH else 0
    return version if version and data == page(key, version) else -1


class Store(Protocol):
    """Where pages are kept, for one thread."""

    def write(self, key: int, data: bytes) -> None:
        """Store a page; to return is to answer."""

    def read(self, key: int) -> bytes:
        """Return a page that was stored."""

    def close(self) -> None:
        """Let go of it."""


class Blocks:
    """The blocks of a device or a file, past every cache; whoever serves it answers a write."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._room = mmap.mmap(-1, LENGTH)  # as aligned as O_DIRECT wants it

    def write(self, key: int, data: bytes) -> None:
        self._room[:] = data
        assert os.pwritev(self._fd, [self._room], key * LENGTH) == LENGTH

    def read(self, key: int) -> bytes:
        assert os.preadv(self._fd, [self._room], key * LENGTH) == LENGTH
        return self._room[:]

    def close(self) -> None:
        os.close(self._fd)


class Files:
    """A file for each page, replaced as databases do: written, fsynced, renamed, fsynced again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = os.open(directory, os.O_RDONLY)

    def write(self, key: int, data: bytes) -> None:
        path = self._directory / str(key)
        with open(path.with_suffix(".new"), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".new").rename(path)
        os.fsync(self._fd)

    def read(self, key: int) -> bytes:
        return (self._directory / str(key)).read_bytes()

    def close(self) -> None:
        os.close(self._fd)


class Writers:
    """So many threads that write until the `with` ends, `pages` pages each.

    `errors` are what their calls failed with, `losses` what they did not find again; a thread ends
    at either. `answered` is the last version of each page that was answered.
    """

    def __init__(self, store: Callable[[], Store], threads: int = 4, pages: int = 64) -> None:
        self.errors: list[OSError] = []
        self.losses: list[str] = []
        self.answered = dict.fromkeys(range(threads * pages), 0)
        self._store = store
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(range(first, threads * pages, threads),))
            for first in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all threads, with what they have under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def count(self) -> int:
        """Return how many writes have been answered."""
        return sum(self.answered.values())

    def go_on(self, writes: int, seconds: float) -> None:
        """Wait until so many more writes have been answered; all must be well then."""
        wanted = self.count() + writes

        def enough() -> bool:
            return self.count() >= wanted or bool(self.errors or self.losses)

        wait_until(enough, seconds, f"{writes} more answered writes")
        self.all_is_well()

    def all_is_well(self) -> None:
        """Fail if a call has failed, or something was not found again."""
        assert (self.errors, self.losses) == ([], [])

    def ended(self) -> bool:
        """Tell whether every thread has ended, as all do when the device is gone."""
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, keys: range) -> None:
        store = self._store()
        try:
            version = 0
            while not self._stop.is_set():
                version += 1
                for key in keys:
                    if self._stop.is_set():
                        return
                    if version > 1 and (why := lacks(key, version - 1, store.read(key))):
                        self.losses.append(why)
                        return
                    store.write(key, page(key, version))
                    self.answered[key] = version
        except OSError as error:
            self.errors.append(error)
        finally:
            store.close()


def lacks(key: int, answered: int, data: bytes) -> str:
    """Return what is wrong with a page of which a version was answered; "" if nothing is."""
    found = version_of(key, data)
    if found < answered:
        kind = "noise" if found < 0 else f"version {found}"
        return f"page {key}: version {answered} was answered, {kind} is there"
    return ""


def missing(answered: Mapping[int, int], read: Callable[[int], bytes]) -> list[str]:
    """Return what is wrong with pages that somebody else reads; empty if all is there."""
    return [why for key, version in answered.items() if (why := lacks(key, version, read(key)))]


def in_file(path: Path) -> Callable[[int], bytes]:
    """Read pages that lie one after the other in a file: an export of the device, for example."""

    def read(key: int) -> bytes:
        with path.open("rb") as file:
            file.seek(key * LENGTH)
            return file.read(LENGTH)

    return read


def in_directory(directory: Path) -> Callable[[int], bytes]:
    """Read pages that are files; one that is not there is a page that was never stored."""

    def read(key: int) -> bytes:
        path = directory / str(key)
        return path.read_bytes() if path.exists() else bytes(LENGTH)

    return read
