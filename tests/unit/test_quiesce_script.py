"""contrib/rbd-nbd_quiesce, with scripts in the place of the commands that it calls."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

HOOK = Path(__file__).resolve().parents[2] / "contrib/rbd-nbd_quiesce"


class Host:
    """A device with filesystems, of which some are frozen."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.device = directory / "nbd0"
        self.device.touch()
        self._calls = directory / "calls"
        self._calls.touch()
        self.has(lsblk=f"echo {self.device}", findmnt="exit 1", fsfreeze=f"echo $* >>{self._calls}")

    def has(self, **commands: str) -> None:
        """Make commands of the lines of shell scripts."""
        for name, lines in commands.items():
            path = self._directory / name
            path.write_text(f"#!/bin/sh\n{lines}\n")
            path.chmod(0o755)

    def mounts(self, **points: str) -> None:
        """Have partitions and the device mounted: p1="/mnt/a"; p0 stands for the device."""
        names = {f"{self.device}{name}".removesuffix("p0"): at for name, at in points.items()}
        cases = "".join(f"*' {name}') echo '{at}' ;;\n" for name, at in names.items())
        self.has(
            lsblk="".join(f"echo {name}\n" for name in names),
            findmnt=f'case "$*" in\n{cases}*) exit 1 ;;\nesac',
        )

    def run(self, *arguments: str) -> int:
        path = f"{self._directory}:{os.environ['PATH']}"
        argv = [str(HOOK), *arguments]
        return subprocess.run(argv, env={**os.environ, "PATH": path}, check=False).returncode

    def frozen(self) -> list[str]:
        """What fsfreeze was told."""
        return self._calls.read_text().splitlines()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_what_is_mounted_is_frozen_and_let_go(host: Host) -> None:
    host.mounts(p0="/mnt/my data")
    assert host.run(str(host.device), "quiesce") == 0
    assert host.run(str(host.device), "unquiesce") == 0
    assert host.frozen() == ["--freeze /mnt/my data", "--unfreeze /mnt/my data"]


def test_every_partition_is_frozen(host: Host) -> None:
    host.mounts(p1="/mnt/a", p2="/mnt/b")
    assert host.run(str(host.device), "quiesce") == 0
    assert host.frozen() == ["--freeze /mnt/a", "--freeze /mnt/b"]


def test_a_device_without_a_filesystem_is_written_out(host: Host, tmp_path: Path) -> None:
    host.has(sync=f'echo "$*" >{tmp_path}/synced')
    assert host.run(str(host.device), "quiesce") == 0
    assert (tmp_path / "synced").read_text() == f"{host.device}\n"
    assert host.frozen() == []


def test_when_one_cannot_be_frozen_the_others_are_let_go(host: Host, tmp_path: Path) -> None:
    host.mounts(p1="/mnt/a", p2="/mnt/b")
    host.has(fsfreeze=f'echo "$*" >>{tmp_path}/calls; [ "$*" != "--freeze /mnt/b" ]')
    assert host.run(str(host.device), "quiesce") == errno.EIO
    assert host.frozen() == ["--freeze /mnt/a", "--freeze /mnt/b", "--unfreeze /mnt/a"]


def test_to_unquiesce_what_is_not_frozen_is_no_error(host: Host) -> None:
    host.mounts(p0="/mnt/a")
    host.has(fsfreeze="exit 1")
    assert host.run(str(host.device), "unquiesce") == 0


def test_a_device_that_is_missing_makes_the_snapshot_fail(host: Host) -> None:
    assert host.run(f"{host.device}-gone", "quiesce") == errno.EIO


@pytest.mark.parametrize("arguments", [[], ["/dev/nbd0"], ["/dev/nbd0", "freeze"]])
def test_what_it_does_not_understand_is_einval(host: Host, arguments: list[str]) -> None:
    assert host.run(*arguments) == errno.EINVAL
