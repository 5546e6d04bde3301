"""A make-believe nbd driver: /sys, /dev, /proc in a directory, and ioctls that change them."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

from rbdnbd import ioctl
from rbdnbd.devices import NbdDevices
from rbdnbd.ioctl import NbdIoctls
from rbdnbd.netlink import Connect, FamilyNotFoundError, Reconfigure

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
            self.show(index, "size", 0)

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

    def connect(self, index: int, size: int, pid: int = 4711, backend: str | None = None) -> None:
        """Show a device as attached."""
        self.show(index, "size", size // 512)
        if backend is not None:
            self.show(index, "backend", backend)
        self.show(index, "pid", pid)

    def disconnect(self, index: int) -> None:
        """Show a device as free."""
        for attribute in ("pid", "backend"):
            (self.devices.queue(index).parent / attribute).unlink(missing_ok=True)
        self.show(index, "size", 0)

    def ioctl(self, fd: int, request: int, argument: int) -> None:
        device = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        name = NAMES[request]
        if name == "BLKROSET":
            argument = ctypes.c_int.from_address(argument).value
        self.calls.append((device, name, argument))
        if name in self.refusals:
            raise OSError(self.refusals[name], os.strerror(self.refusals[name]))
        if name == "NBD_SET_SIZE_BLOCKS" and device in self._running:
            block_size = self.devices.block_size(int(device.removeprefix("nbd")))
            self.show(int(device.removeprefix("nbd")), "size", argument * block_size // 512)
        elif name in ("NBD_SET_BLKSIZE", "NBD_SET_SIZE_BLOCKS"):
            self._sizes.setdefault(device, []).append(argument)
        if name == "NBD_DO_IT":
            self._do_it(device)
        if name == "NBD_CLEAR_SOCK":
            self.let_go(device)

    def let_go(self, device: str) -> None:
        """End NBD_DO_IT as a disconnect does."""
        if device in self._running:
            self._running.pop(device).set()
        self.disconnect(int(device.removeprefix("nbd")))

    def _do_it(self, device: str) -> None:
        self.signals_left = signal.valid_signals() - signal.pthread_sigmask(signal.SIG_BLOCK, [])
        ended = self._running[device] = threading.Event()
        if self.alive:
            block_size, blocks = self._sizes.pop(device)
            self.show(int(device.removeprefix("nbd")), "queue/logical_block_size", block_size)
            self.connect(int(device.removeprefix("nbd")), block_size * blocks)
        assert ended.wait(10)

    def show(self, index: int, attribute: str, value: int | str) -> None:
        """Write a file that is never seen half written, as is true of sysfs."""
        path = self.devices.queue(index).parent / attribute
        written = path.with_suffix(f".{threading.get_ident()}")
        written.write_text(f"{value}\n")
        written.replace(path)


class FakeFamily:
    """The family "nbd" of a FakeDriver; `refusals` are used up one a CONNECT or RECONFIGURE.

    A RECONFIGURE takes sockets when it comes after `deaf` others, as the kernel does once it has
    noticed that the last server is gone, and no more than `dead`, which is how many have ended.
    """

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.refusals: list[int] = []
        self.connects: list[Connect] = []
        self.reconfigures: list[Reconfigure] = []
        self.disconnects: list[int] = []
        self.missing = False
        self.deaf = 0
        self.dead = 1
        self.taken: list[int] = []

    def __call__(self) -> FakeFamily:
        if self.missing:
            raise FamilyNotFoundError(errno.ENOENT, "no generic-netlink family nbd")
        return self

    def __enter__(self) -> FakeFamily:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def connect(self, request: Connect) -> int:
        self.connects.append(request)
        self._refuse()
        index = request.index or 0
        if self.driver.alive:
            self.driver.connect(index, request.size, backend=request.backend_identifier)
        return index

    def reconfigure(self, request: Reconfigure) -> None:
        self.reconfigures.append(request)
        self._refuse()
        if request.size is not None:
            self.driver.show(request.index, "size", request.size // 512)
        if len(self.reconfigures) > self.deaf:
            left = self.dead - len(self.taken)
            self.taken += [os.dup(fd) for fd in request.sockets[:left]]

    def disconnect(self, index: int) -> None:
        self.disconnects.append(index)
        self.driver.let_go(f"nbd{index}")

    def close(self) -> None:
        """Let go of the sockets."""
        for fd in self.taken:
            os.close(fd)

    def _refuse(self) -> None:
        if self.refusals:
            number = self.refusals.pop(0)
            raise OSError(number, os.strerror(number))
