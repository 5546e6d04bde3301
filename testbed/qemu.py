"""QEMU as this project starts it: which accelerator, which devices, and an end for certain.

The processor is emulated unless KVM is proven to work here, one thread for each virtual one.
The guest has a serial console that goes to a file, the host's root and the shares over 9p, a user
network, and virtio-serial ports, each the far end of a socket pair of ours.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from testbed.kernel import BUILD, Kernel, initramfs
from testbed.processes import Unavailable

QEMU = "qemu-system-x86_64"
# Watchdogs are off because emulation on a busy host looks like a lock-up to them.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 oops=panic nowatchdog mitigations=off net.ifnames=0"
    " random.trust_cpu=on audit=0"
)
POSSIBLE_PROCESSORS = 4
"""The guest may switch on as many; those that are off cost nothing, and nbd counts them."""
KVM_PROBE_SECONDS = 10.0


class Port:
    """One virtio-serial port: our end of a socket pair, and the end that QEMU inherits.

    The guest sees the ports in the order in which `devices` is given them.
    """

    def __enter__(self) -> Port:
        self.ours, self.theirs = socket.socketpair()
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.theirs.close()


def machine(
    kernel: Kernel, initrd: Path, accelerator: str, memory: str, processors: int
) -> list[str]:
    """Return QEMU's arguments for the processors, of which so many are on, memory and kernel."""
    if shutil.which(QEMU) is None:
        raise Unavailable(f"{QEMU} is not installed: install qemu-system-x86")
    cpu = "host" if accelerator == "kvm" else "max"
    possible = max(processors, POSSIBLE_PROCESSORS)
    arguments = f"{KERNEL_ARGUMENTS} maxcpus={processors}"
    return [
        QEMU,
        *("-accel", "kvm" if accelerator == "kvm" else "tcg,thread=multi"),
        *("-cpu", cpu, "-smp", str(possible), "-m", memory),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd), "-append", arguments),
    ]


def devices(console: Path, shares: Sequence[Path], printed: Port, fate: Port) -> Iterator[str]:
    """Yield QEMU's arguments for what is plugged into the machine."""
    yield from ("-chardev", f"file,id=console,path={console},append=on")
    yield from ("-serial", "chardev:console")
    yield from ("-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net,romfile=")
    common = "local,security_model=none,multidevs=remap"
    yield from ("-virtfs", f"{common},path=/,mount_tag=root,readonly=on")
    for number, share in enumerate(shares):
        yield from ("-virtfs", f"{common},path={share.resolve()},mount_tag=share{number}")
    yield from ("-device", "virtio-serial-pci")
    for name, port in (("output", printed), ("fate", fate)):
        yield from ("-chardev", f"socket,id={name},fd={port.theirs.fileno()}")
        yield from ("-device", f"virtserialport,chardev={name},name={name}")


@contextmanager
def running(
    argv: Sequence[str], ports: Sequence[Port], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run QEMU as long as the body runs; the kernel kills it should this thread die first.

    What QEMU itself has to say is appended to `log`.
    """
    kept = [port.theirs.fileno() for port in ports]
    with log.open("ab") as said:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *argv],
            pass_fds=kept,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    try:
        for port in ports:
            port.theirs.close()
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def temporary_file(content: bytes) -> Iterator[Path]:
    """Give a file with this content for QEMU to read."""
    with tempfile.NamedTemporaryFile(prefix="rbdnbd-initrd-") as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def accelerator(kernel: Kernel) -> str:
    """Return "kvm" when a VM of ours boots with it here, else "tcg" (emulation).

    A /dev/kvm may open and still hang a guest, so it is tried once for each boot of this host.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    verdict = BUILD / f"accelerator-{boot}"
    if not verdict.exists():
        verdict.write_text("kvm" if _boots_with_kvm(kernel) else "tcg")
    return verdict.read_text()


def _boots_with_kvm(kernel: Kernel) -> bool:
    """Boot a guest that only says it is alive; ten seconds are ten times what it needs."""
    init = b"#!/bin/busybox sh\necho alive\n/bin/busybox poweroff -n -f\n"
    with temporary_file(initramfs(kernel, {"init": init})) as initrd:
        argv = [*machine(kernel, initrd, "kvm", "512M", 2), "-serial", "stdio"]
        try:
            done = subprocess.run(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=KVM_PROBE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return b"alive" in done.stdout
