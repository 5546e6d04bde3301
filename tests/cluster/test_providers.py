"""The throw-away clusters themselves: both kinds work alike, and nothing is left of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rbdnbd.opening import open_image
from rbdnbd.spec import ClusterOptions, ImageSpec
from testbed.cluster import RECIPE, ContainerCluster, LocalCluster, ThrowAwayCluster
from testbed.engine import docker_engine
from testbed.processes import Unavailable, output, silent

pytestmark = pytest.mark.on_host

MIB = 1 << 20
# Starts a cluster, says where, and waits to be killed.
OWNER = """
import signal
from testbed.cluster import LocalCluster
with LocalCluster() as cluster:
    print(cluster.conf, flush=True)
    signal.pause()
"""


@pytest.fixture
def spec(provider: ThrowAwayCluster) -> Iterator[str]:
    provider.rbd("create", "--size", "16M", "rbd/provided")
    yield "rbd/provided"
    provider.rbd("rm", "--no-progress", "rbd/provided")


def test_what_librbd_writes_is_what_rbd_exports(
    provider: ThrowAwayCluster, spec: str, tmp_path: Path
) -> None:
    data = random.Random(2).randbytes(5 * MIB)
    options = ClusterOptions(conf=str(provider.conf))
    with open_image(ImageSpec.parse(spec), options, read_only=False, say=silent) as image:
        image.write(3 * MIB, data)
        assert image.read(3 * MIB, len(data)) == data
    provider.rbd("export", "--no-progress", spec, str(tmp_path / "exported"))
    assert (tmp_path / "exported").read_bytes() == bytes(3 * MIB) + data + bytes(8 * MIB)


def test_a_copy_of_its_ceph_conf_is_all_that_a_client_needs(
    provider: ThrowAwayCluster, tmp_path: Path
) -> None:
    copy = shutil.copy(provider.conf, tmp_path)
    assert output("rbd", "--conf", copy, "pool", "stats", "rbd")


def test_a_stopped_osd_comes_back_with_its_data(
    provider: ThrowAwayCluster, spec: str, tmp_path: Path
) -> None:
    (tmp_path / "data").write_bytes(random.Random(3).randbytes(MIB))
    provider.rbd("import", "--no-progress", str(tmp_path / "data"), "rbd/kept")
    provider.stop_osd()
    provider.start_osd()
    provider.rbd("export", "--no-progress", "rbd/kept", str(tmp_path / "kept"))
    provider.rbd("rm", "--no-progress", "rbd/kept")
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "data").read_bytes()


def test_bluestore_survives_the_kill_of_its_osd(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(random.Random(4).randbytes(MIB))
    with LocalCluster(store="bluestore") as cluster:
        cluster.rbd("import", "--no-progress", str(tmp_path / "data"), "rbd/kept")
        os.kill(int((cluster.conf.parent / "osd.0.pid").read_text()), signal.SIGKILL)
        cluster.stop_osd()
        cluster.start_osd()
        cluster.rbd("export", "--no-progress", "rbd/kept", str(tmp_path / "kept"))
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "data").read_bytes()


def test_two_clusters_live_side_by_side(provider: ThrowAwayCluster) -> None:
    with LocalCluster() as other:
        assert other.address != provider.address
        other.rbd("create", "--size", "1M", "rbd/other")
        assert "other" not in provider.rbd("ls")


def test_nothing_is_left_of_a_local_cluster() -> None:
    with LocalCluster() as cluster:
        directory = cluster.conf.parent
        assert len(daemons_of(directory)) == 2
    assert not left_of(directory)


@pytest.mark.timeout(900)  # the image may have to be built first
def test_nothing_is_left_of_a_cluster_in_a_container() -> None:
    with docker_engine(silent):
        before = output("docker", "ps", "--all", "--quiet")
        with ContainerCluster() as cluster:
            directory = cluster.conf.parent
        assert output("docker", "ps", "--all", "--quiet") == before
    assert not left_of(directory)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_cluster_of_a_process(stop: signal.Signals) -> None:
    with owner() as (process, directory):
        process.send_signal(stop)
        process.wait()
        assert not left_of(directory)


def test_what_a_killed_process_left_is_removed_by_the_next_one() -> None:
    with owner() as (process, directory):
        process.kill()
        process.wait()
        orphans = daemons_of(directory)
        assert len(orphans) == 2
    with LocalCluster() as cluster:
        assert cluster.conf.parent == directory
        assert not daemons_of(directory) & orphans
    assert not left_of(directory)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="ceph-mon, ceph-osd, ceph, rbd not found: install"):
        LocalCluster().__enter__()
    with pytest.raises(Unavailable, match="no docker command: install docker.io"):
        ContainerCluster().__enter__()


@pytest.mark.parametrize(
    ("address", "store", "sentence"),
    [
        ("127.88.0.1", "filestore", "no such STORE: filestore (memstore or bluestore)"),
        ("198.51.100.1", "memstore", "cannot listen at 198.51.100.1:3300: OSError: "),
    ],
)
def test_the_recipe_says_why_a_cluster_does_not_start(
    tmp_path: Path, address: str, store: str, sentence: str
) -> None:
    status, last_line = start_by_hand(tmp_path, address, store)
    assert status == 1
    assert last_line.startswith(f"one-node-ceph: {sentence}")


def test_the_recipe_names_the_daemon_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "ceph-osd"
    fake.write_text(f"""#!/bin/sh
case $* in *--mkfs*) exec {shutil.which("ceph-osd")} "$@";; esac; exit 3""")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, last_line = start_by_hand(tmp_path, "127.88.0.1")
    assert status == 1
    assert last_line.startswith("one-node-ceph: osd.0 ended with status 3; its last words are")


def start_by_hand(parent: Path, *arguments: str) -> tuple[int, str]:
    """Start a cluster that does not start; return the exit status and the last line of stderr."""
    command = [RECIPE, "start", parent / "ceph", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not daemons_of(parent / "ceph")
    return done.returncode, done.stderr.splitlines()[-1]


@contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Run a process that has a local cluster; yield it and the cluster's directory."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip()).parent
        finally:
            process.kill()


def daemons_of(directory: Path) -> set[int]:
    """Return the processes that still run with a cluster's ceph.conf."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"{directory}/ceph.conf" in command:
            found.add(int(entry.name))
    return found


def left_of(directory: Path) -> list[str]:
    """Say what is left of the cluster that was in a directory."""
    left = [f"process {pid}" for pid in daemons_of(directory)]
    left += [line for line in output("ip", "netns", "list").splitlines() if directory.name in line]
    return [*left, str(directory)] if directory.exists() else left
