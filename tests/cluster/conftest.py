"""A real Ceph cluster, and images on it.

`cluster` serves the whole run: a LocalCluster, or the cluster whose ceph.conf is named by
RBDNBD_TEST_CEPH_CONF (in the Debian 13 container, where a cluster cannot be started). `provider`
repeats a test on each kind of throw-away cluster. What is missing fails the tests that need it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rbdnbd.spec import ClusterOptions
from testbed import elsewhere
from testbed.cluster import Cluster, ContainerCluster, LocalCluster, ThrowAwayCluster
from testbed.places import CEPH_CONF
from testbed.processes import Unavailable
from tests.support import opening

IMAGE_BUILD_SECONDS = 900
ON_HOST = "on_host: starts clusters or containers, so it is not run inside of one"


class GivenCluster(Cluster):
    """A cluster that somebody else started and will stop."""

    def __init__(self, conf: Path) -> None:
        self.conf = conf


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", ON_HOST)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what starts clusters where a cluster is given because none can be started."""
    if CEPH_CONF in os.environ:
        left_out = [item for item in items if item.get_closest_marker("on_host")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@contextmanager
def running(cluster: ThrowAwayCluster) -> Iterator[ThrowAwayCluster]:
    """Run a cluster, or fail with the sentence that says what is missing."""
    with ExitStack() as stack:
        try:
            stack.enter_context(cluster)
        except Unavailable as error:
            pytest.fail(str(error), pytrace=False)
        yield cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster of this run."""
    if given := os.environ.get(CEPH_CONF):
        yield GivenCluster(Path(given))
        return
    with running(LocalCluster()) as cluster:
        yield cluster


# The first test with a container waits until its image has been built.
@pytest.fixture(
    scope="session",
    params=["local", pytest.param("container", marks=pytest.mark.timeout(IMAGE_BUILD_SECONDS))],
)
def provider(request: pytest.FixtureRequest) -> Iterator[ThrowAwayCluster]:
    """A throw-away cluster of each kind. For tests that are marked on_host."""
    kind = LocalCluster if request.param == "local" else ContainerCluster
    with running(kind(lambda line: elsewhere.say(request.session, line))) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def ceph_conf(cluster: Cluster) -> Path:
    """All that a client of the cluster needs."""
    return cluster.conf


@pytest.fixture(scope="session")
def options(ceph_conf: Path) -> ClusterOptions:
    """How the product reaches the cluster."""
    return ClusterOptions(conf=str(ceph_conf))


@pytest.fixture(scope="session")
def rbd(cluster: Cluster) -> Callable[..., str]:
    """Run Ceph's own rbd command on the cluster and return what it prints."""
    return cluster.rbd


@pytest.fixture(params=["bindings", "polled"])
def each_handle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open images by the bindings, and again for the event loop."""
    monkeypatch.setattr(opening, "polled", request.param == "polled")


@pytest.fixture
def image(cluster: Cluster) -> Iterator[Callable[..., str]]:
    """Make images with names of their own: `image("64M", "--object-size", "1M")`.

    Returns the spec, pool/name. They are removed after the test, with their snapshots, which
    fails while somebody still has one open.
    """
    made: list[str] = []

    def make(size: str = "64M", *options: str) -> str:
        spec = f"rbd/test-{uuid.uuid4().hex[:12]}"
        cluster.rbd("create", "--size", size, *options, spec)
        made.append(spec)
        return spec

    yield make
    for spec in made:
        cluster.rbd("snap", "purge", "--no-progress", spec)
        cluster.rbd("rm", "--no-progress", spec)
