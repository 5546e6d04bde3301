"""What the kernel tells about /dev/nbdN, in /sys and /proc; this room only reads.

/sys/block/nbdN/pid is there from the moment the driver starts a device until, after the disconnect,
the last process that has the device open has closed it. It holds the id of the thread that attached
the device, as the initial pid namespace counts, and is not renewed when the device gets another
server: it says that a device is taken, not that somebody serves it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rbdnbd.errors import DeviceBusy, UsageError

SECTOR_SIZE = 512  # the unit of /sys/block/*/size, whatever the block size
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class NbdDevices:
    """The nbd devices of this machine; every method may be called from any thread."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")

    def driver_present(self) -> bool:
        """Tell whether the nbd driver is in the kernel, as a module or built in."""
        return (self.sys / "module/nbd").exists()

    def index(self, path: str) -> int:
        """Return N of "/dev/nbdN", or raise UsageError."""
        match = re.fullmatch(r"/nbd(0|[1-9][0-9]{0,5})", path.removeprefix(str(self.dev)))
        if match is None or not path.startswith(str(self.dev)):
            raise UsageError(f"invalid device path: {path} (expected {self.dev}/nbdN)")
        return int(match[1])

    def path(self, index: int) -> Path:
        """Return the path of the device node."""
        return self.dev / f"nbd{index}"

    def indexes(self) -> list[int]:
        """Return the index of every device that the driver has made, in rising order."""
        names = (entry.name for entry in (self.sys / "block").glob("nbd*"))
        return sorted(int(name[3:]) for name in names if name[3:].isdecimal())

    def connected(self, index: int) -> int | None:
        """Return the id of the thread that attached the device, None for a free device."""
        pid = self._attribute(index, "pid")
        return None if pid is None else int(pid)

    def busy(self, index: int) -> DeviceBusy:
        """Return the refusal of a device that others have."""
        thread = self.connected(index)
        if thread is None:
            message = f"{self.path(index)} is busy: another process has it open"
        else:
            status = _read(self.proc / f"{thread}/status") or ""
            process = re.search(r"^Tgid:\s*(\d+)$", status, re.MULTILINE)
            by = process[1] if process else thread
            message = f"{self.path(index)} is already in use (by process {by})"
        return DeviceBusy(message, errno.EBUSY)

    def backend(self, index: int) -> str | None:
        """Return the backend identifier, which only netlink and Linux 5.14 can give a device."""
        return self._attribute(index, "backend") or None

    def size(self, index: int) -> int:
        """Return the size in bytes, 0 for a free device or none."""
        return int(self._attribute(index, "size") or 0) * SECTOR_SIZE

    def block_size(self, index: int) -> int:
        """Return the size of a block in bytes; 512 for a device that does not exist."""
        return int(self._attribute(index, "queue/logical_block_size") or SECTOR_SIZE)

    def queue(self, index: int) -> Path:
        """Return the directory of the block queue's settings."""
        return self.sys / f"block/nbd{index}/queue"

    def holder(self, index: int) -> str | None:
        """Say who holds the device or a partition of it, and how to end that; None if unseen.

        A mount in another mount namespace, or a process with an exclusive open, is not seen.
        """
        disk = self.sys / f"block/nbd{index}"
        for directory in (disk, *sorted(disk.glob(f"nbd{index}p*"))):
            device = self.dev / directory.name
            for mount_point in self._mount_points(device, directory):
                return f"{device} is mounted on {mount_point}: unmount it first"
            if str(device) in self._swaps():
                return f"{device} is in use as swap space: run swapoff {device} first"
            for upper in sorted((directory / "holders").glob("*")):
                name = _read(upper / "dm/name")
                above = self.dev / (f"mapper/{name}" if name else upper.name)
                return f"{device} is in use by {above}: remove that first"
        return None

    def _attribute(self, index: int, name: str) -> str | None:
        return _read(self.sys / f"block/nbd{index}" / name)

    def _mount_points(self, device: Path, directory: Path) -> Iterator[str]:
        """Yield where `device` is mounted, by number or, for btrfs, by name: see proc(5)."""
        number = _read(directory / "dev")
        for line in (_read(self.proc / "self/mountinfo") or "").splitlines():
            left, _, right = line.partition(" - ")
            fields = left.split(" ")
            if fields[2] == number or right.split(" ")[1] == str(device):
                yield _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])

    def _swaps(self) -> set[str]:
        return {line.split()[0] for line in (_read(self.proc / "swaps") or "").splitlines()}


def _read(path: Path) -> str | None:
    """Return a file's text without its newline; None when it is not there, or no longer."""
    try:
        return path.read_text(errors="surrogateescape").rstrip("\n")
    except OSError:
        return None
