"""rbd-nbd replaced by ours, on a real kernel: the calls of `rbd device` and of ceph-csi."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

OURS = Path(sys.executable).with_name("rbd-nbd")


@pytest.fixture
def run(ceph_conf: Path, tmp_path: Path) -> Iterator[Run]:
    """Run a command with `rbd` and our `rbd-nbd` side by side, where `rbd` looks for it.

    `rbd` runs the program beside itself whose name is its own with -nbd behind it.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "rbd").write_bytes(Path("/usr/bin/rbd").read_bytes())
    (programs / "rbd").chmod(0o755)
    (programs / "rbd-nbd").symlink_to(OURS)
    environment = {
        **os.environ,
        "CEPH_CONF": str(ceph_conf),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    yield run


def printed(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command that has to succeed silently on stderr printed."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_rbd_device_maps_lists_and_unmaps(run: Run, image: MakeImage) -> None:
    spec = image("16M")
    device = printed(run("rbd", "device", "map", "-t", "nbd", spec)).strip()
    assert device.startswith("/dev/nbd")
    (listed,) = json.loads(printed(run("rbd", "device", "list", "-t", "nbd", "--format", "json")))
    assert (listed["device"], listed["image"]) == (device, spec.removeprefix("rbd/"))
    printed(run("rbd", "device", "unmap", "-t", "nbd", device))
    assert printed(run("rbd", "device", "list", "-t", "nbd")) == ""


def test_rbd_device_detaches_and_attaches(run: Run, image: MakeImage) -> None:
    spec = image("16M")
    line = printed(run("rbd", "device", "map", "-t", "nbd", "--show-cookie", spec))
    device, cookie = line.split()
    printed(run("rbd", "device", "detach", "-t", "nbd", device))
    assert printed(run("rbd", "device", "list", "-t", "nbd")) == ""
    options = ("--device", device, "--cookie", cookie)
    assert printed(run("rbd", "device", "attach", "-t", "nbd", *options, spec)).strip() == device
    printed(run("rbd", "device", "unmap", "-t", "nbd", spec))


def test_the_calls_of_ceph_csi_in_their_order(run: Run, image: MakeImage, tmp_path: Path) -> None:
    spec, log = image("16M"), tmp_path / "log"
    assert "--cookie" in printed(run("rbd-nbd", "--help"))
    common = ("--log-file", str(log))
    options = ("--try-netlink", "--reattach-timeout=300", "--io-timeout=0", "--cookie=vol-1")
    device = printed(run("rbd-nbd", *common, "map", spec, *options)).strip()
    (listed,) = json.loads(printed(run("rbd-nbd", "list-mapped", "--format=json")))
    pool, name = spec.split("/")
    assert listed == {
        "id": listed["id"],
        "pool": pool,
        "namespace": "",
        "image": name,
        "snap": "",
        "device": device,
        "cookie": "vol-1",
    }
    assert Path(f"/proc/{listed['id']}/comm").read_text() == "rbd-nbd\n"
    os.kill(listed["id"], 9)
    attached = run("rbd-nbd", *common, "attach", spec, "--device", device, *options)
    assert printed(attached).strip() == device
    printed(run("rbd-nbd", "unmap", spec))
    again = run("rbd-nbd", "unmap", spec)
    assert (again.returncode, again.stderr) == (1, f"rbd-nbd: {spec} is not mapped\n")


def test_without_trim_the_device_has_no_discard(run: Run, image: MakeImage) -> None:
    device = printed(run("rbd-nbd", "map", image("16M"), "--notrim")).strip()
    assert Path(f"/sys/block/{Path(device).name}/queue/discard_max_bytes").read_text() == "0\n"
    printed(run("rbd-nbd", "unmap", device))
