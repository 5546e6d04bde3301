"""The life of a block device: attach a socket to /dev/nbdN, claim it, release it.

A socket is attached by netlink where the kernel's family "nbd" exists (a device that lives on its
own), else by ioctl (a device that lives as long as a thread of ours). Either way the kernel sends
its first request when someone opens the device, which `attach` does, because that is when
partitions are looked for: the other end of the socket must be answered by then.

A device is free when it was disconnected and its last opener has closed it. Since the driver
disconnects whatever it is told to, `release` first claims the device (O_EXCL, which the kernel
refuses while it is mounted, a swap area, or part of a dm or md device) and flushes it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from rbdnbd.devices import NbdDevices
from rbdnbd.errors import RbdnbdError
from rbdnbd.ioctl import DoIt, Flush, NbdIoctls, open_device, opened
from rbdnbd.modprobe import load_driver
from rbdnbd.netlink import Connect, FamilyNotFoundError, NbdFamily

log = logging.getLogger(__name__)

# All in seconds.
LIVE_LIMIT: Final = 10.0  # for an attached device to show its pid and size
BUSY_LIMIT: Final = 5.0  # for whoever has a free device open, udev after an unmap for one
RELEASE_LIMIT: Final = 30.0  # for the last opener of a disconnected device to go
_POLL_INTERVAL: Final = 0.02


class NbdDriver:
    """The kernel's nbd driver; every method may be called from any thread but a server's own."""

    def __init__(
        self,
        devices: NbdDevices | None = None,
        ioctls: NbdIoctls | None = None,
        open_family: Callable[[], NbdFamily] = NbdFamily,
    ) -> None:
        self.devices = devices or NbdDevices()
        self._ioctls = ioctls or NbdIoctls()
        self._open_family = open_family

    def attach(
        self,
        sock: socket.socket,
        *,
        size: int,
        block_size: int,
        flags: int,
        device: str | None = None,
        timeout: int | None = None,
        cookie: str | None = None,
        use_ioctl: bool = False,
    ) -> Attachment:
        """Attach the kernel's end of a socket pair; return when the device can be used.

        `size` and `block_size` are bytes (a block: 512, 1024, 2048 or 4096; the rest of `size`
        beyond whole blocks is out of reach), `flags` the transmission flags, `timeout` seconds for
        a request (None or 0: for ever), `cookie` the backend identifier, which ioctl cannot give.
        Without `device`, as in "/dev/nbd0", a free one is taken. `sock` is closed in any case, or
        the server would never see its end. Errors: RbdnbdError, and the device is free again.
        """
        with sock:
            connect = Connect(
                sockets=(sock.fileno(),),
                size=size - size % block_size,
                block_size=block_size,
                flags=flags,
                index=None if device is None else self.devices.index(device),
                timeout=timeout,
                backend_identifier=cookie,
            )
            load_driver(self.devices)
            try:
                attachment = self._connect(connect, use_ioctl=use_ioctl)
                self._bring_to_life(attachment, connect.size)
            except OSError as error:
                raise _refusal(f"attach {device or 'an nbd device'}", error) from error
        return attachment

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
                raise _refusal(f"open {device}", error) from error
            holder = self.devices.holder(index) or (
                f"{device} is in use by another process or mount namespace: end that first"
            )
            raise RbdnbdError(f"{holder}, or use --force", errno.EBUSY) from error
        try:
            yield fd
        finally:
            os.close(fd)

    def release(self, index: int, *, force: bool = False, flush_limit: float | None = None) -> None:
        """Claim a device, flush it, disconnect it, and return when it is free.

        With `force` neither a holder nor a flush that fails, or takes more than `flush_limit`
        seconds, is an obstacle; a device that is held then is disconnected but not free yet, which
        is logged. Errors: RbdnbdError, with ENODEV for a device that is free.
        """
        device = self.devices.path(index)
        if self.devices.connected(index) is None:
            raise RbdnbdError(f"{device} is not attached", errno.ENODEV)
        try:
            with opened(device) if force else self.claim(index) as fd:
                flush = self._flush(fd, device, flush_limit, force=force)
                self._disconnect(index)
                flush.join()
        except OSError as error:
            raise _refusal(f"release {device}", error) from error
        self._await_free(index, force=force)

    def _family(self) -> NbdFamily | None:
        try:
            return self._open_family()
        except FamilyNotFoundError:
            return None

    def _connect(self, connect: Connect, *, use_ioctl: bool) -> Attachment:
        family = None if use_ioctl else self._family()
        if family is None:
            return self._attach_by_ioctl(connect)
        with family:
            return self._attach_by_netlink(family, connect)

    def _attach_by_netlink(self, family: NbdFamily, connect: Connect) -> Attachment:
        """Send one CONNECT; for a certain device again while that is merely open (EBUSY)."""
        deadline = time.monotonic() + BUSY_LIMIT
        while True:
            try:
                return Attachment(self, family.connect(connect))
            except OSError as error:
                if error.errno != errno.EBUSY or connect.index is None:
                    raise
                taken = self.devices.connected(connect.index) is not None
                if taken or time.monotonic() > deadline:
                    raise self.devices.busy(connect.index) from error
            time.sleep(_POLL_INTERVAL)

    def _attach_by_ioctl(self, connect: Connect) -> Attachment:
        """Try the device that is asked for, or all in turn, and take the first that is free."""
        indexes = self.devices.indexes() if connect.index is None else [connect.index]
        for index in indexes:
            if self.devices.connected(index) is not None:
                continue
            try:
                do_it = self._ioctls.attach(self.devices.path(index), connect)
                return Attachment(self, index, do_it)
            except OSError as error:
                # Someone else was faster: by ioctl (EBUSY), or by netlink (EINVAL).
                if error.errno != errno.EBUSY and self.devices.connected(index) is None:
                    raise
        if connect.index is not None:
            raise self.devices.busy(connect.index)
        message = f"no free nbd device: all {len(indexes)} are in use"
        raise RbdnbdError(f"{message} (the nbd module's nbds_max sets how many)", errno.EBUSY)

    def _bring_to_life(self, attachment: Attachment, size: int) -> None:
        """Wait for pid and size, then open the device once for its partitions."""
        index = attachment.index

        def live() -> bool:
            return self.devices.connected(index) is not None and self.devices.size(index) == size

        try:
            wait_until(lambda: live() or attachment.released(), LIVE_LIMIT)
            if not live():
                message = f"{attachment.device} did not come to life"
                raise attachment.error() or RbdnbdError(message, errno.EIO)
            with opened(self.devices.path(index)) as fd:
                self._ioctls.clear_read_only(fd)
        except BaseException:
            if not attachment.released():
                self._disconnect(index)
                wait_until(lambda: self.devices.connected(index) is None, RELEASE_LIMIT)
            raise

    def _disconnect(self, index: int) -> None:
        """Take the sockets away from a device, in whichever way it was attached.

        Netlink does that to both kinds and wakes up waiting requests, and so do the ioctls, which
        are allowed on both. Source: nbd_disconnect_and_put, nbd_ioctl; seen on 6.1 and 6.12.
        """
        family = self._family()
        if family is not None:
            with family:
                family.disconnect(index)
            return
        with opened(self.devices.path(index)) as fd:
            self._ioctls.disconnect(fd)

    def _flush(self, fd: int, device: Path, limit: float | None, *, force: bool) -> Flush:
        """Flush; a forced release goes on without. The disconnect then ends what is left of it."""
        flush = self._ioctls.start_flush(fd)
        flush.join(limit)
        if flush.error and not force:
            message = f"cannot flush {device}: {flush.error.strerror}"
            advice = "--force gives up what is not written yet"
            raise RbdnbdError(f"{message} ({advice})", flush.error.errno or errno.EIO)
        if flush.error or flush.is_alive():
            log.warning("%s is disconnected before all of it was written", device)
        return flush

    def _await_free(self, index: int, *, force: bool) -> None:
        """Wait for the last opener to go, unless force has left one that will stay."""
        device = self.devices.path(index)
        holder = self.devices.holder(index) if force else None
        if holder is not None:
            log.warning("%s is disconnected but not free: %s", device, holder)
        elif not wait_until(lambda: self.devices.connected(index) is None, RELEASE_LIMIT):
            message = f"{device} is disconnected but not free: another process has it open"
            raise RbdnbdError(message, errno.EBUSY)


class Attachment:
    """A device that this process has attached; every method may be called from any thread."""

    def __init__(self, driver: NbdDriver, index: int, do_it: DoIt | None = None) -> None:
        self.index = index
        self.device = str(driver.devices.path(index))
        self.method: Literal["netlink", "ioctl"] = "ioctl" if do_it else "netlink"
        self._driver = driver
        self._do_it = do_it
        self._pid = driver.devices.connected(index)

    def released(self) -> bool:
        """Tell whether the device is free, or somebody else's by now."""
        if self._do_it is not None:
            return not self._do_it.is_alive()
        return self._driver.devices.connected(self.index) != self._pid

    def error(self) -> OSError | None:
        """Return what NBD_DO_IT failed with, if it did."""
        return self._do_it.error if self._do_it is not None else None

    def wait_released(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds until `released`; return whether it is."""
        return wait_until(self.released, timeout)

    def disconnect(self, flush_limit: float | None = None) -> None:
        """Release the device if it is still ours, in use or not.

        What is cached is written out first, in `flush_limit` seconds: the server must answer.
        """
        try:
            if not self.released():
                self._driver.release(self.index, force=True, flush_limit=flush_limit)
        except RbdnbdError as error:
            if error.errno != errno.ENODEV:  # somebody else has just released it
                raise


def wait_until(condition: Callable[[], bool], limit: float) -> bool:
    """Poll until `condition` holds or `limit` seconds are over; return whether it holds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL)
    return True


def _refusal(deed: str, error: OSError) -> RbdnbdError:
    """Say why the system refuses to do something."""
    number = error.errno or errno.EIO
    if number in (errno.EPERM, errno.EACCES):
        return RbdnbdError(f"cannot {deed}: this needs root (CAP_SYS_ADMIN)", number)
    return RbdnbdError(f"cannot {deed}: {error.strerror or error}", number)
