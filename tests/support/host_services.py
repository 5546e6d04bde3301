"""udev and systemd for tests: a real systemd-udevd, a real systemd, and our files for both.

systemd is process 1 of a pid, a mount and a cgroup namespace of its own, and knows no units but
those that a test gives it, so it may run beside a host's own one. udevd, of which a network
namespace can have but one, is the host's where it runs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
CGROUP = Path("/sys/fs/cgroup/rbdnbd-test-systemd")
UDEV_CONTROL = Path("/run/udev/control")
TARGETS = ("sysinit", "basic", "network-online", "remote-fs-pre", "multi-user")
STOCK = (
    *("modprobe@.service", "shutdown.target", "umount.target", "final.target"),
    *("poweroff.target", "systemd-poweroff.service"),
)
START_SECONDS = 60
NAMESPACES = ("unshare", "--pid", "--mount", "--cgroup", "--fork", "--kill-child", "--mount-proc")
BOOT = """
umount /sys/fs/cgroup
mount -t cgroup2 cgroup /sys/fs/cgroup &&
mount -t tmpfs systemd /run/systemd &&
exec env -i container=rbdnbd PATH="$PATH" SYSTEMD_UNIT_PATH="$0" SYSTEMD_LOG_TARGET=console \
    /lib/systemd/systemd --system --unit=multi-user.target
"""


def install(prefix: Path) -> Path:
    """Install udev's rule and systemd's unit below a prefix, for the rbdnbd of these sources."""
    command = prefix / "bin/rbdnbd"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m rbdnbd "$@"\n')
    command.chmod(0o755)
    script = ROOT / "contrib/install-host-files.sh"
    subprocess.run([script, "install", prefix], check=True, stdout=subprocess.DEVNULL)
    return command


@contextmanager
def udevd(prefix: Path) -> Iterator[None]:
    """Have a udevd that knows the rule that was installed below a prefix."""
    rule = Path("/run/udev/rules.d/59-rbdnbd.rules")
    rule.parent.mkdir(parents=True, exist_ok=True)
    rule.write_bytes((prefix / "lib/udev/rules.d" / rule.name).read_bytes())
    ours = None if UDEV_CONTROL.exists() else subprocess.Popen(["/lib/systemd/systemd-udevd"])
    try:
        wait_until(UDEV_CONTROL.exists, START_SECONDS, "udevd runs")
        subprocess.run(["udevadm", "control", "--reload"], check=True)
        yield
    finally:
        rule.unlink()
        if ours:
            ours.terminate()
            ours.wait()
            UDEV_CONTROL.unlink(missing_ok=True)
        else:
            subprocess.run(["udevadm", "control", "--reload"], check=True)


@dataclass(frozen=True, slots=True)
class Systemd:
    """A systemd that runs; `pid` is its own, `units` the directory of all its units."""

    pid: int
    units: Path

    def inside(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command in systemd's namespaces."""
        enter = ("nsenter", f"--target={self.pid}", "--pid", "--mount", "--cgroup")
        return subprocess.run([*enter, *argv], capture_output=True, text=True, check=False)

    def ctl(self, *words: str) -> str:
        """Run systemctl, which has to succeed, and return what it prints."""
        done = self.inside("systemctl", *words)
        assert done.returncode == 0, f"systemctl {' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.ctl("show", "--value", f"--property={name}", unit)


@contextmanager
def systemd(units: Path, ours: Sequence[Path]) -> Iterator[Systemd]:
    """Boot a systemd that knows the units in the files `ours`, and little else."""
    units.mkdir()
    for name in TARGETS:
        (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    for path in (*(Path("/lib/systemd/system", name) for name in STOCK), *ours):
        (units / path.name).write_bytes(path.read_bytes())
    Path("/run/systemd").mkdir(exist_ok=True)
    CGROUP.mkdir()
    enter = f'echo $$ >{CGROUP}/cgroup.procs; exec "$@"'
    boot = subprocess.Popen(
        ["sh", "-c", enter, "sh", *NAMESPACES, "sh", "-c", BOOT, str(units)],
        stdin=subprocess.DEVNULL,
    )
    try:
        children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children")
        pid = int(wait_until(children.read_text, START_SECONDS, "process 1").split()[0])
        machine = Systemd(pid, units)
        state = ("systemctl", "is-system-running")
        wait_until(
            lambda: machine.inside(*state).stdout == "running\n",
            START_SECONDS,
            "systemd has booted",
        )
        yield machine
    finally:
        boot.kill()
        boot.wait()
        _remove(CGROUP)


def _remove(cgroup: Path) -> None:
    """Remove a cgroup and those below it, when the last process has gone."""

    def empty() -> bool:
        return "populated 0" in (cgroup / "cgroup.events").read_text()

    wait_until(empty, START_SECONDS, "systemd and all that it has started are gone")
    below = sorted(cgroup.glob("**/"), key=lambda path: len(path.parts), reverse=True)
    for path in below:
        with suppress(FileNotFoundError):
            path.rmdir()
