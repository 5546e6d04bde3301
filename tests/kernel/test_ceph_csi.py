"""ceph-csi's calls in its order, and a restart of all that its node plugin consists of.

The plugin is a container: its rbd-nbd processes live in its pid and mount namespaces, and die with
it all at once. What the kernel has stays, and what is mounted from it; a new container attaches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.kernel.test_map import run
from tests.kernel.test_take_over import requests
from tests.support.rbd_nbd import OURS, Run, printed, refused, runner
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]

OPTIONS = ("--try-netlink", "--reattach-timeout=300", "--io-timeout=0", "--cookie=csi-vol-1")


class Plugin:
    """A container of the plugin: what is `run` in it ends when it does."""

    def __init__(self, init: int, login: tuple[str, ...]) -> None:
        self.login = login
        enter = ["nsenter", f"--target={init}", "--mount", "--pid", *OURS]
        self.run: Run = runner(enter)

    def mapped(self) -> list[dict[str, str]]:
        """Return what ceph-csi reads of list-mapped."""
        found = json.loads(printed(self.run("list-mapped", "--format=json")))
        return [{key: each[key] for key in ("pool", "image", "device", "cookie")} for each in found]


@contextmanager
def plugin(login: tuple[str, ...], *, keeps_run: bool) -> Iterator[Plugin]:
    """Run a plugin; its end is the sudden one of its first process."""
    own_run = "true" if keeps_run else "mount -t tmpfs tmpfs /run/rbdnbd"
    process = subprocess.Popen(
        [
            *("unshare", "--pid", "--mount", "--fork", "--mount-proc", "--propagation=slave"),
            *("sh", "-ec", f"mkdir -m 700 -p /run/rbdnbd; {own_run}; echo; read end"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        init = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        try:
            yield Plugin(init, login)
        finally:
            os.kill(init, signal.SIGKILL)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "rbd-nbd.log"


@pytest.fixture
def login(ceph_conf: Path, tmp_path: Path, log: Path) -> tuple[str, ...]:
    """All that ceph-csi says of the cluster: there is no ceph.conf in its container."""
    conf, key = ConfigParser(), tmp_path / "keyfile"
    conf.read(ceph_conf)
    key.write_text(conf["client.admin"]["key"])
    monitors = ("-m", conf["global"]["mon_host"])
    return ("--id", "admin", *monitors, f"--keyfile={key}", "--log-file", str(log))


class Writer:
    """fio with verification, again and again in a directory, until it is told to stop."""

    def __init__(self, directory: Path, device: str, scratch: Path) -> None:
        self._device, self._stop, self._said = device, scratch / "stop", scratch / "fio"
        fio = (
            f"fio --name=io --directory={directory} --rw=randrw --bs=4k --size=4m --direct=1"
            " --ioengine=libaio --iodepth=4 --fsync=16 --verify=crc32c --verify_backlog=64"
            " --verify_fatal=1 --verify_state_save=0"
        )
        script = f"until [ -e {self._stop} ]; do {fio} || exit 1; done"
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(["sh", "-c", script], stdout=said, stderr=said)

    def goes_on(self) -> None:
        """Wait until more requests have been answered."""
        before = requests(self._device)
        wait_until(
            lambda: requests(self._device) > before + 50 or self._process.poll() is not None,
            60,
            f"IO goes on: {self._said.read_text()}",
        )
        assert self._process.poll() is None, self._said.read_text()

    def stop(self) -> None:
        """Let fio come to its end, which must be a good one."""
        self._stop.touch()
        assert self._process.wait(120) == 0, self._said.read_text()


@pytest.mark.parametrize("keeps_run", [True, False], ids=["with-its-run", "without-its-run"])
def test_a_volume_in_use_outlives_a_restart_of_everything(
    keeps_run: bool,
    login: tuple[str, ...],
    log: Path,
    image: MakeImage,
    tmp_path: Path,
) -> None:
    spec = image("64M")
    pool, name = spec.split("/")
    run("mount", "--make-rshared", "/")  # as every systemd does: an unmount is seen everywhere
    with ExitStack() as stack:
        with plugin(login, keeps_run=keeps_run) as first:
            assert "--cookie" in printed(first.run("--help"))
            assert first.mapped() == []
            device = printed(first.run(*login, "map", spec, *OPTIONS)).strip()
            listed = {"pool": pool, "image": name, "device": device, "cookie": "csi-vol-1"}
            assert first.mapped() == [listed]
            run("mkfs.ext4", "-q", device)
            (tmp_path / "mnt").mkdir()
            run("mount", device, str(tmp_path / "mnt"))
            writer = Writer(tmp_path / "mnt", device, tmp_path)
            writer.goes_on()
        second = stack.enter_context(plugin(login, keeps_run=keeps_run))
        assert second.mapped() == []
        attach = ("attach", spec, "--device", device, *OPTIONS)
        assert printed(second.run(*login, *attach)) == f"{device}\n"
        assert second.mapped() == [listed]
        writer.goes_on()
        writer.stop()
        run("umount", str(tmp_path / "mnt"))
        run("e2fsck", "-fn", device)
        printed(second.run(*login, "unmap", spec))
        assert log.stat().st_size > 0
        assert not open_files() & {str(log)}
        assert second.run(*login, "unmap", spec) == refused(f"{spec} is not mapped")


def open_files() -> set[str]:
    """Return what the processes of this host have open."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            found.add(os.readlink(descriptor))
    return found
