"""The settings of a block device's queue, in /sys/block/nbdN/queue.

What the kernel starts with is made for disks, not for images whose objects are megabytes.
"""

from __future__ import annotations

import logging
from typing import Final

from rbdnbd.devices import NbdDevices

log = logging.getLogger(__name__)

SUCCESSOR_MILLISECONDS: Final = 500
"""How long a request is out before the driver looks whether its server has been replaced."""


def tune(devices: NbdDevices, index: int, object_size: int) -> None:
    """Let one request carry an object of `object_size` bytes, and read two objects ahead.

    The driver starts with 128 KiB (6.1) or 1280 KiB (6.12) a request and takes up to 32 MiB.
    The settings outlive a disconnect, so every mapping makes its own. A failure is logged.
    """
    queue = devices.queue(index)
    try:
        limit = int((queue / "max_hw_sectors_kb").read_text())
        request_kib = min(max(object_size // 1024, 4), limit)
        (queue / "max_sectors_kb").write_text(str(request_kib))
        (queue / "read_ahead_kb").write_text(str(2 * request_kib))
    except OSError as error:
        log.warning("cannot tune %s: %s", devices.path(index), error)


def expect_successor(devices: NbdDevices, index: int) -> None:
    """Have requests that die with their server sent again within 1.6 s of a successor's attach.

    What a server has been sent and has not answered is lost to its successor. The driver sends it
    again only when the request's own timer runs out (nbd_xmit_timeout, 2c272542baee, Linux 5.8),
    which is 30 s by default, and fixed when the request starts: too late to change once the server
    is gone. Here it is `SUCCESSOR_MILLISECONDS`, to which the block layer adds up to a second.

    The price: when the timer runs out on a server that lives, nothing happens but a line in the
    kernel's log, "Possible stuck request", 115 bytes, every 1.5 s for each request that waits: on a
    cluster that hangs 21 lines a second with 32 in flight, 85 with 128, the most there can be.

    Call this after each attach by netlink that has a reattach timeout, and after each reattach,
    which may put the timer back. But do not where requests have a timeout (other than 0): the
    driver would hang up on a server that is merely slow. A failure is logged. Seen on 6.1.
    """
    try:
        (devices.queue(index) / "io_timeout").write_text(str(SUCCESSOR_MILLISECONDS))
    except OSError as error:
        log.warning("cannot shorten the timer of %s: %s", devices.path(index), error)
