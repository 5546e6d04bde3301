"""A throw-away Ceph cluster with one interface and two providers, both after one recipe.

`LocalCluster` runs the daemons of this host's packages in a network namespace of their own, at
198.18.N.2 on a veth pair: host, containers and a VM with QEMU's user network all reach them at
the one address that the daemons advertise. (198.18.0.0/15 is set aside for tests, RFC 2544.)
`ContainerCluster` runs docker/ceph.Dockerfile at its address on the engine's bridge, which the
same three reach. A cluster lives as long as its `with`; SIGTERM ends that as Ctrl-C does, and
what a killed process leaves behind is removed by the next one (`testbed.slots`).
"""

from __future__ import annotations

import os
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from testbed.engine import docker_engine, remove_container
from testbed.images import ceph_image
from testbed.processes import Unavailable, end, narrate, output, sigterm_interrupts, silent
from testbed.slots import slot

RECIPE = Path(__file__).resolve().parent.parent / "docker" / "one-node-ceph.sh"
BASE_DIRECTORY = Path("/var/tmp")  # on the host's root file system, which a VM sees
LOCAL_COMMANDS = ("ip", "nsenter", "ceph-mon", "ceph-osd", "ceph", "rbd")
KILL_SECONDS = 30.0
START_SECONDS = 90
READY = "one-node-ceph: ready"


class Cluster:
    """A Ceph cluster with a pool "rbd". `conf` is all that a client of it needs."""

    conf: Path

    def environment(self) -> dict[str, str]:
        """Return this process's environment with `conf` as every Ceph client's default."""
        ours = {name: value for name, value in os.environ.items() if name != "CEPH_ARGS"}
        return ours | {"CEPH_CONF": str(self.conf)}

    def rbd(self, *arguments: str) -> str:
        """Run Ceph's own rbd command on the cluster and return what it prints."""
        return output("rbd", "--conf", str(self.conf), *arguments)


class ThrowAwayCluster(Cluster, ABC):
    """A cluster with one monitor and one OSD, which lives as long as a `with`.

    `address` is the monitor's and the OSD's. `conf` may be copied anywhere, and its directory can
    be given to a VM or a container. `say` hears a line for each step. Raises Unavailable.
    """

    address: str

    def __init__(self, say: Callable[[str], None] = silent, store: str = "memstore") -> None:
        self._say, self._store = say, store
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(sigterm_interrupts())
            self._start(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    def stop_osd(self) -> None:
        """End the OSD in an orderly way: requests wait from now on, data stays."""
        self._recipe("stop-osd")

    def start_osd(self) -> None:
        """Start the OSD again and return when it serves the pool."""
        self._recipe("start-osd")

    def stop_monitor(self) -> None:
        """Kill the monitor: who is connected to the OSD goes on."""
        self._recipe("stop-mon")

    def start_monitor(self) -> None:
        """Start the monitor again and return when it answers."""
        self._recipe("start-mon")

    @abstractmethod
    def _start(self, undo: ExitStack) -> None:
        """Start the daemons and set `conf` and `address`; leave what undoes it in `undo`."""

    @abstractmethod
    def _recipe(self, action: str, *arguments: str) -> None:
        """Run the recipe where the daemons are."""


class LocalCluster(ThrowAwayCluster):
    """The daemons of this host's packages in a network namespace. Needs root."""

    def _start(self, undo: ExitStack) -> None:
        if os.geteuid() != 0:
            raise Unavailable("a local Ceph cluster needs root, for a network namespace")
        if missing := [name for name in LOCAL_COMMANDS if shutil.which(name) is None]:
            raise Unavailable(
                f"{', '.join(missing)} not found: install ceph-mon, ceph-osd, ceph-common and"
                " iproute2 for a local Ceph cluster"
            )
        number = undo.enter_context(slot("local-ceph"))
        self._namespace = f"rbdnbd-ceph-{number}"
        self._link = f"rbdnbd-ceph{number}"
        self._directory = BASE_DIRECTORY / self._namespace
        self.conf = self._directory / "ceph.conf"
        self.address = f"198.18.{number}.2"
        self._remove()
        undo.callback(self._remove)
        self._connect(f"198.18.{number}.1")
        self._recipe("start", self.address, self._store)

    def _connect(self, near_end: str) -> None:
        name, link = self._namespace, self._link
        output("ip", "netns", "add", name)
        output("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        output("ip", "address", "add", f"{near_end}/30", "dev", link)
        output("ip", "link", "set", link, "up")
        output("ip", "-n", name, "address", "add", f"{self.address}/30", "dev", "eth0")
        output("ip", "-n", name, "link", "set", "eth0", "up")
        output("ip", "-n", name, "link", "set", "lo", "up")

    def _recipe(self, action: str, *arguments: str) -> None:
        recipe = [str(RECIPE), action, str(self._directory), *arguments]
        narrate(["nsenter", f"--net=/run/netns/{self._namespace}", *recipe], self._say)

    def _remove(self) -> None:
        """Remove all that carries our number, whoever made it."""
        if Path("/run/netns", self._namespace).exists():
            for pid in output("ip", "netns", "pids", self._namespace).split():
                end(int(pid), signal.SIGKILL, KILL_SECONDS)
            # The far end goes with the near one at once, with the namespace only some time later.
            if Path("/sys/class/net", self._link).exists():
                output("ip", "link", "delete", self._link)
            output("ip", "netns", "delete", self._namespace)
        remove_directory(self._directory)


class ContainerCluster(ThrowAwayCluster):
    """The daemons in a container, of the Docker engine that `testbed.engine` finds or starts."""

    def _start(self, undo: ExitStack) -> None:
        # Imported here because a local cluster does without.
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy

        undo.enter_context(docker_engine(self._say))
        image = ceph_image(self._say)
        number = undo.enter_context(slot("container-ceph"))
        name = f"rbdnbd-ceph-{number}"
        directory = BASE_DIRECTORY / f"rbdnbd-ceph-container-{number}"
        remove_directory(directory)
        undo.callback(remove_directory, directory)
        directory.mkdir(mode=0o700)
        remove_container(name)
        # The reaper would be one more image to pull, and the slot does its work.
        testcontainers_config.ryuk_disabled = True
        ready = LogMessageWaitStrategy(READY).with_startup_timeout(START_SECONDS)
        container = DockerContainer(image, name=name, command=self._store).waiting_for(ready)
        self._container = undo.enter_context(container)
        self._say(f"a Ceph cluster runs in the container {name}")
        client = container.get_docker_client()
        self.address = client.bridge_ip(container.get_container_id())
        self.conf = directory / "ceph.conf"
        self.conf.write_bytes(self._run("cat", "/ceph/ceph.conf"))

    def _recipe(self, action: str, *arguments: str) -> None:
        for line in self._run(RECIPE.name, action, "/ceph", *arguments).decode().splitlines():
            self._say(line)

    def _run(self, *command: str) -> bytes:
        result = self._container.exec(list(command))
        if result.exit_code:
            raise Unavailable(f"failed in the container: {' '.join(command)}\n{result.output!r}")
        return bytes(result.output)


def remove_directory(directory: Path) -> None:
    """Remove a directory and all in it, if it is there."""
    with suppress(FileNotFoundError):
        shutil.rmtree(directory)
