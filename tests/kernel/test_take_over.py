"""Detach, attach, kill -9, replace and resize, as a user does them, under IO that is checked."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

Rbd = Callable[..., str]
MakeImage = Callable[..., str]


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command that has to succeed printed on stdout."""
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def engine() -> str:
    """The engine that serves the device."""
    return "threads"


each_engine = pytest.mark.parametrize("engine", ["threads", "events"])


@pytest.fixture
def device(rbdnbd: Command, image: MakeImage, engine: str) -> Iterator[str]:
    """An image of 64 MiB, mapped; unmapped in the end whoever serves it then."""
    options = ("--reattach-timeout", "120", "--io-engine", engine)
    device = succeed(rbdnbd("map", image("64M"), *options))
    yield device
    succeed(rbdnbd("unmap", device))


def process_of(rbdnbd: Command, device: str) -> int:
    """Return the process that serves a device."""
    listed = json.loads(succeed(rbdnbd("list-mapped", "--format", "json")))
    (found,) = (entry for entry in listed if entry["device"] == device)
    return int(found["id"])


@contextmanager
def verified_io(device: str, seconds: int) -> Iterator[subprocess.Popen[str]]:
    """Run fio with verification on a device meanwhile; it must end without an error."""
    fio = subprocess.Popen(
        [
            *("fio", "--name=io", f"--filename={device}", "--direct=1", "--ioengine=libaio"),
            *("--rw=randrw", "--bs=4k", "--iodepth=8", "--size=16m", "--verify=crc32c"),
            *("--verify_backlog=64", "--verify_fatal=1", "--verify_state_save=0"),
            *("--time_based", f"--runtime={seconds}", "--output-format=terse"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: requests(device) > 50, 60, "IO on the device")
        yield fio
        said, _ = fio.communicate(timeout=180)
    finally:
        fio.kill()
    assert fio.returncode == 0, said


def requests(device: str) -> int:
    """Return how many reads and writes the kernel has completed on a device."""
    fields = Path(f"/sys/block/{Path(device).name}/stat").read_text().split()
    return int(fields[0]) + int(fields[4])


@each_engine
def test_io_waits_from_detach_to_attach_and_goes_on_without_an_error(
    rbdnbd: Command, device: str, rbd: Rbd
) -> None:
    with verified_io(device, 25):
        succeed(rbdnbd("detach", device))
        assert succeed(rbdnbd("list-mapped")) == ""
        before = requests(device)
        assert succeed(rbdnbd("attach", "--device", device)) == device
        wait_until(lambda: requests(device) > before + 50, 30, "IO goes on")


def test_sigterm_leaves_the_device_to_a_successor_and_neither_lock_nor_watcher(
    rbdnbd: Command, device: str, rbd: Rbd
) -> None:
    with open(device, "r+b", buffering=0) as disk:
        os.write(disk.fileno(), b"answered".ljust(4096))
        os.fsync(disk.fileno())
    pid = process_of(rbdnbd, device)
    listed = json.loads(succeed(rbdnbd("list-mapped", "--format", "json")))
    spec = f"{listed[0]['pool']}/{listed[0]['image']}"
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60, "the process is gone")
    assert Path(f"/sys/block/{Path(device).name}/pid").exists()
    assert json.loads(rbd("status", "--format", "json", spec)) == {"watchers": []}
    assert json.loads(rbd("lock", "ls", "--format", "json", spec)) == []
    succeed(rbdnbd("attach", "--device", device))
    with open(device, "rb") as disk:
        assert disk.read(8) == b"answered"


@each_engine
def test_after_kill_9_the_successor_fences_and_io_goes_on_without_an_error(
    rbdnbd: Command, device: str
) -> None:
    with verified_io(device, 40):
        os.kill(process_of(rbdnbd, device), signal.SIGKILL)
        before = requests(device)
        succeed(rbdnbd("attach", "--device", device))
        attached = time.monotonic()
        wait_until(lambda: requests(device) > before + 50, 30, "IO goes on")
        assert time.monotonic() - attached < 15


@each_engine
def test_what_was_answered_before_a_kill_9_is_there_after_the_attach(
    rbdnbd: Command, device: str
) -> None:
    noise = mmap.mmap(-1, 4 << 20)  # as aligned as O_DIRECT wants it
    noise.write(os.urandom(len(noise)))
    file = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        for offset in (0, 8 << 20, 16 << 20):
            pid = process_of(rbdnbd, device)
            os.fsync(file)  # librbd holds nothing back before the first flush
            assert os.pwrite(file, noise, offset) == len(noise)
            os.kill(pid, signal.SIGKILL)
            succeed(rbdnbd("attach", "--device", device))
            found = mmap.mmap(-1, len(noise))
            assert os.preadv(file, [found], offset) == len(noise)
            assert found[:] == noise[:], f"what was written at {offset} is lost"
    finally:
        os.close(file)


@each_engine
def test_a_living_process_is_replaced_under_io(rbdnbd: Command, device: str) -> None:
    first = process_of(rbdnbd, device)
    with verified_io(device, 30):
        assert succeed(rbdnbd("attach", "--replace", "--device", device)) == device
        second = process_of(rbdnbd, device)
        assert second != first
        assert not Path(f"/proc/{first}").exists()


def test_a_device_with_a_living_process_is_not_attached(rbdnbd: Command, device: str) -> None:
    pid = process_of(rbdnbd, device)
    refused = rbdnbd("attach", "--device", device)
    assert (refused.returncode, refused.stderr) == (
        1,
        f"rbdnbd: {device} has process {pid} connected\n",
    )


def test_a_device_is_not_attached_with_another_cookie_or_image(
    rbdnbd: Command, device: str, image: MakeImage
) -> None:
    succeed(rbdnbd("detach", device))
    refused = rbdnbd("attach", "--device", device, "--cookie", "another")
    assert (refused.returncode, refused.stderr) == (
        1,
        f"rbdnbd: cookie mismatch: {device} has another one\n",
    )
    other = image("16M")
    refused = rbdnbd("attach", other, "--device", device)
    assert refused.returncode == 1
    assert f"not of {other}" in refused.stderr
    succeed(rbdnbd("attach", "--device", device))


def test_a_dead_mapping_is_unmapped_by_its_images_name(
    rbdnbd: Command, image: MakeImage, rbd: Rbd
) -> None:
    spec = image("16M")
    device = succeed(rbdnbd("map", spec))
    os.kill(process_of(rbdnbd, device), signal.SIGKILL)
    wait_until(lambda: succeed(rbdnbd("list-mapped")) == "", 20, "it is not listed any more")
    succeed(rbdnbd("unmap", spec))
    assert not Path(f"/sys/block/{Path(device).name}/pid").exists()
    assert rbdnbd("unmap", spec).stderr == f"rbdnbd: {spec} is not mapped\n"
    status = ("status", "--format", "json", spec)
    wait_until(lambda: not json.loads(rbd(*status))["watchers"], 60, "the dead one's watch ends")


@pytest.mark.parametrize("way", [(), ("--ioctl",)], ids=["netlink", "ioctl"])
def test_a_resize_by_anyone_is_seen_by_the_device_within_seconds(
    way: tuple[str, ...], rbdnbd: Command, image: MakeImage, rbd: Rbd
) -> None:
    spec = image("16M")
    device = succeed(rbdnbd("map", spec, *way))
    sectors = Path(f"/sys/block/{Path(device).name}/size")
    for mib in (48, 24):
        rbd("resize", "--no-progress", "--allow-shrink", "--size", f"{mib}M", spec)
        wait_until(lambda mib=mib: int(sectors.read_text()) == mib * 2048, 15, f"{mib} MiB")
    with open(device, "r+b", buffering=0) as disk:
        assert os.pwrite(disk.fileno(), b"end".ljust(4096), (24 << 20) - 4096) == 4096
    succeed(rbdnbd("unmap", device))


def test_map_or_attach_maps_goes_on_after_a_kill_9_and_refuses_a_living_process(
    rbdnbd: Command, image: MakeImage
) -> None:
    spec = image("16M")
    device = succeed(rbdnbd("map", "--or-attach", spec))
    pid = process_of(rbdnbd, device)
    refused = rbdnbd("map", "--or-attach", spec)
    assert (refused.returncode, refused.stderr) == (
        1,
        f"rbdnbd: {spec} is mapped to {device} by process {pid}\n",
    )
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: succeed(rbdnbd("list-mapped")) == "", 20, "it is not listed any more")
    assert succeed(rbdnbd("map", "--or-attach", spec)) == device
    succeed(rbdnbd("unmap", device))


def test_a_device_that_was_resized_and_left_is_unmapped_at_once(
    rbdnbd: Command, image: MakeImage, rbd: Rbd
) -> None:
    """Seen to fail with a resize that left it to the next opener to look for partitions."""
    spec = image("16M")
    device = succeed(rbdnbd("map", spec, "--reattach-timeout", "300"))
    sectors = Path(f"/sys/block/{Path(device).name}/size")
    rbd("resize", "--no-progress", "--size", "24M", spec)
    wait_until(lambda: int(sectors.read_text()) == 24 * 2048, 15, "24 MiB")
    succeed(rbdnbd("detach", device))
    succeed(rbdnbd("unmap", device, timeout=60))
