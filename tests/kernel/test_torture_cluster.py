"""The cluster goes away, or throws us out, under a mapping: commands answer, the device is freed.

The cluster is shared and its daemons are out of reach, so they are told to pause. After every test
no flag may be left, and nobody may be blocklisted but single clients.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.usefixtures("nbd_module"), pytest.mark.torture]

AT_ONCE = 20.0
"""Seconds, of an emulated processor, for a command that has 5 s or less to wait."""
HANGS = 2.5

MakeImage = Callable[..., str]
Ceph = Callable[..., str]


@pytest.fixture
def ceph(ceph: Ceph) -> Iterator[Ceph]:
    """Run Ceph's own command; at the end the cluster has to be as it was."""
    yield ceph
    dump = json.loads(ceph("osd", "dump", "--format", "json"))
    if "pause" in dump["flags"]:
        ceph("osd", "unpause")
    assert "pause" not in dump["flags"]
    assert not [each for each in dump["blocklist"] if each.endswith(":0/0")]


@pytest.fixture
def pause(ceph: Ceph) -> Iterator[Callable[[], None]]:
    """Have the cluster serve nobody until the end of the test."""
    yield lambda: void(ceph("osd", "pause"))
    ceph("osd", "unpause")


def void(_: object) -> None:
    """Drop a result that nobody asked for."""


@pytest.fixture
def let_in_again(ceph: Ceph) -> Iterator[list[str]]:
    """Addresses of clients that are off the blocklist in the end."""
    addresses: list[str] = []
    yield addresses
    for each in addresses:
        ceph("osd", "blocklist", "rm", each)


def mapped(rbdnbd: Command, spec: str, *options: str) -> str:
    """Map an image; return its device."""
    done = rbdnbd("map", spec, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dd(*words: str) -> subprocess.Popen[bytes]:
    """Start dd, in silence."""
    return subprocess.Popen(["dd", "bs=4k", *words], stderr=subprocess.DEVNULL)


def oldest(rbdnbd: Command, device: str) -> float:
    """Return for how many seconds a request of a device is being waited for."""
    (each,) = [
        it
        for it in json.loads(rbdnbd("stats", "--format", "json").stdout)
        if it["device"] == device
    ]
    return max((request["seconds"] for request in each["in_flight"]), default=0.0)


@pytest.mark.parametrize("engine", ["threads", "events"])
def test_while_the_cluster_is_away_commands_answer_and_force_frees_the_device(
    engine: str,
    rbdnbd: Command,
    image: MakeImage,
    evict: Callable[[str], None],
    pause: Callable[[], None],
    ceph: Ceph,
) -> None:
    spec = image("16M")
    device = mapped(rbdnbd, spec, "--io-engine", engine)
    (document,) = json.loads(rbdnbd("list-mapped", "--format", "json").stdout)
    pause()
    with dd("if=/dev/zero", f"of={device}", "count=1", "oflag=direct") as writer:
        wait_until(lambda: oldest(rbdnbd, device) > HANGS, 30, "a write waits")
        began = time.monotonic()
        assert json.loads(rbdnbd("list-mapped", "--format", "json").stdout)[0]["device"] == device
        done = rbdnbd("unmap", "--force", device)
        assert (done.returncode, time.monotonic() - began < AT_ONCE) == (0, True), done.stderr
        assert "cannot flush and close" in done.stderr
        assert writer.wait(20) != 0
    assert not Path(f"/proc/{document['id']}").exists()
    assert not Path(f"/sys/block/{Path(device).name}/pid").exists()
    ceph("osd", "unpause")
    evict(spec)


def test_io_waits_for_a_cluster_that_is_away_and_goes_on(
    rbdnbd: Command, image: MakeImage, pause: Callable[[], None], ceph: Ceph, tmp_path: Path
) -> None:
    noise, back = tmp_path / "noise", tmp_path / "back"
    noise.write_bytes(os.urandom(256 << 10))
    device = mapped(rbdnbd, image("16M"))
    pause()
    with dd(f"if={noise}", f"of={device}", "oflag=direct") as writer:
        wait_until(lambda: oldest(rbdnbd, device) > HANGS, 30, "a write waits")
        ceph("osd", "unpause")
        assert writer.wait(60) == 0
    assert dd(f"if={device}", f"of={back}", "iflag=direct", "count=64").wait(60) == 0
    assert back.read_bytes() == noise.read_bytes()
    assert rbdnbd("unmap", device).returncode == 0


def test_a_mapping_whose_client_was_blocklisted_gives_errors_and_is_unmapped(
    rbdnbd: Command,
    image: MakeImage,
    rbd: Callable[..., str],
    ceph: Ceph,
    let_in_again: list[str],
    tmp_path: Path,
) -> None:
    """Seen to fail with an `unmap` that does not ask whether the client was blocklisted."""
    spec, log = image("16M"), tmp_path / "log"
    device = mapped(rbdnbd, spec, "--log-file", str(log))
    assert dd("if=/dev/zero", f"of={device}", "count=1", "oflag=direct").wait(60) == 0
    (watcher,) = json.loads(rbd("status", "--format", "json", spec))["watchers"]
    let_in_again.append(watcher["address"])
    ceph("osd", "blocklist", "add", watcher["address"], "120")
    read = (f"if={device}", "of=/dev/null", "count=8", "iflag=direct")
    wait_until(lambda: dd(*read).wait(60), 30, "reads fail")
    assert dd("if=/dev/zero", f"of={device}", "count=1", "oflag=direct").wait(60) != 0
    done = rbdnbd("unmap", device)
    assert (done.returncode, "what is not written yet is lost" in done.stderr) == (0, True)
    assert len([line for line in log.read_text().splitlines() if "fail from now on" in line]) == 1


def test_a_mapping_whose_image_was_removed_ends_and_frees_its_device(
    rbdnbd: Command, image: MakeImage, rbd: Callable[..., str], tmp_path: Path
) -> None:
    spec, log, before = f"{image('8M')}-removed", tmp_path / "log", recorded()
    rbd("create", "--size", "8M", spec)
    device = mapped(rbdnbd, spec, "--read-only", "--log-file", str(log))
    (document,) = json.loads(rbdnbd("list-mapped", "--format", "json").stdout)
    rbd("rm", "--no-progress", spec)
    process = Path(f"/proc/{document['id']}")
    wait_until(lambda: not process.exists(), 30, "the process ends")
    assert not Path(f"/sys/block/{Path(device).name}/pid").exists()
    assert json.loads(rbdnbd("list-mapped", "--format", "json").stdout) == []
    assert recorded() <= before
    assert "is gone: the image was removed" in log.read_text()


def recorded() -> set[Path]:
    """Return the records that there are, perhaps of processes that other tests have killed."""
    return set(Path("/run/rbdnbd").glob("*.json"))
