"""One device over several sockets, each with a hardware queue, under IO that is checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.kernel.test_take_over import process_of, requests, succeed
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module", "second_processor")

MakeImage = Callable[..., str]
CPU = Path("/sys/devices/system/cpu")


@pytest.fixture
def second_processor() -> Iterator[None]:
    """Switch a second processor on, so that a second queue is used."""
    switch = CPU / "cpu1/online"
    before = switch.read_text()
    switch.write_text("1")
    yield
    switch.write_text(before)


@contextmanager
def verified_io(device: str) -> Iterator[None]:
    """Run fio with verification on each processor meanwhile; it must end without an error."""
    with subprocess.Popen(
        [
            *("fio", f"--filename={device}", "--direct=1", "--ioengine=libaio", "--rw=randrw"),
            *("--bs=4k", "--iodepth=8", "--size=8m", "--offset_increment=8m", "--verify=crc32c"),
            *("--verify_backlog=64", "--verify_fatal=1", "--verify_state_save=0", "--time_based"),
            *("--runtime=600", "--output-format=terse", "--cpus_allowed=0-1", "--thread"),
            *("--cpus_allowed_policy=split", "--numjobs=2", "--name=io"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as fio:
        try:
            goes_on(device)
            yield
            goes_on(device)
            fio.send_signal(signal.SIGINT)
            said, _ = fio.communicate(timeout=60)
        finally:
            fio.kill()
    errors = [line.split(";")[4] for line in said.splitlines() if line.count(";") > 100]
    assert errors == ["0", "0"], said


def goes_on(device: str) -> None:
    """Wait for IO on a device."""
    before = requests(device)
    wait_until(lambda: requests(device) > before + 50, 60, "IO goes on")


def set_timer(device: str) -> None:
    """Have the driver lose its patience after a second, not after 30."""
    (Path("/sys/block") / Path(device).name / "queue/io_timeout").write_text("1000")


@pytest.mark.parametrize("engine", ["threads", "events"])
def test_four_connections_outlive_a_kill_9_and_a_replacement_under_io(
    engine: str, rbdnbd: Command, image: MakeImage
) -> None:
    """Seen to fail with an attach that hands over one socket."""
    device = succeed(rbdnbd("map", image("64M"), "--connections", "4", "--io-engine", engine))
    disk = Path("/sys/block") / Path(device).name
    possible = int((CPU / "possible").read_text().rpartition("-")[2]) + 1
    assert len(list((disk / "mq").iterdir())) == min(4, possible)
    set_timer(device)
    with verified_io(device):
        os.kill(process_of(rbdnbd, device), signal.SIGKILL)
        before = reconnected(device)
        succeed(rbdnbd("attach", "--device", device))
        assert reconnected(device) - before >= 4
        assert (disk / "queue/io_timeout").read_text() == "30000\n"
        goes_on(device)
        (mapping,) = json.loads(succeed(rbdnbd("list-mapped", "--format", "json")))
        assert mapping["connections"] == 4
        succeed(rbdnbd("attach", "--replace", "--device", device))
    succeed(rbdnbd("unmap", device))


@pytest.mark.parametrize("engine", ["threads", "events"])
def test_a_cluster_that_hangs_costs_neither_the_device_nor_a_request(
    engine: str, rbdnbd: Command, image: MakeImage, ceph: Callable[..., str]
) -> None:
    """The driver hangs up on every connection, again and again, until the cluster is back.

    Seen to fail with `connections.attached(None)`: the mapping ends, and fio gets EIO.
    """
    device = succeed(rbdnbd("map", image("64M"), "--connections", "2", "--io-engine", engine))
    pid = process_of(rbdnbd, device)
    set_timer(device)
    with verified_io(device):
        ceph("osd", "set", "pause")
        before, dropped = requests(device), reconnected(device)
        try:
            wait_until(lambda: reconnected(device) > dropped + 3, 30, "what the kernel drops")
        finally:
            ceph("osd", "unset", "pause")
        goes_on(device)
        assert requests(device) > before
    assert process_of(rbdnbd, device) == pid
    succeed(rbdnbd("unmap", device))


def reconnected(device: str) -> int:
    """Return how often the kernel's log says that it was given another socket."""
    said = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    return said.count(f"{Path(device).name}: reconnected socket")
