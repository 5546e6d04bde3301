"""Let go of a block device: claim it, flush it, disconnect it, wait until it is free.

The driver disconnects whatever it is told to. So `release` first claims the device: O_EXCL, which
the kernel refuses while it is mounted, a swap area, or part of a dm or md device. A device is free
when it was disconnected and its last opener has closed it.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from rbdnbd.devices import NbdDevices
from rbdnbd.errors import Busy, NotFlushed, NotMapped, RbdnbdError
from rbdnbd.ioctl import NbdIoctls, open_device, opened
from rbdnbd.netlink import FamilyNotFoundError, NbdFamily

log = logging.getLogger(__name__)

RELEASE_LIMIT: Final = 30.0
"""Seconds for the last opener of a disconnected device to go."""
POLL_INTERVAL: Final = 0.02
"""Seconds, at the most: what is polled is looked at sooner at first."""
_FIRST_INTERVAL: Final = 0.0005


class Releaser:
    """The half of the driver that lets go; every method may be called from any thread."""

    def __init__(
        self,
        devices: NbdDevices | None = None,
        ioctls: NbdIoctls | None = None,
        open_family: Callable[[], NbdFamily] = NbdFamily,
    ) -> None:
        self.devices = devices or NbdDevices()
        self.ioctls = ioctls or NbdIoctls()
        self._open_family = open_family

    @contextmanager
    def claim(self, index: int) -> Iterator[int]:
        """Hold the device for this process alone; yield its descriptor.

        Errors: RbdnbdError; with EBUSY it says who holds the device and what to do.
        """
        device = self.devices.path(index)
        try:
            fd = open_device(device, os.O_EXCL)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise refusal(f"open {device}", error) from error
            holder = self.devices.holder(index) or (
                f"{device} is in use by another process or mount namespace: end that first"
            )
            raise Busy(f"{holder}, or use --force", errno.EBUSY) from error
        try:
            yield fd
        finally:
            os.close(fd)

    def release(self, index: int, *, force: bool = False, flush_limit: float | None = None) -> None:
        """Claim a device, flush it, disconnect it, and return when it is free.

        With `force` neither a holder nor a flush that fails, or takes more than `flush_limit`
        seconds, is an obstacle; a device that is held then is disconnected but not free yet, which
        is logged. With a `flush_limit` of 0.0 no flush is an obstacle. A device without a server
        cannot be flushed: without either this waits for one as long as the device does (its
        reattach timeout), and refuses then.
        Errors: RbdnbdError, with ENODEV for a device that is free.
        """
        device = self.devices.path(index)
        if self.devices.connected(index) is None:
            raise NotMapped(f"{device} is not attached", errno.ENODEV)
        try:
            if force:
                self._end(index, opened(device), flush_limit, force=True)
            else:
                with self.claim(index) as fd:
                    self._end(index, nullcontext(fd), flush_limit, force=False)
        except OSError as error:
            raise refusal(f"release {device}", error) from error
        self._await_free(index, force=force)

    def family(self) -> NbdFamily | None:
        """Open the family "nbd"; None where the kernel has none."""
        try:
            return self._open_family()
        except FamilyNotFoundError:
            return None

    def disconnect(self, index: int) -> None:
        """Take the sockets away from a device, in whichever way it was attached.

        Netlink does that to both kinds and wakes up waiting requests, and so do the ioctls, which
        are allowed on both. Source: nbd_disconnect_and_put, nbd_ioctl; seen on 6.1 and 6.12.
        """
        family = self.family()
        if family is not None:
            with family:
                family.disconnect(index)
            return
        with opened(self.devices.path(index)) as fd:
            self.ioctls.disconnect(fd)

    def _end(
        self,
        index: int,
        opening: AbstractContextManager[int],
        limit: float | None,
        *,
        force: bool,
    ) -> None:
        """Flush and disconnect; by force without the flush, which the disconnect then ends."""
        device = self.devices.path(index)
        flush = self.ioctls.start_flush(opening)
        flush.join(limit)
        if flush.error and not force and limit != 0.0:
            message = f"cannot flush {device}: {flush.error.strerror}"
            advice = "--force gives up what is not written yet"
            raise NotFlushed(f"{message} ({advice})", flush.error.errno or errno.EIO)
        if flush.error or flush.is_alive():
            log.warning("%s is disconnected before all of it was written", device)
        self.disconnect(index)
        flush.join()

    def _await_free(self, index: int, *, force: bool) -> None:
        """Wait for the last opener to go, unless force has left one that will stay."""
        device = self.devices.path(index)
        holder = self.devices.holder(index) if force else None
        if holder is not None:
            log.warning("%s is disconnected but not free: %s", device, holder)
        elif not wait_until(lambda: self.devices.connected(index) is None, RELEASE_LIMIT):
            message = f"{device} is disconnected but not free: another process has it open"
            raise RbdnbdError(message, errno.EBUSY)


def wait_until(condition: Callable[[], bool], limit: float) -> bool:
    """Poll until `condition` holds or `limit` seconds are over; return whether it holds."""
    deadline = time.monotonic() + limit
    pause = _FIRST_INTERVAL
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, POLL_INTERVAL)
    return True


def refusal(deed: str, error: OSError) -> RbdnbdError:
    """Say why the system refuses to do something."""
    number = error.errno or errno.EIO
    if number in (errno.EPERM, errno.EACCES):
        return RbdnbdError(f"cannot {deed}: this needs root (CAP_SYS_ADMIN)", number)
    return RbdnbdError(f"cannot {deed}: {error.strerror or error}", number)
