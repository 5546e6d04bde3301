"""The places where tests run that this host cannot run itself.

`KernelVM` is this host's files under a kernel that has nbd. `Debian13` is the newest Ceph and
Python in a container. Both take the cluster's ceph.conf through RBDNBD_TEST_CEPH_CONF.
"""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from testbed.cluster import LocalCluster
from testbed.debian13 import run_in_container
from testbed.elsewhere import Ended, PlaceLost, Say
from testbed.engine import docker_engine
from testbed.images import debian13_root
from testbed.kernel import debian_kernel
from testbed.processes import Unavailable
from testbed.qemu import accelerator
from testbed.vm import VM, VMLost

ROOT = Path(__file__).resolve().parent.parent
CEPH_CONF = "RBDNBD_TEST_CEPH_CONF"
TORTURE = "RBDNBD_TORTURE"
DEBIAN13_ROOT = "RBDNBD_TEST_DEBIAN13_ROOT"
DEBIAN13_TESTS = "test_debian13"  # how the names of files begin whose tests need that root
PRINTED_LINES = 30
SHORT_SECONDS = 300  # generous, because an emulated processor is ten times slower
WHOLE_SECONDS = 2400  # for a test of faults that tries as often as `make torture` wants


def test_seconds() -> int:
    """Return how many seconds a test may take: more, where the whole of a fault is wanted."""
    return WHOLE_SECONDS if TORTURE in os.environ else SHORT_SECONDS


def host_has_nbd() -> bool:
    """Say whether tests of /dev/nbdN can run here: as root, on a kernel with the nbd driver."""
    if os.geteuid() != 0:
        return False
    if Path("/dev/nbd0").exists():
        return True
    try:
        return not subprocess.run(["modprobe", "nbd"], capture_output=True, check=False).returncode
    except FileNotFoundError:
        return False


@contextmanager
def ceph_conf(say: Say) -> Iterator[Path]:
    """Give the ceph.conf of the cluster that RBDNBD_TEST_CEPH_CONF names, or of a throw-away one.

    Raises PlaceLost when there is no cluster to be had.
    """
    if given := os.environ.get(CEPH_CONF):
        yield Path(given)
        return
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(LocalCluster(say))
        except Unavailable as error:
            raise PlaceLost(f"the Ceph cluster did not start: {error}") from error
        yield cluster.conf


def debian13(say: Say) -> Path:
    """Return the root of Debian 13 that RBDNBD_TEST_DEBIAN13_ROOT names, or make one."""
    if given := os.environ.get(DEBIAN13_ROOT):
        return Path(given)
    with docker_engine(say):
        return debian13_root(say)


@dataclass(frozen=True, slots=True)
class KernelVM:
    """A VM with Debian's kernel on this host's files.

    A test may take `test_seconds`, all of them together `limit`. Plugins that the kernel tests do
    not need are left out: importing them takes seconds.
    """

    directory: Path
    ceph_conf: Path
    name: ClassVar[str] = "vm"
    test_seconds: int = field(default_factory=lambda: test_seconds())
    limit: float = field(default_factory=lambda: 8.0 * test_seconds())

    @property
    def patience(self) -> float:
        """Pytest's own time limit comes first, unless the test hangs in the kernel."""
        return self.test_seconds + 30.0

    def run(self, arguments: Sequence[str], say: Say, stop: threading.Event) -> Ended:
        """Boot and run pytest; PlaceLost when the VM was lost or there is none to boot."""
        console, log = self.directory / "console.log", self.directory / "pytest.log"
        for package in ("rbdnbd", "testbed"):  # here it is quick
            compileall.compile_dir(ROOT / package, quiet=2)
        pytest = (sys.executable, "-m", "pytest", "-p", "pytest_timeout")
        vm = VM(console=console, shares=[self.directory], limit=self.limit)
        try:
            env = self._environment(arguments, say)
            say("looking for Debian's kernel")
            kernel = debian_kernel()
            say(f"booting Linux {kernel.release} ({accelerator(kernel)})")
            with log.open("wb", buffering=0) as printed:
                outcome = vm.run(
                    [*pytest, f"--timeout={self.test_seconds}", *arguments],
                    cwd=ROOT,
                    env=env,
                    output=lambda data: void(printed.write(data)),
                    stop=stop,
                )
        except (VMLost, Unavailable) as error:
            raise PlaceLost(f"{error}\n{_tail(log)}") from error
        complaints = [f"the VM's kernel said: {line}" for line in outcome.trouble]
        return Ended(outcome.status, _tail(log), complaints)

    def _environment(self, arguments: Sequence[str], say: Say) -> dict[str, str]:
        """Return what tests in the VM are told; a Debian 13 is made only for those that want it."""
        env = {
            **{name: os.environ[name] for name in (TORTURE,) if name in os.environ},
            CEPH_CONF: str(self.ceph_conf),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if any(Path(argument).name.startswith(DEBIAN13_TESTS) for argument in arguments):
            env[DEBIAN13_ROOT] = str(debian13(say))
        return env


@dataclass(frozen=True, slots=True)
class Debian13:
    """A Debian 13 container with the host's sources, Ceph 18.2 and Python 3.13."""

    directory: Path
    ceph_conf: Path
    name: ClassVar[str] = "debian13"
    patience: float = 900.0  # the container's image may have to be built first

    def run(self, arguments: Sequence[str], say: Say, stop: threading.Event) -> Ended:
        """Run pytest in the container; PlaceLost when there is none."""
        log = self.directory / "pytest.log"
        try:
            status = run_in_container(
                ["python3", "-m", "pytest", *arguments],
                mounts=[self.directory, self.ceph_conf.parent],
                env={CEPH_CONF: str(self.ceph_conf)},
                log=log,
                say=say,
                stop=stop,
            )
        except Unavailable as error:
            raise PlaceLost(f"{error}\n{_tail(log)}") from error
        return Ended(status, _tail(log))


def void(_: object) -> None:
    """Drop a result that nobody asked for."""


def _tail(log: Path) -> str:
    """Return the last of what pytest printed there, with a heading."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(("pytest printed last:", *lines[-PRINTED_LINES:])) if lines else ""
