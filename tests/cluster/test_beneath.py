"""What others do to an image while it is served: errors where data is gone, never wrong data.

All of it leaves a shared cluster as it was: single clients are blocklisted, never their host.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rbdnbd.engines import engine
from rbdnbd.opening import open_image
from rbdnbd.spec import ClusterOptions, ImageSpec
from rbdnbd.wire import Export, transmission_flags
from testbed.cluster import Cluster
from testbed.processes import output
from tests.support.client import EIO, READ, TRIM, WRITE, WRITE_ZEROES, RawClient
from tests.support.gateway import Gateway, gateway
from tests.support.opening import opened, refusal
from tests.support.serving import Pair
from tests.support.waiting import wait_until

LOCKABLE = ("--image-feature", "layering,exclusive-lock")
UNLOCKABLE = ("--image-feature", "layering")
MIB = 1 << 20
SECONDS = 15
BLOCKLISTED = "this client was blocklisted, or its lock broken"

Rbd = Callable[..., str]
MakeImage = Callable[..., str]
Serve = Callable[..., AbstractContextManager[Gateway]]


@pytest.fixture(params=["threads", "events"])
def serve(request: pytest.FixtureRequest, ceph_conf: Path, tmp_path: Path) -> Serve:
    """Serve an image with each engine: `serve(spec, "--exclusive")`."""

    def serve(spec: str, *options: str) -> AbstractContextManager[Gateway]:
        engine = ("--io-engine", request.param)
        return gateway(ceph_conf, spec, tmp_path / "gateway", *engine, *options)

    return serve


@pytest.fixture
def ceph(cluster: Cluster) -> Callable[..., str]:
    """Run Ceph's own command on the cluster and return what it prints."""
    return lambda *words: output("ceph", "--conf", str(cluster.conf), *words)


@pytest.fixture
def address(rbd: Rbd, ceph: Callable[..., str]) -> Iterator[Callable[[str], str]]:
    """Return the address of the only client of an image, which is let in again at the end."""
    found: list[str] = []

    def address(spec: str) -> str:
        (watcher,) = json.loads(rbd("status", "--format", "json", spec))["watchers"]
        found.append(watcher["address"])
        return found[-1]

    yield address
    for each in found:
        ceph("osd", "blocklist", "rm", each)
    left = json.loads(ceph("osd", "dump", "--format", "json"))["blocklist"]
    assert not [each for each in left if each.endswith(":0/0")], "a whole host is blocklisted"


def fails_everything(client: RawClient) -> None:
    """Hold that every kind of request fails from some moment on."""
    wait_until(lambda: client.call(READ, 0, 4096)[0], SECONDS, "reads fail")
    for command in (READ, TRIM, WRITE_ZEROES) * 5:
        assert client.call(command, 0, 65536)[0] == EIO
    assert client.call(WRITE, 0, payload=b"x" * 4096)[0] == EIO


def says_so_once_and_ends(served: Gateway, status: int) -> None:
    """Hold that there is one line for all requests, and that SIGTERM ends the process."""
    (line,) = served.said("fail from now on")
    assert BLOCKLISTED in line
    assert not served.said(" of 65536 bytes at ")
    served.process.send_signal(signal.SIGTERM)
    assert served.ended() == status


@pytest.mark.parametrize(
    ("features", "status"), [(LOCKABLE, 1), (UNLOCKABLE, 0)], ids=["lock", "no-lock"]
)
def test_a_client_that_was_blocklisted_fails_every_request_and_ends_when_told(
    features: tuple[str, str],
    status: int,
    serve: Serve,
    image: MakeImage,
    ceph: Callable[..., str],
    address: Callable[[str], str],
) -> None:
    """With a lock the last flush fails too; without one, nothing that was answered needs it.

    Seen to fail with an `is_news` that is always true, a line for each request, and with
    connections that do not share one, a line for each client.
    """
    spec = image("16M", *features)
    with serve(spec) as served:
        served.client.write(0, b"x" * 4096)
        ceph("osd", "blocklist", "add", address(spec), "120")
        fails_everything(served.client)
        with served.another() as second:
            fails_everything(second)
        says_so_once_and_ends(served, status)


@pytest.fixture
def break_lock(rbd: Rbd, address: Callable[[str], str]) -> Callable[[str], None]:
    """Take the lock of an image from its only client, as an administrator does."""

    def break_lock(spec: str) -> None:
        address(spec)
        (lock,) = json.loads(rbd("lock", "ls", "--format", "json", spec))
        rbd("lock", "rm", spec, lock["id"], lock["locker"])

    return break_lock


def test_a_client_whose_lock_was_broken_fails_every_request_and_ends_when_told(
    serve: Serve, image: MakeImage, break_lock: Callable[[str], None]
) -> None:
    """Seen to fail with ESHUTDOWN left out of `_LASTING`."""
    spec = image("16M", *LOCKABLE)
    with serve(spec) as served:
        served.client.write(0, b"x" * 4096)
        break_lock(spec)
        fails_everything(served.client)
        says_so_once_and_ends(served, 1)


@contextmanager
def keeping_the_lock(engine_name: str, spec: str, options: ClusterOptions) -> Iterator[RawClient]:
    """Serve an image as a mapping with --exclusive does, in this process."""
    ours, theirs = socket.socketpair()
    opening_image = open_image(
        ImageSpec.parse(spec),
        replace(options, settings=(("rbd_cache", "false"),)),
        read_only=False,
        say=lambda doing: None,
        exclusive=True,
        polled=engine_name == "events",
    )
    with opening_image as image, engine(image, None) as connect, RawClient(theirs) as client:
        pair = Pair(
            connect(ours, Export(spec, image.size(), transmission_flags(read_only=False))), client
        )
        try:
            yield client
        finally:
            pair.connection.stop()
            pair.ended()


@pytest.mark.parametrize("engine_name", ["threads", "events"])
def test_an_exclusive_client_whose_lock_was_broken_fails_every_request(
    engine_name: str,
    image: MakeImage,
    options: ClusterOptions,
    break_lock: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen to fail with ESHUTDOWN left out of `_LASTING`."""
    spec = image("16M", *LOCKABLE)
    with keeping_the_lock(engine_name, spec, options) as client:
        client.write(0, b"x" * 4096)
        break_lock(spec)
        fails_everything(client)
        (line,) = caplog.messages
        assert BLOCKLISTED in line


def test_while_another_client_keeps_the_lock_writes_fail_and_then_go_on(
    serve: Serve, image: MakeImage, options: ClusterOptions
) -> None:
    """Seen to fail with EROFS left out of `_LASTING`: a line for each write."""
    spec = image("16M", *LOCKABLE)
    with serve(spec) as served:
        served.client.write(0, b"ours" * 1024)
        with opened(spec, options, exclusive=True) as other:
            other.write(0, b"his!" * 1024)
            for _ in range(3):
                assert served.client.call(WRITE, 0, payload=b"lost" * 1024)[0] != 0
            assert served.client.read(0, 4096) == b"his!" * 1024
            assert len(served.said("another client keeps the lock")) == 1
        served.client.write(0, b"ours" * 1024)
        assert served.client.read(0, 4096) == b"ours" * 1024


@pytest.mark.parametrize("engine_name", ["threads", "events"])
def test_nobody_takes_the_lock_of_a_client_that_keeps_it(
    engine_name: str, image: MakeImage, options: ClusterOptions
) -> None:
    """Seen to fail with an `open_image` that does not lock."""
    spec = image("16M", *LOCKABLE)
    with keeping_the_lock(engine_name, spec, options) as client:
        assert "another client keeps it" in refusal(spec, options, exclusive=True)
        client.write(0, b"ours" * 1024)


def is_gone(served: Gateway, why: str) -> None:
    """Hold that the server ends, with one line that says why."""
    assert served.ended() == 1
    assert len(served.said(f"is gone: {why}")) == 1
    assert not served.address.exists()
    served.client.take_all()  # perhaps a reply, then the end


def test_an_image_that_was_removed_under_readers_is_not_read_as_zeroes(
    serve: Serve, image: MakeImage, rbd: Rbd, options: ClusterOptions
) -> None:
    """Seen to fail with a `header._size` that takes ObjectNotFound for any other error."""
    spec = f"{image('8M')}-removed"
    rbd("create", "--size", "16M", spec)
    with serve(spec, "--read-only") as served:
        rbd("rm", "--no-progress", spec)
        is_gone(served, "the image was removed")


def test_an_image_that_was_removed_under_a_writer_fails_what_hangs(
    serve: Serve, image: MakeImage, rbd: Rbd, cluster: Cluster
) -> None:
    """Seen to fail with a `leave_if_gone` that does nothing: librbd's close never ends."""
    spec = f"{image('8M')}-removed"
    rbd("create", "--size", "16M", spec)
    image_id = json.loads(rbd("info", "--format", "json", spec))["id"]
    with serve(spec) as served:
        served.client.write(0, b"x" * 4096)
        header = ("rm", f"rbd_header.{image_id}")
        output("rados", "--conf", str(cluster.conf), "--pool", "rbd", *header)
        served.client.request(WRITE, 0, payload=b"y" * 4096)
        is_gone(served, "the image was removed")
    rbd("rm", "--no-progress", spec)


def test_an_image_that_is_written_cannot_be_removed(
    serve: Serve, image: MakeImage, cluster: Cluster
) -> None:
    """Seen to fail with --read-only."""
    spec = image("16M")
    with serve(spec) as served:
        with pytest.raises(Exception, match="image still has watchers"):
            cluster.rbd("rm", "--no-progress", spec)
        served.client.write(0, b"x" * 4096)


def test_a_snapshot_that_was_removed_is_not_read_as_zeroes(
    serve: Serve, image: MakeImage, rbd: Rbd
) -> None:
    """Seen to fail with a `header._size` that looks for the size of snapshots as well."""
    spec = image("16M")
    rbd("snap", "create", "--no-progress", f"{spec}@s")
    with serve(f"{spec}@s") as served:
        rbd("snap", "rm", "--no-progress", f"{spec}@s")
        is_gone(served, "the snapshot was removed")


def test_past_the_end_of_an_image_that_has_shrunk_are_errors(
    serve: Serve, image: MakeImage, rbd: Rbd
) -> None:
    """Seen to fail with a `PolledImage.finished` that believes librbd."""
    spec = image("16M")
    with serve(spec) as served:
        client = served.client
        client.write(7 * MIB, b"x" * 2 * MIB)
        rbd("resize", "--no-progress", "--allow-shrink", "--size", "8M", spec)
        for offset, length in ((8 * MIB - 4096, 8192), (8 * MIB, 4096), (15 * MIB, 4096)):
            assert client.call(WRITE, offset, payload=b"y" * length)[0] != 0
            assert client.call(READ, offset, length)[0] != 0
        client.write(8 * MIB - 4096, b"z" * 4096)
        assert client.read(8 * MIB - 4096, 4096) == b"z" * 4096


def test_past_the_end_of_a_read_only_image_that_has_shrunk_are_errors_soon(
    serve: Serve, image: MakeImage, rbd: Rbd, options: ClusterOptions
) -> None:
    """Seen to fail with a `RbdImage.shrink_to` that does nothing."""
    spec = image("16M")
    with opened(spec, options) as writer:
        writer.write(0, b"x" * 4096)
    with serve(spec, "--read-only") as served:
        rbd("resize", "--no-progress", "--allow-shrink", "--size", "8M", spec)
        wait_until(lambda: served.client.call(READ, 8 * MIB, 4096)[0], SECONDS, "reads fail")
        assert served.client.read(0, 4096) == b"x" * 4096


def test_after_a_rollback_the_snapshot_is_read_and_written_on(
    serve: Serve, image: MakeImage, rbd: Rbd
) -> None:
    """Seen to fail with `rbd snap create` in the place of the rollback."""
    spec = image("16M", *UNLOCKABLE)
    with serve(spec) as served:
        served.client.write(0, b"then" * 1024)
        rbd("snap", "create", "--no-progress", f"{spec}@s")
        served.client.write(0, b"now!" * 2048)
        rbd("snap", "rollback", "--no-progress", f"{spec}@s")
        assert served.client.read(0, 8192) == b"then" * 1024 + bytes(4096)
        served.client.write(4096, b"on!!" * 1024)
        assert served.client.read(0, 8192) == b"then" * 1024 + b"on!!" * 1024


def test_a_clone_reads_and_writes_the_same_while_it_is_flattened(
    serve: Serve, image: MakeImage, rbd: Rbd, options: ClusterOptions
) -> None:
    """Seen to fail with `rbd resize` to nothing in the place of the flattening."""
    noise = os.urandom(4 * MIB)
    parent = image("16M")
    with opened(parent, options) as writer:
        for offset in range(0, 16 * MIB, len(noise)):
            writer.write(offset, noise)
    rbd("snap", "create", "--no-progress", f"{parent}@s")
    clone = f"{parent}-clone"
    rbd("clone", "--rbd-default-clone-format", "2", f"{parent}@s", clone)
    try:
        with serve(clone) as served:
            served.client.write(5 * MIB, b"mine" * 1024)
            rbd("flatten", "--no-progress", clone)
            expected = bytearray(noise * 4)
            expected[5 * MIB : 5 * MIB + 4096] = b"mine" * 1024
            rbd("snap", "rm", "--no-progress", f"{parent}@s")
            for offset in range(0, 16 * MIB, MIB):
                assert served.client.read(offset, MIB) == expected[offset : offset + MIB]
    finally:
        rbd("rm", "--no-progress", clone)
