"""Get the nbd driver into the kernel; the one room that runs modprobe."""

from __future__ import annotations

import errno
import subprocess

from rbdnbd.devices import NbdDevices
from rbdnbd.errors import RbdnbdError


def load_driver(devices: NbdDevices) -> None:
    """Load the kernel's module nbd unless the driver is there already.

    Runs the program that the kernel itself would run (/proc/sys/kernel/modprobe), which needs root.
    Errors: RbdnbdError with modprobe's own last line.
    """
    if devices.driver_present():
        return
    try:
        modprobe = (devices.proc / "sys/kernel/modprobe").read_text().strip()
        done = subprocess.run(
            [modprobe, "nbd"], capture_output=True, text=True, errors="replace", check=False
        )
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
    if not devices.driver_present():
        message = f"the kernel has no nbd driver: modprobe nbd failed: {reason}"
        raise RbdnbdError(message, errno.ENODEV)
