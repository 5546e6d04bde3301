"""The settings of a block device's queue, in /sys/block/nbdN/queue.

What the kernel starts with is made for disks, not for images whose objects are megabytes.
"""

from __future__ import annotations

import logging

from rbdnbd.devices import NbdDevices

log = logging.getLogger(__name__)


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
