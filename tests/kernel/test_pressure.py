"""A mapping while memory is short: what protects its process, and swap space on its device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]

IO_FLUSHER = 0x00080000 | 0x00100000  # PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE: linux/sched.h
CGROUPS = Path("/sys/fs/cgroup")
MIB = 1 << 20
HOG = """
import sys
page = {size} // 4096
memory = bytearray({size})
for turn in range(2):
    for number in range(page):
        memory[number * 4096] = (number + turn) % 251
assert all(memory[number * 4096] == (number + 1) % 251 for number in range(page))
print("every page is what was written")
"""


@pytest.fixture
def mapping(rbdnbd: Command, image: MakeImage) -> Iterator[Callable[..., tuple[str, int]]]:
    """Map an image of a size; returns its device and process, and is unmapped in the end."""
    devices = []

    def map_image(size: str, *options: str) -> tuple[str, int]:
        done = rbdnbd("map", image(size), *options)
        assert done.returncode == 0, done.stderr
        devices.append(done.stdout.strip())
        listed = json.loads(rbdnbd("list-mapped", "--format", "json").stdout)
        return devices[-1], next(each["id"] for each in listed if each["device"] == devices[-1])

    yield map_image
    for device in devices:
        done = rbdnbd("unmap", device)
        assert done.returncode == 0, done.stderr


def io_flusher(stat: str) -> bool:
    """Tell from a line of /proc/PID/stat, whose second field may hold blanks: see proc(5)."""
    return int(stat.rpartition(")")[2].split()[6]) & IO_FLUSHER == IO_FLUSHER


def kib(pid: int, what: str) -> int:
    """Return a size that /proc/PID/status tells."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{what}:\s*(\d+) kB$", status, re.MULTILINE)
    assert found, status
    return int(found[1])


@contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """Make a cgroup with a memory controller; what is left in it is put outside in the end."""
    (CGROUPS / "cgroup.subtree_control").write_text("+memory")
    path = CGROUPS / f"rbdnbd-test-{name}"
    path.mkdir()
    try:
        yield path
    finally:
        for pid in (path / "cgroup.procs").read_text().split():
            (CGROUPS / "cgroup.procs").write_text(pid)
        wait_until(lambda: "populated 0" in (path / "cgroup.events").read_text(), 10, "it is empty")
        path.rmdir()


@contextmanager
def inside(group: Path) -> Iterator[None]:
    """Be in a cgroup, so that whoever is started has its memory accounted there from the start."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (CGROUPS / "cgroup.procs").write_text(str(os.getpid()))


@contextmanager
def swap_space(device: str) -> Iterator[None]:
    """Use a device as swap space for the time of a `with`."""
    subprocess.run(["mkswap", device], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", device], check=True)
    try:
        yield
    finally:
        subprocess.run(["swapoff", device], check=True)


def test_every_thread_is_an_io_flusher_and_the_process_is_locked_and_spared(
    mapping: Callable[..., tuple[str, int]],
) -> None:
    _, pid = mapping("16M")
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    assert len(tasks) > 10
    assert all(io_flusher((task / "stat").read_text()) for task in tasks)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-1000\n"
    assert kib(pid, "VmLck") > 0


def test_the_quiesce_hook_is_neither_an_io_flusher_nor_spared(
    mapping: Callable[..., tuple[str, int]],
    rbdnbd: Command,
    rbd: Callable[..., str],
    tmp_path: Path,
) -> None:
    hook, said = tmp_path / "hook", tmp_path / "said"
    look = f"cat /proc/self/oom_score_adj /proc/self/stat >{said}"
    hook.write_text(f"#!/bin/sh\n[ $2 = unquiesce ] || {look}\n")
    hook.chmod(0o755)
    _, pid = mapping("16M", "--quiesce", "--quiesce-hook", str(hook))
    (listed,) = json.loads(rbdnbd("list-mapped", "--format", "json").stdout)
    rbd("snap", "create", "--no-progress", f"rbd/{listed['image']}@held")
    score, stat = said.read_text().splitlines()
    assert (score, io_flusher(stat)) == ("0", False)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-1000\n"
    assert all(io_flusher(each.read_text()) for each in Path(f"/proc/{pid}/task").glob("*/stat"))


def test_the_process_is_not_swapped_out_to_the_device_that_it_serves(
    mapping: Callable[..., tuple[str, int]],
) -> None:
    with cgroup("server") as group:
        with inside(group):
            device, pid = mapping("64M")
        with swap_space(device):
            with suppress(BlockingIOError):  # less can be reclaimed than that
                (group / "memory.reclaim").write_text("64M")
            assert kib(pid, "VmSwap") == 0


def test_a_process_that_needs_more_memory_than_it_may_have_goes_on_by_swapping_to_the_device(
    mapping: Callable[..., tuple[str, int]],
) -> None:
    with cgroup("server") as servers, cgroup("hog") as group:
        with inside(servers):
            device, _ = mapping("128M")
        # Not memory.max: swapping to an emulated device is so slow that the hog would be killed.
        (group / "memory.high").write_text(str(20 * MIB))
        with swap_space(device):  # the hog moves itself, or this process would be starved as well
            done = subprocess.run(
                ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(group)]
                + [sys.executable, "-c", HOG.format(size=32 * MIB)],
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
        assert (done.returncode, done.stdout) == (0, "every page is what was written\n")
    written = int(Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[6]) * 512
    assert written > 8 * MIB
