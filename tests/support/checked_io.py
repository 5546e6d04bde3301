"""An application that writes and reads a device and knows what it may find there."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading

LENGTH = 4096
BLOCKS = 64

Known = dict[int, set[bytes]]
"""By the number of a block, what it may hold: more than one thing after a write that failed."""


class CheckedIO:
    """Direct writes and reads of a device's first blocks in a thread, until its first error.

    `known` goes on from one device of an image to its next. `done` counts what was answered,
    `wrong` says what was found that nobody had written.
    """

    def __init__(self, device: str, known: Known, seed: int) -> None:
        self.device, self.known = device, known
        self.done = 0
        self.error: OSError | None = None
        self.wrong: list[str] = []
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End the thread after the request that it has in flight."""
        self._stop.set()
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"a request to {self.device} is not answered"

    def _run(self) -> None:
        fd = os.open(self.device, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, LENGTH) as room:
                while not self._stop.is_set():
                    self._one(fd, room, self._random.randrange(BLOCKS))
                    self.done += 1
        except OSError as error:
            self.error = error
        finally:
            os.close(fd)

    def _one(self, fd: int, room: mmap.mmap, block: int) -> None:
        may_be = self.known.setdefault(block, {bytes(LENGTH)})
        if self._random.random() < 0.5:
            new = self._random.randbytes(LENGTH)
            may_be.add(new)
            room[:] = new
            moved = os.pwritev(fd, [room], block * LENGTH)
        else:
            moved = os.preadv(fd, [room], block * LENGTH)
            new = room[:]
        if moved != LENGTH:  # the device has no size any more
            raise OSError(errno.EIO, f"{moved} bytes of {LENGTH}")
        if new not in may_be:
            self.wrong.append(f"block {block} of {self.device} holds what nobody has written")
        self.known[block] = {new}
