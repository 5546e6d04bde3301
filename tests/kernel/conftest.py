"""What tests of /dev/nbdN share: the driver, a cluster's images, the product's command.

They run as root on a kernel with nbd, in the VM or on a host that has it. After every test nothing
may be mapped and no rbdnbd may run; what a test left behind is named, then removed, so that it
fails one test and not all that follow.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from rbdnbd.errors import RbdnbdError
from rbdnbd.kernel import NbdDriver
from testbed import places
from tests.support.rbd_nbd import OURS, STOCK, Run, runner
from tests.support.waiting import wait_until

DEVICES = 16
CLEAN_UP_SECONDS = 10

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def ceph_conf() -> Iterator[Path]:
    """The ceph.conf of the cluster that was given, or of one that is started for this run."""
    with places.ceph_conf(print) as conf:
        yield conf


@pytest.fixture(scope="session")
def nbd_module() -> None:
    """Load the driver with sixteen devices."""
    subprocess.run(["modprobe", "nbd", f"nbds_max={DEVICES}"], check=True)
    nodes = [Path(f"/dev/nbd{index}") for index in range(DEVICES)]
    wait_until(lambda: all(map(Path.exists, nodes)), 10, f"/dev/nbd0 to /dev/nbd{DEVICES - 1}")


@pytest.fixture(scope="session")
def rbd(ceph_conf: Path) -> Callable[..., str]:
    """Run Ceph's own rbd command on the cluster and return what it prints."""
    return partial(_printed, "rbd", ceph_conf)


@pytest.fixture
def ceph(ceph_conf: Path) -> Callable[..., str]:
    """Run Ceph's own ceph command on the cluster and return what it prints."""
    return partial(_printed, "ceph", ceph_conf)


def _printed(program: str, conf: Path, *arguments: str) -> str:
    argv = [program, "--conf", str(conf), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{program} {' '.join(arguments)}: {done.stderr}"
    return done.stdout


@pytest.fixture
def image(rbd: Callable[..., str]) -> Iterator[Callable[..., str]]:
    """Make images with names of their own, `image("64M", "--object-size", "1M")`.

    Returns the spec, pool/name. They are removed after the test, with their snapshots.
    """
    made: list[str] = []

    def make(size: str = "64M", *options: str) -> str:
        spec = f"rbd/test-{os.urandom(6).hex()}"
        rbd("create", "--size", size, *options, spec)
        made.append(spec)
        return spec

    yield make
    for spec in made:
        try:
            rbd("rm", "--no-progress", spec)
        except AssertionError:  # few have snapshots, and here every command takes seconds
            rbd("snap", "purge", "--no-progress", spec)
            rbd("rm", "--no-progress", spec)


@pytest.fixture
def evict(ceph: Callable[..., str], rbd: Callable[..., str]) -> Callable[[str], None]:
    """Blocklist the watchers of an image, whose processes were killed, so that it can be removed.

    They would go by themselves after 30 seconds.
    """

    def evict(spec: str) -> None:
        for watcher in json.loads(rbd("status", "--format", "json", spec))["watchers"]:
            ceph("osd", "blocklist", "add", watcher["address"])
        status = ("status", "--format", "json", spec)
        wait_until(lambda: not json.loads(rbd(*status))["watchers"], 40, "the watchers are gone")

    return evict


@pytest.fixture
def rbdnbd(ceph_conf: Path) -> Command:
    """Run the product's command as a user would, with the cluster as Ceph's default.

    Returns status, stdout and stderr, whatever the status is.
    """

    def run(
        *arguments: str, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rbdnbd", *arguments],
            env={**os.environ, "CEPH_CONF": str(ceph_conf), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def ours(ceph_conf: Path) -> Run:
    """Run our rbd-nbd: `ours("map", spec)`."""
    return runner(OURS, CEPH_CONF=str(ceph_conf))


@pytest.fixture
def stock(ceph_conf: Path) -> Run:
    """Run Ceph's rbd-nbd of this host."""
    return runner(STOCK, CEPH_CONF=str(ceph_conf))


@pytest.fixture
def beside_ours(ceph_conf: Path, tmp_path: Path) -> Run:
    """Run Ceph's rbd with our rbd-nbd beside it, where it looks for its own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    shutil.copy("/usr/bin/rbd", programs)
    (programs / "rbd-nbd").symlink_to(*OURS)
    return runner([str(programs / "rbd")], CEPH_CONF=str(ceph_conf))


@pytest.fixture(autouse=True)
def nothing_left_behind(image: Callable[..., str]) -> Iterator[None]:
    """Fail the test after which a device is in use, or a process of rbdnbd or any rbd-nbd runs.

    It asks for `image` so that it looks before the images are removed, and after all else.
    """
    yield
    left = [*_rbdnbd_processes(), *_devices_in_use()]
    if left:
        _clean_up()
    assert not left, f"left behind by this test: {', '.join(left)}"


# Devices that no clean-up could free; the test that left them has failed for it.
_GIVEN_UP: set[str] = set()


def _devices_in_use() -> list[str]:
    found = (f"/dev/{pid.parent.name}" for pid in sorted(Path("/sys/block").glob("nbd*/pid")))
    return [device for device in found if device not in _GIVEN_UP]


_NAMES = {"rbdnbd", "rbdnbd.drop_in", "rbd-nbd"}


def _rbdnbd_processes() -> dict[str, int]:
    """Return the running commands of rbdnbd and of any rbd-nbd, each by what describes it."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            with suppress(FileNotFoundError, ProcessLookupError):
                argv = (entry / "cmdline").read_bytes().decode().split("\0")
                if _NAMES & {*argv[1:], Path(argv[0]).name}:
                    found[f"process {entry.name} ({' '.join(argv).strip()})"] = int(entry.name)
    return found


def _clean_up() -> None:
    """Kill, unmount, disconnect; a device that somebody still has open cannot be freed."""
    for process in _rbdnbd_processes().values():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for device in _devices_in_use():
        for mount in Path("/proc/self/mounts").read_text().splitlines():
            source, target, *_ = mount.split(" ")
            if re.fullmatch(f"{device}(p[0-9]+)?", source):
                subprocess.run(["umount", "--lazy", target], check=True)
        with suppress(RbdnbdError, OSError):  # to open it could wait for a server
            NbdDriver().disconnect(int(device.removeprefix("/dev/nbd")))
    with suppress(AssertionError):
        wait_until(lambda: not _devices_in_use(), CLEAN_UP_SECONDS, "every device is free again")
    _GIVEN_UP.update(_devices_in_use())
