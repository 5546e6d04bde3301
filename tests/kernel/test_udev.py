"""The links that udev makes to mapped devices, with a real systemd-udevd and its stock rules."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.kernel.test_take_over import process_of, succeed
from tests.support.host_services import install, udevd
from tests.support.waiting import wait_until

MakeImage = Callable[..., str]
Rbd = Callable[..., str]

LINKS = Path("/dev/rbd-nbd")
UUID = "6f70f8c4-7c4f-4b0e-9a5c-3d1f0c3c2a11"
SETTLE_SECONDS = 30
NETLINK_KOBJECT_UEVENT = 15
KERNEL_EVENTS = 1


@pytest.fixture(scope="module")
def rules(nbd_module: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A udevd that knows our rule."""
    prefix = tmp_path_factory.mktemp("prefix")
    install(prefix)
    with udevd(prefix):
        yield


@pytest.fixture(autouse=True)
def settled(nothing_left_behind: None, rules: None) -> Iterator[None]:
    """Let udev come to rest before a test is judged by what it leaves behind."""
    yield
    settle()


def settle() -> None:
    """Wait until udev has worked off everything; fail if that takes too long."""
    subprocess.run(["udevadm", "settle", f"--timeout={SETTLE_SECONDS}"], check=True)


def properties(device: str) -> dict[str, str]:
    """Return what udev's database holds of a device."""
    show = ["udevadm", "info", "--query=property", device]
    lines = subprocess.run(show, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


def links() -> dict[str, str]:
    """Return every link below /dev/rbd-nbd, by its name, and the device that it leads to."""
    found = (path for path in LINKS.rglob("*") if path.is_symlink())
    return {str(path.relative_to(LINKS)): str(path.resolve()) for path in found}


def trigger(device: str) -> None:
    """Have the kernel say that a device has changed, and wait for udev."""
    subprocess.run(["udevadm", "trigger", "--action=change", device], check=True)
    settle()


@pytest.mark.parametrize("way", [(), ("--ioctl",)], ids=["netlink", "ioctl"])
def test_a_device_has_its_images_name_as_long_as_it_is_mapped(
    way: tuple[str, ...], rbdnbd: Command, image: MakeImage
) -> None:
    spec = image("16M")
    device = succeed(rbdnbd("map", spec, *way))
    settle()
    assert links() == {spec: device}
    succeed(rbdnbd("unmap", device))
    settle()
    assert links() == {}


@pytest.mark.parametrize("way", [(), ("--ioctl",)], ids=["netlink", "ioctl"])
def test_a_device_is_announced_by_its_process_however_soon_udev_has_asked_before(
    way: tuple[str, ...], rbdnbd: Command, image: MakeImage
) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as sock:
        sock.bind((0, KERNEL_EVENTS))
        device = succeed(rbdnbd("map", image("16M"), *way))
        sock.setblocking(False)
        events = []
        with suppress(BlockingIOError):
            while True:
                events.append(sock.recv(65536).split(b"\0"))
    what = f"change@/devices/virtual/block/{Path(device).name}".encode()
    ours = [event for event in events if event[0] == what and b"SYNTH_UUID=0" in event]
    assert len(ours) == 1
    succeed(rbdnbd("unmap", device))


def test_partitions_are_numbered_and_go_with_the_device(rbdnbd: Command, image: MakeImage) -> None:
    spec = image("32M")
    device = succeed(rbdnbd("map", spec))
    subprocess.run(["sfdisk", "-q", device], input="size=8M\nsize=8M\n", text=True, check=True)
    settle()
    assert links() == {spec: device, f"{spec}-part1": f"{device}p1", f"{spec}-part2": f"{device}p2"}
    succeed(rbdnbd("unmap", device))
    settle()
    assert links() == {}
    device = succeed(rbdnbd("map", spec))
    settle()
    assert set(links()) == {spec, f"{spec}-part1", f"{spec}-part2"}
    succeed(rbdnbd("unmap", device))


def test_a_name_with_a_blank_is_one_link_and_touches_no_other(rbdnbd: Command, rbd: Rbd) -> None:
    spec = f"rbd/test {os.getpid()} zero"
    rbd("create", "--size", "16M", spec)
    rbd("snap", "create", "--no-progress", f"{spec}@a b")
    try:
        device = succeed(rbdnbd("map", f"{spec}@a b"))
        settle()
        assert links() == {f"{spec}@a b".replace(" ", r"\x20"): device}
        succeed(rbdnbd("unmap", device))
    finally:
        rbd("snap", "purge", "--no-progress", spec)
        rbd("rm", "--no-progress", spec)


@pytest.mark.parametrize("how", ["detached", "killed"])
def test_a_device_whose_process_is_gone_is_not_read_and_keeps_its_links(
    how: str, rbdnbd: Command, image: MakeImage
) -> None:
    spec = image("32M")
    device = succeed(rbdnbd("map", spec, "--reattach-timeout", "300"))
    subprocess.run(["mkfs.ext4", "-q", "-U", UUID, device], check=True)
    trigger(device)
    by_uuid = Path("/dev/disk/by-uuid", UUID)
    assert str(by_uuid.resolve()) == device
    if how == "killed":
        os.kill(pid := process_of(rbdnbd, device), signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 30, "it is dead")
    else:
        succeed(rbdnbd("detach", device))
    subprocess.run(["blockdev", "--flushbufs", device], check=True)  # a read is one of the server
    trigger(device)
    assert links() == {spec: device}
    assert str(by_uuid.resolve()) == device
    assert "ID_FS_TYPE" not in properties(device)
    succeed(rbdnbd("attach", "--device", device))
    settle()
    assert properties(device)["ID_FS_TYPE"] == "ext4"
    assert links() == {spec: device}
    succeed(rbdnbd("unmap", device))


def test_a_strangers_device_has_no_link_and_no_name(rbdnbd: Command, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    connect = ["qemu-nbd", "--format=raw", "--connect=/dev/nbd9", str(disk)]
    with subprocess.Popen(connect) as stranger:
        try:
            wait_until(Path("/sys/block/nbd9/pid").exists, 30, "it is connected")
            trigger("/dev/nbd9")
            assert links() == {}
            done = rbdnbd("name", "/dev/nbd9")
            assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
        finally:
            subprocess.run(["qemu-nbd", "--disconnect", "/dev/nbd9"], check=True)
        stranger.wait(30)
    wait_until(lambda: not Path("/sys/block/nbd9/pid").exists(), 30, "it is free")
