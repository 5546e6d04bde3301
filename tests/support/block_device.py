"""A mapped image as a disk for random operations: its device, and the image by another client."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rados
import rbd

from tests.support.waiting import wait_until

BLKFLSBUF = 0x1261
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
ROOM = 1 << 20
RESIZE_SECONDS = 60
RANGE = struct.Struct("=QQ")


class BlockDevice:
    """/dev/nbdN by direct IO, ioctl(2) and mmap(2); `spec`, POOL/IMAGE, by librbd beside it.

    The cluster is that of CEPH_CONF. One thread; errors are the system's, and none is hidden.
    """

    def __init__(self, device: str, spec: str) -> None:
        pool, name = spec.split("/")
        self._sectors = Path(f"/sys/block/{Path(device).name}/size")
        self._room = mmap.mmap(-1, ROOM)  # as aligned as O_DIRECT wants it
        self._fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        self._cluster = rados.Rados(conffile=os.environ["CEPH_CONF"], conf={"rbd_cache": "false"})
        self._cluster.connect()
        self._ioctx = self._cluster.open_ioctx(pool)
        self._image = rbd.Image(self._ioctx, name)

    def close(self) -> None:
        """Let go of device and image."""
        os.close(self._fd)
        self._image.close()
        self._ioctx.close()
        self._cluster.shutdown()
        self._room.close()

    def clear(self) -> None:
        """Make all of it zeroes, however large it is."""
        self.flush()
        self.zero(0, self.size())

    def size(self) -> int:
        """Return the bytes that the kernel says it has."""
        return int(self._sectors.read_text()) * 512

    def read(self, offset: int, length: int) -> bytes:
        with memoryview(self._room)[:length] as room:
            got = os.preadv(self._fd, [room], offset)
            return room[:got].tobytes()

    def write(self, offset: int, data: bytes) -> None:
        with memoryview(self._room)[: len(data)] as room:
            room[:] = data
            written = os.pwritev(self._fd, [room], offset)
        assert written == len(data), f"{written} of {len(data)} bytes written at {offset}"

    def trim(self, offset: int, length: int) -> None:
        """Give a range up, of which nothing is cached: of a page the kernel would zero a part.

        The image need not, for librbd leaves out what is less than rbd_discard_granularity_bytes.
        Source: truncate_bdev_range, Linux 6.1.
        """
        self.flush()
        fcntl.ioctl(self._fd, BLKDISCARD, RANGE.pack(offset, length))

    def zero(self, offset: int, length: int) -> None:
        fcntl.ioctl(self._fd, BLKZEROOUT, RANGE.pack(offset, length))

    def flush(self) -> None:
        fcntl.ioctl(self._fd, BLKFLSBUF)

    def fsync(self) -> None:
        os.fsync(self._fd)

    def mapped_read(self, offset: int, length: int) -> bytes:
        with self._mapped(offset, length) as (memory, start):
            return memory[start : start + length]

    def mapped_write(self, offset: int, data: bytes, *, synced: bool) -> None:
        with self._mapped(offset, len(data)) as (memory, start):
            memory[start : start + len(data)] = data
            if synced:
                memory.flush()

    def compare(self) -> bytes:
        self.fsync()
        return self._image.read(0, self._image.size())

    def resize(self, size: int) -> None:
        """Give the image a new size and wait for the device's.

        The kernel keeps cached what is beyond a new end, so nothing is cached when it comes.
        """
        self.fsync()
        self.flush()
        self._image.resize(size)
        wait_until(lambda: self.size() == size, RESIZE_SECONDS, f"the device has {size} bytes")

    @contextmanager
    def _mapped(self, offset: int, length: int) -> Iterator[tuple[mmap.mmap, int]]:
        """Map the pages around a range; yield them, and where in them the range begins."""
        start = offset % mmap.PAGESIZE
        with mmap.mmap(self._fd, start + length, offset=offset - start) as memory:
            yield memory, start
