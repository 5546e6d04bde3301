"""What udev calls a device: /dev/rbd-nbd/POOL/[NAMESPACE/]IMAGE[@SNAP] (contrib/udev).

udev asks when the kernel says that a device has changed, which is too early at a map: the device
has no cookie yet, or, by ioctl, never gets one. So a mapping has the kernel say it once more when
it can be asked.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from rbdnbd.control import RUN_DIR
from rbdnbd.devices import NbdDevices
from rbdnbd.spec import ImageSpec

log = logging.getLogger(__name__)

_UNSAFE = re.compile(rb"[^\w#+.:=-]", re.ASCII)
_DOTS = re.compile(r"\.{1,2}")


def properties(index: int, devices: NbdDevices, run_dir: Path = RUN_DIR) -> dict[str, str] | None:
    """Return a device's properties for udev's database; None if it is not a mapping of ours.

    What the device holds is not read: its process may be gone, and a read would wait for another.
    """
    from rbdnbd.mapped import on_device, spec_of
    from rbdnbd.record import find, owned

    if devices.connected(index) is None:
        return None
    cookie = devices.backend(index)
    if cookie is not None and (record := find(cookie, run_dir)):
        waiting = {} if owned(cookie, run_dir) else {"RBDNBD_WAITING": "1"}
        return {"RBDNBD_NAME": path_of(record.spec)} | waiting
    if document := on_device(index, devices, run_dir):
        return {"RBDNBD_NAME": path_of(spec_of(document))}
    return None


def path_of(spec: ImageSpec) -> str:
    """Return the image's name as a path of directories, in which no character can do harm.

    What is not plain is written as udev writes it in links, `\\x20` for a blank, byte by byte, and
    so are the dots of a name that is "." or "..".
    """
    snap = spec.snap or ("" if spec.snap_id is None else str(spec.snap_id))
    parts = [_encoded(part) for part in (spec.pool, spec.namespace, spec.image) if part]
    return "/".join(parts) + (f"@{_encoded(snap)}" if snap else "")


def announce(index: int, devices: NbdDevices) -> None:
    """Have the kernel tell udev that a device and its partitions have changed."""
    disk = devices.queue(index).parent
    try:
        for directory in (disk, *sorted(disk.glob(f"{disk.name}p*"))):
            (directory / "uevent").write_text("change")
    except OSError as error:  # in a container /sys is read-only, and there is no udev
        log.info("udev is not told of %s: %s", devices.path(index), error.strerror)


def _encoded(part: str) -> str:
    if _DOTS.fullmatch(part):
        return part.replace(".", r"\x2e")
    data = part.encode(errors="surrogateescape")
    return _UNSAFE.sub(lambda match: b"\\x%02x" % match[0][0], data).decode()
