"""Get the nbd driver into the kernel; the one room that runs modprobe."""

from __future__ import annotations

import errno
from typing import Final

from rbdnbd.devices import NbdDevices
from rbdnbd.errors import RbdnbdError

MAX_PART: Final = 255
"""Partitions of a device when the driver is loaded here; by itself it would make 16."""


def load_driver(
    devices: NbdDevices, *, nbds_max: int | None = None, max_part: int | None = None
) -> bool:
    """Load the kernel's module nbd; return False when the driver is there already.

    Only a driver that is loaded here takes `nbds_max`, how many devices it makes at once (None: 16,
    its own choice), and `max_part`, how many partitions each may have (None: `MAX_PART`). Runs the
    program that the kernel itself would run (/proc/sys/kernel/modprobe), which needs root.
    Errors: RbdnbdError with modprobe's own last line.
    """
    if devices.driver_present():
        return False
    import subprocess

    parameters = [f"max_part={MAX_PART if max_part is None else max_part}"]
    if nbds_max is not None:
        parameters.insert(0, f"nbds_max={nbds_max}")
    try:
        modprobe = (devices.proc / "sys/kernel/modprobe").read_text().strip()
        argv = [modprobe, "nbd", *parameters]
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
    if not devices.driver_present():
        message = f"the kernel has no nbd driver: modprobe nbd failed: {reason}"
        raise RbdnbdError(message, errno.ENODEV)
    return True
