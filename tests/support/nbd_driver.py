"""A make-believe nbd driver: /sys, /dev, /proc in a directory, and ioctls that change them."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

from rbdnbd import ioctl
from rbdnbd.devices import NbdDevices
from rbdnbd.ioctl import NbdIoctls

NAMES = {value: name for name, value in vars(ioctl).items() if name.startswith(("NBD_", "BLK"))}


class FakeDriver:
    """Devices that attach and let go as the driver's do, and that write down what is asked.

    `calls` has each ioctl as (device, name, argument), `refusals` the errno by which the named
    ioctls fail; with `alive` false an attached device never shows up in sysfs.
    """

    def __init__(self, root: Path, count: int = 2) -> None:
        self.devices = NbdDevices(sys=root / "sys", dev=root / "dev", proc=root / "proc")
        self.calls: list[tuple[str, str, int]] = []
        self.refusals: dict[str, int] = {}
        self.alive = True
        self.signals_left: set[int] | None = None
        self._sizes: dict[str, list[int]] = {}
        self._running: dict[str, threading.Event] = {}
        for directory in ("dev", "proc/self", "proc/sys/kernel", "sys/module/nbd"):
            (root / directory).mkdir(parents=True)
        for index in range(count):
            self.devices.queue(index).mkdir(parents=True)
            self.devices.path(index).touch()
            self._show(index, "size", 0)

    @property
    def ioctls(self) -> NbdIoctls:
        return NbdIoctls(self.ioctl)

    def names(self) -> list[str]:
        """The names of the ioctls so far."""
        return [name for _, name, _ in self.calls]

    def open_here(self) -> list[str]:
        """The devices that this process has open."""
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # the descriptor of this very listing
                opened = entry.readlink()
                if opened.parent == self.devices.dev:
                    found.append(opened.name)
        return found

    def connect(self, index: int, size: int, pid: int = 4711) -> None:
        """Show a device as attached."""
        self._show(index, "size", size // 512)
        self._show(index, "pid", pid)

    def disconnect(self, index: int) -> None:
        """Show a device as free."""
        (self.devices.queue(index).parent / "pid").unlink(missing_ok=True)
        self._show(index, "size", 0)

    def ioctl(self, fd: int, request: int, argument: int) -> None:
        device = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        name = NAMES[request]
        if name == "BLKROSET":
            argument = ctypes.c_int.from_address(argument).value
        self.calls.append((device, name, argument))
        if name in self.refusals:
            raise OSError(self.refusals[name], os.strerror(self.refusals[name]))
        if name in ("NBD_SET_BLKSIZE", "NBD_SET_SIZE_BLOCKS"):
            self._sizes.setdefault(device, []).append(argument)
        if name == "NBD_DO_IT":
            self._do_it(device)
        if name == "NBD_CLEAR_SOCK":
            self.let_go(device)

    def let_go(self, device: str) -> None:
        """End NBD_DO_IT as a disconnect does."""
        if device in self._running:
            self._running[device].set()
        self.disconnect(int(device.removeprefix("nbd")))

    def _do_it(self, device: str) -> None:
        self.signals_left = signal.valid_signals() - signal.pthread_sigmask(signal.SIG_BLOCK, [])
        ended = self._running[device] = threading.Event()
        if self.alive:
            block_size, blocks = self._sizes.pop(device)
            self.connect(int(device.removeprefix("nbd")), block_size * blocks)
        assert ended.wait(10)

    def _show(self, index: int, attribute: str, value: int) -> None:
        """Write a file that is never seen half written, as is true of sysfs."""
        path = self.devices.queue(index).parent / attribute
        written = path.with_suffix(f".{threading.get_ident()}")
        written.write_text(f"{value}\n")
        written.replace(path)
