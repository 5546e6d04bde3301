"""Whatever happens to the process of a mapping, no write that was answered is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from rbdnbd.control import mappings
from rbdnbd.spec import ClusterOptions
from tests.kernel.conftest import Command
from tests.kernel.test_map import mounted, run
from tests.kernel.test_take_over import succeed
from tests.support.answered import Blocks, Files, Writers, in_directory, in_file, missing
from tests.support.opening import opened
from tests.support.torture import Torture
from tests.support.tracer import attach_and_detach
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.usefixtures("nbd_module"), pytest.mark.torture]

Rbd = Callable[..., str]
MakeImage = Callable[..., str]

ENGINES = ("threads", "events")
EMULATED = "QEMU TCG" in Path("/proc/cpuinfo").read_text()
GOES_ON_SECONDS = 20 if EMULATED else 2
"""From the start of the command `attach` until writes are answered again."""
PATIENCE = 60


@pytest.fixture
def spec(image: MakeImage) -> str:
    """An image of 48 MiB."""
    return image("48M")


@pytest.fixture
def map_image(rbdnbd: Command, spec: str) -> Iterator[Callable[..., str]]:
    """Map the image with options; unmapped in the end whoever serves it then, if it is mapped."""
    devices = []

    def map_it(*options: str) -> str:
        devices.append(succeed(rbdnbd("map", spec, "--reattach-timeout", "120", *options)))
        return devices[-1]

    yield map_it
    for device in devices:
        if held(device):
            succeed(rbdnbd("unmap", device))


def process_of(device: str) -> int:
    """Return the process that serves a device, without the seconds that a command takes here."""
    (found,) = (each for each in mappings() if each["device"] == device)
    return int(found["id"])


def held(device: str) -> bool:
    """Tell whether the kernel has a device connected, or waiting for a successor."""
    return Path(f"/sys/block/{Path(device).name}/pid").exists()


def gone(pid: int) -> bool:
    """Tell whether a process has ended."""
    return not Path(f"/proc/{pid}").exists()


def left_on(spec: str, rbd: Rbd) -> list[object]:
    """Return the watchers and locks of an image."""
    watchers = json.loads(rbd("status", "--format", "json", spec))["watchers"]
    return [*watchers, *json.loads(rbd("lock", "ls", "--format", "json", spec))]


def stored(spec: str, rbd: Rbd, to: Path) -> Path:
    """Return a file with what the cluster has of an image or a snapshot, read without a device."""
    to.unlink(missing_ok=True)
    rbd("export", "--no-progress", spec, str(to))
    return to


def test_kill_9_at_random_moments_loses_no_answered_write_and_the_device_goes_on(
    torture: Torture,
    map_image: Callable[..., str],
    spec: str,
    rbdnbd: Command,
    rbd: Rbd,
    tmp_path: Path,
) -> None:
    """Each successor has the other engine."""
    device = map_image()
    run("mkfs.ext4", "-q", device)
    with mounted(device, tmp_path / "mnt") as mnt:
        run("fallocate", "--length", "1M", str(mnt / "pages"))
        with Writers(partial(Blocks, str(mnt / "pages"))) as writers:
            for number, random in torture.rounds(short=2, whole=50):
                writers.go_on(random.randrange(1, 300), PATIENCE)
                os.kill(process_of(device), signal.SIGKILL)
                begun = time.monotonic()
                engine = ("--io-engine", ENGINES[1 - number % 2])
                succeed(rbdnbd("attach", spec, "--device", device, *engine))
                writers.go_on(1, GOES_ON_SECONDS - (time.monotonic() - begun))
        writers.all_is_well()
    image = stored(spec, rbd, tmp_path / "image")
    run("e2fsck", "-fn", str(image))
    run("debugfs", "-R", f"dump pages {tmp_path / 'pages'}", str(image))
    assert missing(writers.answered, in_file(tmp_path / "pages")) == []


def test_sigterm_leaves_every_answered_write_neither_lock_nor_watcher_and_a_device_that_waits(
    torture: Torture,
    map_image: Callable[..., str],
    spec: str,
    rbdnbd: Command,
    rbd: Rbd,
    tmp_path: Path,
) -> None:
    """What the cluster has then is read by Ceph's own command."""
    device = map_image()
    with Writers(partial(Blocks, device)) as writers:
        for _, random in torture.rounds(short=1, whole=15):
            writers.go_on(random.randrange(1, 300), PATIENCE)
            pid = process_of(device)
            os.kill(pid, signal.SIGTERM)
            wait_until(partial(gone, pid), PATIENCE, "the process is gone")
            assert held(device)
            assert left_on(spec, rbd) == []
            read = in_file(stored(spec, rbd, tmp_path / "image"))
            assert missing(writers.answered, read) == []
            succeed(rbdnbd("attach", "--device", device))
            writers.go_on(100, PATIENCE)
    writers.all_is_well()


def released_with_all_answered_writes(
    device: str, pid: int, writers: Writers, spec: str, rbd: Rbd, to: Path
) -> None:
    """Wait for the end of a device, which its writers see, and look for what they were answered."""
    wait_until(lambda: gone(pid), PATIENCE, "the process is gone")
    wait_until(lambda: not held(device), PATIENCE, "the device is free")
    wait_until(writers.ended, PATIENCE, "every writer has its error")
    assert len(writers.errors) == 4
    assert writers.losses == []
    assert left_on(spec, rbd) == []
    assert missing(writers.answered, in_file(stored(spec, rbd, to))) == []


def stop_and_continue(pid: int) -> None:
    """What Ctrl-Z and fg do to a process."""
    os.kill(pid, signal.SIGSTOP)
    stat = Path(f"/proc/{pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 10, "it is stopped")
    os.kill(pid, signal.SIGCONT)


def terminate(pid: int) -> None:
    """Ask a process to end."""
    os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("happens", [terminate, stop_and_continue, attach_and_detach])
def test_a_device_attached_by_ioctl_is_released_with_every_answered_write_by(
    happens: Callable[[int], None],
    torture: Torture,
    map_image: Callable[..., str],
    spec: str,
    rbd: Rbd,
    tmp_path: Path,
) -> None:
    """The writers see errors, and nothing that was answered is missing."""
    for _, random in torture.rounds(short=1, whole=10):
        device = map_image("--ioctl")
        with Writers(partial(Blocks, device)) as writers:
            writers.go_on(random.randrange(1, 300), PATIENCE)
            pid = process_of(device)
            happens(pid)
            released_with_all_answered_writes(device, pid, writers, spec, rbd, tmp_path / "image")


def test_io_goes_on_through_stop_and_continue_and_through_a_debugger(
    torture: Torture, map_image: Callable[..., str], spec: str, rbd: Rbd, tmp_path: Path
) -> None:
    device = map_image()
    with Writers(partial(Blocks, device)) as writers:
        for _, random in torture.rounds(short=2, whole=50):
            for happens in (stop_and_continue, attach_and_detach):
                writers.go_on(random.randrange(1, 200), PATIENCE)
                happens(process_of(device))
        writers.go_on(100, PATIENCE)
    writers.all_is_well()
    assert missing(writers.answered, in_file(stored(spec, rbd, tmp_path / "image"))) == []


def test_every_crash_snapshot_mounts_and_holds_all_that_was_fsynced_before_it(
    torture: Torture,
    map_image: Callable[..., str],
    spec: str,
    rbd: Rbd,
    ceph_conf: Path,
    tmp_path: Path,
) -> None:
    """What a snapshot holds is what a power cut would leave."""
    run("modprobe", "loop")
    device = map_image()
    run("mkfs.ext4", "-q", device)
    with (
        mounted(device, tmp_path / "mnt") as mnt,
        opened(spec, ClusterOptions(conf=str(ceph_conf))) as second,
        Writers(partial(Files, mnt), pages=8) as writers,
    ):
        for number, random in torture.rounds(short=2, whole=50):
            writers.go_on(random.randrange(20, 120), PATIENCE)
            fsynced = dict(writers.answered)
            second.handle.create_snap(str(number))  # rbd's own command would take seconds here
            image = stored(f"{spec}@{number}", rbd, tmp_path / "image")
            with mounted(str(image), tmp_path / "then", "-o", "loop") as then:
                assert missing(fsynced, in_directory(then)) == []
            run("e2fsck", "-fn", str(image))
        writers.stop()
    writers.all_is_well()
