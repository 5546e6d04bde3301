"""The image of rbdnbd itself (docker/Dockerfile) serves an RBD image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.cluster import Cluster
from testbed.engine import docker_engine, remove_container
from testbed.images import rbdnbd_image
from testbed.processes import output, silent
from testbed.slots import slot
from tests.support.waiting import wait_until


@pytest.mark.on_host
@pytest.mark.timeout(900)  # the image may have to be built first
def test_rbdnbd_in_a_container_serves_an_image_and_ends_in_order(
    cluster: Cluster, image: Callable[..., str], tmp_path: Path
) -> None:
    spec, socket = image("16M"), tmp_path / "nbd.sock"
    with docker_engine(silent), slot("rbdnbd") as number:
        name = f"rbdnbd-{number}"
        remove_container(name)
        volumes = [f"--volume={path}:{path}" for path in (cluster.conf.parent, tmp_path)]
        run = ["docker", "run", "--network=host", f"--name={name}", *volumes]
        served = [rbdnbd_image(silent), "serve", spec, "--socket", str(socket)]
        try:
            output(*run, "--detach", f"--env=CEPH_CONF={cluster.conf}", *served)
            wait_until(socket.exists, 30, f"rbdnbd listens at {socket}")
            assert size_at(socket) == 16 << 20
            output("docker", "stop", name)
            assert output("docker", "inspect", "--format={{.State.ExitCode}}", name) == "0\n"
        finally:
            remove_container(name)


def size_at(socket: Path) -> int:
    """Return the size of the default export of an NBD server."""
    return int(output("nbdinfo", "--size", f"nbd+unix:///?socket={socket}"))
