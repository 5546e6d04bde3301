"""The ioctls of block devices and of the nbd driver.

To attach a device this way, a process sets its socket, block size, size and flags one by one and
then calls NBD_DO_IT, which returns when the device is disconnected: it needs a thread of its own. A
signal that reaches this thread ends the device (wait_event_interruptible), so it blocks them all;
SIGSTOP and a debugger still do. The kernel takes references of its own to the socket.
Numbers: linux/nbd.h, linux/fs.h. Source: nbd_ioctl and nbd_start_device_ioctl, Linux 6.1.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rbdnbd.netlink import Connect

log = logging.getLogger(__name__)

NBD_SET_SOCK: Final = 0xAB00
NBD_SET_BLKSIZE: Final = 0xAB01
NBD_DO_IT: Final = 0xAB03
NBD_CLEAR_SOCK: Final = 0xAB04
NBD_SET_SIZE_BLOCKS: Final = 0xAB07
NBD_DISCONNECT: Final = 0xAB08
NBD_SET_TIMEOUT: Final = 0xAB09
NBD_SET_FLAGS: Final = 0xAB0A
BLKROSET: Final = 0x125D
BLKFLSBUF: Final = 0x1261

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)


def ioctl(fd: int, request: int, argument: int) -> None:
    """Call ioctl(2) with an unsigned long; the int of fcntl.ioctl ends at 2 Gi, even of blocks."""
    if _libc.ioctl(fd, request, argument) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_device(path: Path, flags: int = 0) -> int:
    """Open a block device and return the descriptor.

    Reading is enough for every ioctl, for O_EXCL and for fsync. It is allowed on read-only devices,
    and udev does not probe the device again when it is closed.
    """
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)


@contextmanager
def opened(path: Path, flags: int = 0) -> Iterator[int]:
    """Open a block device for the length of a with statement."""
    fd = open_device(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class NbdIoctls:
    """What can be asked of a device; every method may be called from any thread.

    Errors: OSError; EPERM without CAP_SYS_ADMIN, EACCES without access to the device node.
    """

    ioctl: Callable[[int, int, int], None] = ioctl

    def attach(self, path: Path, connect: Connect) -> DoIt:
        """Hand the first of `connect.sockets` to a device, and run it in a thread.

        The kernel remembers which thread set the socket: EBUSY says that another one did. EINVAL:
        the device is attached by netlink, or the socket is of a kind that the driver does not take.
        When this raises, the device is as it was. Source: nbd_add_socket.
        """
        with ExitStack() as undo:
            fd = open_device(path)
            undo.callback(os.close, fd)
            self.ioctl(fd, NBD_SET_SOCK, connect.sockets[0])
            undo.callback(self.ioctl, fd, NBD_CLEAR_SOCK, 0)
            self.ioctl(fd, NBD_SET_BLKSIZE, connect.block_size)
            self.ioctl(fd, NBD_SET_SIZE_BLOCKS, connect.size // connect.block_size)
            self.ioctl(fd, NBD_SET_FLAGS, connect.flags)
            if connect.timeout is not None:
                self.ioctl(fd, NBD_SET_TIMEOUT, connect.timeout)
            thread = DoIt(self.ioctl, fd, path)
            thread.start()
            undo.pop_all()
        return thread

    def resize(self, fd: int, blocks: int) -> None:
        """Give a device a new size, in blocks of its own; EINVAL: it is attached by netlink."""
        self.ioctl(fd, NBD_SET_SIZE_BLOCKS, blocks)

    def disconnect(self, fd: int) -> None:
        """Send the server a DISC and take the sockets away; allowed on every nbd device."""
        self.ioctl(fd, NBD_DISCONNECT, 0)
        self.ioctl(fd, NBD_CLEAR_SOCK, 0)

    def start_flush(self, opening: AbstractContextManager[int]) -> Flush:
        """Start to write out what is cached, of a mounted filesystem too, and flush the server.

        The device is opened by the thread, too: after a resize that looks for partitions, and waits
        for a server.
        """
        thread = Flush(self.ioctl, opening)
        thread.start()
        return thread

    def clear_read_only(self, fd: int) -> None:
        """Take off the mark of an earlier BLKROSET, which outlives a disconnect.

        The transmission flag READ_ONLY makes a device read-only in another place, which this
        leaves alone and every attach sets anew. Source: bdev_read_only, nbd_parse_flags.
        """
        no = ctypes.c_int(0)
        self.ioctl(fd, BLKROSET, ctypes.addressof(no))


class DoIt(threading.Thread):
    """The thread inside NBD_DO_IT; it ends when the device is disconnected and closed here."""

    def __init__(self, ioctl: Callable[[int, int, int], None], fd: int, path: Path) -> None:
        super().__init__(name=path.name, daemon=True)
        self._ioctl, self._fd, self._path = ioctl, fd, path
        self.error: OSError | None = None

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._ioctl(self._fd, NBD_DO_IT, 0)
        except OSError as error:
            self.error = error
            log.error("NBD_DO_IT on %s failed: %s", self._path, error.strerror)
        finally:
            self._ioctl(self._fd, NBD_CLEAR_SOCK, 0)
            os.close(self._fd)


class Flush(threading.Thread):
    """A thread that flushes a device, for a caller who may not want to wait for the end."""

    def __init__(
        self, ioctl: Callable[[int, int, int], None], opening: AbstractContextManager[int]
    ) -> None:
        super().__init__(name="flush", daemon=True)
        self._ioctl, self._opening = ioctl, opening
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            with self._opening as fd:
                self._ioctl(fd, BLKFLSBUF, 0)
                os.fsync(fd)
        except OSError as error:
            self.error = error
