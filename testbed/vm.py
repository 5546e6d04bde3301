"""Run a command under a kernel of our own, on the files of this host.

QEMU boots Debian's kernel (`testbed.kernel`); the guest's root is the host's root, read-only over
9p with a tmpfs laid over it, so that whatever is installed here runs there unchanged and leaves
nothing behind. Only the directories named `shares` are written through to the host. The guest
reaches the host's addresses through QEMU's user network. Two virtio-serial ports come back:
one carries what the command prints, the other one line with its exit status. A guest that ends
without that line is lost, which is no verdict on the command: `VMLost` says so, with the
console's last lines. QEMU dies with this process, whatever ends it.

By hand: python -m testbed.vm [--modprobe nbd] [--share DIR] -- COMMAND [ARGUMENT...]
"""

from __future__ import annotations

import argparse
import os
import selectors
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from testbed.kernel import BUILD, debian_kernel, initramfs
from testbed.processes import Unavailable
from testbed.qemu import Port, accelerator, devices, machine, running, temporary_file

INIT = Path(__file__).with_name("vm_init.sh")
PACKET = 512000  # 9p's msize; the most that virtio carries in one request on 6.1
# What a line of the console contains that makes even a passed command suspect.
TROUBLE = ("BUG:", "Oops:", "WARNING:", "Kernel panic", "blocked for more than")
GUEST_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}
BOOT_SECONDS = 120.0
DRAIN_SECONDS = 10.0
CONSOLE_LINES = 15


class VMLost(Exception):
    """The VM ended, or had to be ended, before its command did: the command has no status."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command in the VM ended, and which lines of the kernel's console look like trouble."""

    status: int
    trouble: tuple[str, ...]
    boot_seconds: float


def _nothing(_: bytes) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class VM:
    """A kind of VM; every `run` boots a fresh one.

    `console` is the file that the guest kernel's messages go to, `shares` are directories of the
    host that the guest may write to, under the same names. `modprobe` names modules to load
    before the command. `limit` is the most that one command may take, in seconds. `processors`
    is two where they are real and one where they are emulated: a second emulated one makes
    every command take half as long again, and twice as long on a busy host.
    """

    console: Path
    shares: Sequence[Path] = ()
    modprobe: Sequence[str] = ()
    memory: str = "2G"
    processors: int | None = None
    limit: float = 1200.0

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        output: Callable[[bytes], None] = _nothing,
        stop: threading.Event | None = None,
    ) -> Outcome:
        """Run `argv` as root in a fresh VM and say how it ended; what it prints goes to `output`.

        `env` is added to a minimal environment. Setting `stop` from another thread ends the VM.
        Raises VMLost when the command got no exit status, Unavailable when nothing could boot.
        """
        kernel = debian_kernel()
        kind = accelerator(kernel)
        processors = self.processors or (2 if kind == "kvm" else 1)
        job = _job_script(argv, cwd or Path.cwd(), {**GUEST_ENVIRONMENT, **(env or {})}, self)
        settings = (
            f"msize={PACKET}\nmodules={shlex.quote(str(kernel.modules.resolve()))}\n"
            f"shares={shlex.quote(' '.join(str(share.resolve()) for share in self.shares))}\n"
        )
        files = {"init": INIT.read_bytes(), "job": job.encode(), "settings": settings.encode()}
        self.console.write_bytes(b"")
        with (
            temporary_file(initramfs(kernel, files)) as initrd,
            Port() as printed,
            Port() as fate,
            running(
                [
                    *machine(kernel, initrd, kind, self.memory, processors),
                    *devices(self.console, self.shares, printed, fate),
                ],
                (printed, fate),
                self.console,
            ) as process,
        ):
            watch = _Watch(self, printed.ours, fate.ours, output, stop)
            status = watch.until_fate()
            process.terminate()
            watch.drain()
        return Outcome(status, tuple(_trouble(self.console)), watch.boot_seconds)


class _Watch:
    """Follows a running VM: passes on what its command prints, waits for the line of its fate."""

    def __init__(
        self,
        vm: VM,
        printed: socket.socket,
        fate: socket.socket,
        output: Callable[[bytes], None],
        stop: threading.Event | None,
    ) -> None:
        self.vm, self.output, self.stop = vm, output, stop
        self.printed, self.fate = printed, fate
        self.started = time.monotonic()
        self.boot_seconds = 0.0
        self._said = b""

    def until_fate(self) -> int:
        """Return the command's exit status."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.printed, selectors.EVENT_READ)
            selector.register(self.fate, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select(timeout=0.5)}
                if self.printed in ready:
                    self.output(self.printed.recv(65536))
                if self.fate in ready:
                    status = self._hear()
                    if status is not None:
                        return status
                self._check()

    def drain(self) -> None:
        """Pass on what the command printed last; QEMU is ending and closes its end."""
        self.printed.settimeout(DRAIN_SECONDS)
        with suppress(TimeoutError):
            while data := self.printed.recv(65536):
                self.output(data)

    def _hear(self) -> int | None:
        data = self.fate.recv(4096)
        if not data:
            raise self._lost("the VM ended before its command did")
        self._said += data
        *lines, self._said = self._said.split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "exit":
                return int(rest)
            if word == "failed":
                raise self._lost(f"the VM could not start its command: {rest}")
            self.boot_seconds = time.monotonic() - self.started
        return None

    def _check(self) -> None:
        passed = time.monotonic() - self.started
        if self.stop is not None and self.stop.is_set():
            raise self._lost("the VM was stopped")
        if passed > self.vm.limit:
            raise self._lost(f"the VM took longer than its limit of {self.vm.limit:.0f} s")
        if not self.boot_seconds and passed > BOOT_SECONDS:
            raise self._lost(f"the VM did not start its command within {BOOT_SECONDS:.0f} s")

    def _lost(self, reason: str) -> VMLost:
        said = "".join(f": {line}" for line in _trouble(self.vm.console)[:1])
        lines = self.vm.console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
        tail = "".join(f"\n  {line}" for line in lines)
        return VMLost(f"{reason}{said}\nthe console's last lines ({self.vm.console}):{tail}")


def _job_script(argv: Sequence[str], cwd: Path, env: Mapping[str, str], vm: VM) -> str:
    """The guest's process 1 after the change of root; it waits for orphans, too, as an init does.

    A port can be opened once only, so both are opened here and the command inherits the output.
    """
    environment = " ".join(shlex.quote(f"{name}={value}") for name, value in env.items())
    modprobes = "".join(
        f"/sbin/modprobe {shlex.quote(module)} || failed 'modprobe {module}'\n"
        for module in vm.modprobe
    )
    return f"""\
export PATH={shlex.quote(env["PATH"])}
rest() {{ while :; do /run/vm/busybox sleep 3600; done; }}
failed() {{ echo "failed $*" >&3; rest; }}
exec 3>"$(echo /dev/vport*p2)" >"$(echo /dev/vport*p1)" 2>&1 </dev/null
{modprobes}cd {shlex.quote(str(cwd))} || failed 'no directory {cwd}'
echo started >&3
/usr/bin/env -i {environment} {shlex.join(argv)} 3>&-
echo "exit $?" >&3
rest
"""


def _trouble(console: Path) -> list[str]:
    """Return the console's lines that no good run has."""
    lines = console.read_text(errors="replace").splitlines()
    return [line.strip() for line in lines if any(mark in line for mark in TROUBLE)]


def _print_now(data: bytes) -> None:
    os.write(1, data)


def main() -> int:
    """Run one command in a VM by hand."""
    parser = argparse.ArgumentParser(prog="python -m testbed.vm", description=main.__doc__)
    parser.add_argument("--modprobe", action="append", default=[], metavar="MODULE")
    parser.add_argument("--share", action="append", default=[], type=Path, metavar="DIRECTORY")
    parser.add_argument("--memory", default="2G")
    parser.add_argument("--limit", type=float, default=1200.0, metavar="SECONDS")
    parser.add_argument("--console", type=Path, default=BUILD / "console.log", metavar="FILE")
    parser.add_argument("command", nargs="+")
    wanted = parser.parse_args()
    wanted.console.parent.mkdir(parents=True, exist_ok=True)
    vm = VM(
        console=wanted.console,
        shares=wanted.share,
        modprobe=wanted.modprobe,
        memory=wanted.memory,
        limit=wanted.limit,
    )
    try:
        outcome = vm.run(wanted.command, output=_print_now)
    except (VMLost, Unavailable) as error:
        print(f"testbed.vm: {error}", file=sys.stderr)
        return 255
    for line in outcome.trouble:
        print(f"testbed.vm: the kernel says: {line}", file=sys.stderr)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
