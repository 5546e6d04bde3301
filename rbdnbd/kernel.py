"""The life of a block device: attach sockets to /dev/nbdN, give it another server, resize it.

Sockets are attached by netlink where the kernel's family "nbd" exists (a device that lives on its
own), else by ioctl (a device that lives as long as a thread of ours). Either way the kernel sends
its first request when someone opens the device, which `attach` does, because that is when
partitions are looked for: the other ends of the sockets must be answered by then.

A device that was attached by netlink outlives its server: to leave it, close the server's end of
the socket and do not call `disconnect`. What is asked of it then waits for `reattach`, as long as
the reattach timeout allows, and fails with EIO afterwards; the device stays, and can even then be
attached again or released. What the server had been sent and had not answered waits for a timer
(`blockqueue.SUCCESSOR_MILLISECONDS`) that finds a successor, or for a disconnect, which fails it.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from contextlib import ExitStack
from typing import Final, Literal

from rbdnbd.errors import CookieMismatch, NoFreeDevice, NotMapped, RbdnbdError
from rbdnbd.handover import Offer, hand_over
from rbdnbd.ioctl import DoIt, opened
from rbdnbd.modprobe import load_driver
from rbdnbd.netlink import Connect, NbdFamily, Reconfigure
from rbdnbd.release import POLL_INTERVAL, RELEASE_LIMIT, Releaser, refusal, wait_until

log = logging.getLogger(__name__)

# All in seconds.
LIVE_LIMIT: Final = 10.0  # for an attached device to show its pid and size
BUSY_LIMIT: Final = 5.0  # for whoever has a free device open, udev after an unmap for one


class NbdDriver(Releaser):
    """The kernel's nbd driver; every method may be called from any thread but a server's own."""

    def load(self, nbds_max: int | None = None, max_part: int | None = None) -> bool:
        """Load the driver, before anything else is done; False when it is there already.

        The parameters, and what may be raised, are those of `modprobe.load_driver`.
        """
        return load_driver(self.devices, nbds_max=nbds_max, max_part=max_part)

    def attach(
        self,
        *socks: socket.socket,
        size: int,
        block_size: int,
        flags: int,
        device: str | None = None,
        timeout: int | None = None,
        reattach_timeout: int | None = None,
        cookie: str | None = None,
        use_ioctl: bool = False,
    ) -> Attachment:
        """Attach the kernel's ends of socket pairs; return when the device can be used.

        Several need netlink and CAN_MULTI_CONN. `size` and `block_size` are bytes (a block: 512,
        1024, 2048 or 4096; the rest of `size` beyond whole blocks is out of reach), `flags` the
        transmission flags, `timeout` seconds for a request (None or 0: for ever). Without `device`,
        as in "/dev/nbd0", a free one is taken.
        Netlink only: `reattach_timeout`, seconds for which requests wait for another server when
        this one has gone (None or 0: they fail at once), and `cookie`, the backend identifier.
        The sockets are closed in any case, or the server would never see its end.
        Errors: RbdnbdError, and the device is free again.
        """
        with ExitStack() as stack:
            connect = Connect(
                sockets=tuple(stack.enter_context(each).fileno() for each in socks),
                size=size - size % block_size,
                block_size=block_size,
                flags=flags,
                index=None if device is None else self.devices.index(device),
                timeout=timeout,
                dead_conn_timeout=reattach_timeout,
                backend_identifier=cookie,
            )
            try:
                attachment = self._connect(connect, use_ioctl=use_ioctl)
                self._bring_to_life(attachment, connect.size)
            except OSError as error:
                raise refusal(f"attach {device or 'an nbd device'}", error) from error
        return attachment

    def reattach(
        self,
        index: int,
        offer: Offer,
        count: int = 1,
        *,
        size: int,
        timeout: int | None,
        reattach_timeout: int | None,
        cookie: str,
    ) -> Attachment:
        """Give a device whose server has gone another one; its requests go on at once or soon.

        `count` is how many sockets it was attached with, each of which gets a successor. Block
        size, transmission flags and read-only state stay what `attach` made them, and so does a
        timeout that is None. `size` in bytes, both timeouts in seconds; `cookie` must be the
        device's own.
        Requests that wait to be sent go on at once. Those that the last server had been sent and
        has not answered are sent again when their timers run out; it may have performed them. A
        server that shuts down only its reading (SHUT_RD) can still read what it was sent, but
        answers no more: the kernel's next request fails with EPIPE, and the driver then shuts down
        its own end both ways (nbd_mark_nsock_dead). Seen on 6.1.
        Errors: RbdnbdError, and the device is as it was: not attached, or by ioctl, another cookie,
        or a server that lives.
        """
        self._check_cookie(index, cookie)
        attachment = Attachment(self, index)
        request = Reconfigure(
            index=index,
            backend_identifier=cookie,
            timeout=timeout,
            dead_conn_timeout=reattach_timeout,
        )
        hand_over(self.devices.path(index), self.family(), request, offer, count)
        attachment.resize(size)
        return attachment

    def _check_cookie(self, index: int, cookie: str) -> None:
        """Raise unless a device is attached, and has been by netlink, with this cookie."""
        device, found = self.devices.path(index), self.devices.backend(index)
        if self.devices.connected(index) is None:
            raise NotMapped(f"{device} is not attached", errno.ENODEV)
        if found is None:
            message = f"{device} has no cookie: only what netlink attached can be attached again"
            raise RbdnbdError(message, errno.EINVAL)
        if found != cookie:
            raise CookieMismatch(f"cookie mismatch: {device} has another one", errno.EINVAL)

    def _connect(self, connect: Connect, *, use_ioctl: bool) -> Attachment:
        family = None if use_ioctl else self.family()
        if family is None and len(connect.sockets) > 1:
            raise RbdnbdError("several connections need netlink, which this kernel has not for nbd")
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
            time.sleep(POLL_INTERVAL)

    def _attach_by_ioctl(self, connect: Connect) -> Attachment:
        """Try the device that is asked for, or all in turn, and take the first that is free."""
        indexes = self.devices.indexes() if connect.index is None else [connect.index]
        for index in indexes:
            if self.devices.connected(index) is not None:
                continue
            try:
                do_it = self.ioctls.attach(self.devices.path(index), connect)
                return Attachment(self, index, do_it)
            except OSError as error:
                # Someone else was faster: by ioctl (EBUSY), or by netlink (EINVAL).
                if error.errno != errno.EBUSY and self.devices.connected(index) is None:
                    raise
        if connect.index is not None:
            raise self.devices.busy(connect.index)
        message = f"no free nbd device: all {len(indexes)} are in use"
        raise NoFreeDevice(f"{message} (the nbd module's nbds_max sets how many)", errno.EBUSY)

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
                self.ioctls.clear_read_only(fd)
        except BaseException:
            if not attachment.released():
                self.disconnect(index)
                wait_until(lambda: self.devices.connected(index) is None, RELEASE_LIMIT)
            raise


class Attachment:
    """A device that this process has attached; every method may be called from any thread."""

    def __init__(self, driver: NbdDriver, index: int, do_it: DoIt | None = None) -> None:
        self.index = index
        self.device = str(driver.devices.path(index))
        self.method: Literal["netlink", "ioctl"] = "ioctl" if do_it else "netlink"
        self._driver = driver
        self._do_it = do_it
        self._identity = self._seen()

    def released(self) -> bool:
        """Tell whether the device is free, or somebody else's by now.

        It is ours as long as it has the pid and the cookie that it had when it became ours: the pid
        is then a predecessor's, perhaps, but every CONNECT writes a new one.
        """
        if self._do_it is not None:
            return not self._do_it.is_alive()
        return self._seen() != self._identity

    def error(self) -> OSError | None:
        """Return what NBD_DO_IT failed with, if it did."""
        return self._do_it.error if self._do_it is not None else None

    def wait_released(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds until `released`; return whether it is."""
        return wait_until(self.released, timeout)

    def resize(self, size: int) -> None:
        """Give the device a new size in bytes, less what is beyond whole blocks, in use or not.

        The kernel may wait until every request in flight is answered: call this from a thread that
        answers none. Whoever opens the device next looks for partitions, so it is opened once while
        somebody answers. Errors: RbdnbdError, with ENODEV for a device that is released.
        Source: nbd_set_size, Linux 6.1; it waits in 6.12 (queue_limits_commit_update_frozen).
        """
        devices, index = self._driver.devices, self.index
        if self.released():
            raise NotMapped(f"{self.device} is not attached", errno.ENODEV)
        block_size = devices.block_size(index)
        whole = size - size % block_size
        if devices.size(index) == whole:
            return
        try:
            self._set_size(whole, block_size)
            with opened(devices.path(index)):
                pass
        except OSError as error:
            raise refusal(f"resize {self.device}", error) from error
        log.info("%s has %d bytes now", self.device, whole)

    def replace(self, offer: Offer) -> None:
        """Give the device another socket for one of several that it has hung up on, by netlink.

        Errors: RbdnbdError, with ENODEV for a device that is released; `Busy`, and nothing is
        done, for one whose sockets are all alive.
        """
        devices, index = self._driver.devices, self.index
        if self.released():
            raise NotMapped(f"{self.device} is not attached", errno.ENODEV)
        request = Reconfigure(index=index, backend_identifier=devices.backend(index))
        hand_over(devices.path(index), self._driver.family(), request, offer, 1)

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

    def _seen(self) -> tuple[int | None, str | None]:
        devices = self._driver.devices
        return devices.connected(self.index), devices.backend(self.index)

    def _set_size(self, size: int, block_size: int) -> None:
        family = self._driver.family() if self._do_it is None else None
        if family is None:
            with opened(self._driver.devices.path(self.index)) as fd:
                self._driver.ioctls.resize(fd, size // block_size)
            return
        with family:
            cookie = self._driver.devices.backend(self.index)
            family.reconfigure(Reconfigure(index=self.index, backend_identifier=cookie, size=size))
