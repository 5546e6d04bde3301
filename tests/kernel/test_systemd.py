"""The unit rbdnbd@.service under a real systemd: crash, upgrade, stop and shutdown."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.kernel.test_take_over import requests, succeed, verified_io
from tests.support.host_services import CGROUP, Systemd, install, systemd, udevd
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]

# Of linux/capability.h: DAC_READ_SEARCH, IPC_LOCK, SYS_ADMIN, SYS_RESOURCE
CAPABILITIES = 1 << 2 | 1 << 14 | 1 << 21 | 1 << 24
DEFAULTS = Path("/etc/default/rbdnbd")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our files for udev and systemd, installed."""
    prefix = tmp_path_factory.mktemp("prefix")
    install(prefix)
    return prefix


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    """Where the units' processes log to."""
    return tmp_path / "log"


@pytest.fixture
def machine(prefix: Path, tmp_path: Path, log_file: Path, ceph_conf: Path) -> Iterator[Systemd]:
    """A systemd with our unit, whose defaults name the cluster."""
    unit = prefix / "lib/systemd/system/rbdnbd@.service"
    before = DEFAULTS.read_bytes() if DEFAULTS.exists() else None
    DEFAULTS.write_text(f"CEPH_CONF={ceph_conf}\nRBDNBD_OPTIONS=--log-file {log_file}\n")
    try:
        with systemd(tmp_path / "units", [unit]) as machine:
            yield machine
    finally:
        DEFAULTS.unlink()
        if before is not None:
            DEFAULTS.write_bytes(before)


@pytest.fixture
def unit(machine: Systemd, image: MakeImage) -> Iterator[str]:
    """A unit that has mapped an image; stopped in the end."""
    unit = unit_of(image("64M"))
    machine.ctl("start", unit)
    yield unit
    machine.ctl("stop", unit)


def unit_of(spec: str) -> str:
    escaped = subprocess.run(["systemd-escape", spec], capture_output=True, text=True, check=True)
    return f"rbdnbd@{escaped.stdout.strip()}.service"


def only_device(rbdnbd: Command) -> str:
    """Return the one device that is mapped."""
    (entry,) = json.loads(succeed(rbdnbd("list-mapped", "--format", "json")))
    return str(entry["device"])


def server() -> int:
    """Return the process that serves, as it is called outside of systemd's namespaces."""
    (found,) = (
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"rbdnbd\0map\0--foreground" in path.read_bytes()
    )
    return found


def test_the_unit_maps_with_the_capabilities_that_it_names_and_nothing_is_refused(
    unit: str, machine: Systemd, log_file: Path
) -> None:
    assert machine.show(unit, "ActiveState") == "active"
    status = Path(f"/proc/{server()}/status").read_text()
    for kind in ("CapEff", "CapBnd"):
        found = re.search(rf"^{kind}:\s*(\w+)$", status, re.MULTILINE)
        assert found
        assert int(found[1], 16) == CAPABILITIES
    assert not re.search("WARNING|ERROR", log_file.read_text())


def test_the_unit_opens_no_disk_and_gains_no_privilege(
    unit: str, machine: Systemd, tmp_path: Path
) -> None:
    """Seen to fail without DevicePolicy, and without SystemCallFilter."""
    disk = tmp_path / "disk"
    os.mknod(disk, 0o600 | stat.S_IFBLK, os.makedev(7, 0))  # a loop device, perhaps unbound
    status = Path(f"/proc/{server()}/status").read_text()
    assert re.search(r"^NoNewPrivs:\s*1$", status, re.MULTILINE)
    calls = machine.show(unit, "SystemCallFilter").split()
    assert "ioctl" in calls
    assert "kexec_load" not in calls
    group = CGROUP / machine.show(unit, "ControlGroup").lstrip("/")
    enter = 'echo $$ >"$0/cgroup.procs" && exec dd of=/dev/null count=1 "if=$1"'
    argv = ["sh", "-c", enter, group, disk]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert f"failed to open '{disk}': Operation not permitted" in done.stderr


def test_after_kill_9_the_unit_goes_on_with_the_same_device_and_io_without_an_error(
    unit: str, machine: Systemd, rbdnbd: Command
) -> None:
    device = only_device(rbdnbd)
    with verified_io(device, 30):
        first = server()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: machine.show(unit, "NRestarts") == "1", 30, "systemd starts it again")
        wait_until(lambda: machine.show(unit, "ActiveState") == "active", 60, "it is ready")
        assert only_device(rbdnbd) == device
        before = requests(device)
        wait_until(lambda: requests(device) > before + 50, 30, "IO goes on")


def test_a_restart_keeps_the_device_and_io_goes_on_without_an_error(
    unit: str, machine: Systemd, rbdnbd: Command
) -> None:
    device = only_device(rbdnbd)
    with verified_io(device, 25):
        first = server()
        machine.ctl("restart", unit)
        assert only_device(rbdnbd) == device
        assert server() != first


def test_a_stop_unmaps(machine: Systemd, image: MakeImage, rbdnbd: Command) -> None:
    unit = unit_of(image("16M"))
    machine.ctl("start", unit)
    device = only_device(rbdnbd)
    machine.ctl("stop", unit)
    assert machine.show(unit, "Result") == "success"
    assert not Path(f"/sys/block/{Path(device).name}/pid").exists()


def test_a_stop_under_a_mounted_filesystem_leaves_the_device_to_the_next_start(
    unit: str, machine: Systemd, rbdnbd: Command, tmp_path: Path
) -> None:
    device, mnt = only_device(rbdnbd), tmp_path / "mnt"
    mnt.mkdir()
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    subprocess.run(["mount", device, mnt], check=True)
    (mnt / "before").write_text("written before")
    machine.ctl("stop", unit)
    assert machine.show(unit, "Result") == "exit-code"
    assert succeed(rbdnbd("list-mapped")) == ""
    machine.ctl("start", unit)
    assert only_device(rbdnbd) == device
    (mnt / "after").write_text("written after")
    os.sync()
    subprocess.run(["umount", mnt], check=True)


def test_a_mount_that_requires_the_unit_pulls_it_in_and_is_unmounted_before_it_at_shutdown(
    machine: Systemd, prefix: Path, image: MakeImage, rbdnbd: Command, tmp_path: Path
) -> None:
    spec, mnt = image("64M"), tmp_path / "mnt"
    unit = unit_of(spec)
    mnt.mkdir()
    device = succeed(rbdnbd("map", spec))
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    succeed(rbdnbd("unmap", device))
    name = mount_unit(machine, mnt, spec, unit)
    with udevd(prefix):
        machine.ctl("daemon-reload")
        machine.ctl("start", name)
        assert machine.show(unit, "ActiveState") == "active"
        assert machine.inside("sh", "-c", f"echo kept >{mnt}/file").returncode == 0
        device = only_device(rbdnbd)
        machine.ctl("--no-block", "poweroff")
        wait_until(lambda: not Path(f"/proc/{machine.pid}").exists(), 90, "it is off")
        assert not Path(f"/sys/block/{Path(device).name}/pid").exists()
    device = succeed(rbdnbd("map", spec))
    checked = subprocess.run(["e2fsck", "-n", device], capture_output=True, text=True, check=False)
    shown = subprocess.run(["debugfs", "-R", "cat file", device], capture_output=True, text=True)
    succeed(rbdnbd("unmap", device))
    assert "clean" in checked.stdout
    assert shown.stdout == "kept\n"


def mount_unit(machine: Systemd, mnt: Path, spec: str, unit: str) -> str:
    """Write the mount unit that systemd makes of a line in fstab; return its name."""
    escape = ["systemd-escape", "--path", "--suffix=mount", str(mnt)]
    name = subprocess.run(escape, capture_output=True, text=True, check=True).stdout.strip()
    (machine.units / name).write_text(
        f"[Unit]\nRequires={unit}\nAfter={unit} remote-fs-pre.target\n"
        f"[Mount]\nWhat=/dev/rbd-nbd/{spec}\nWhere={mnt}\nType=ext4\nOptions=_netdev\n"
    )
    return name
