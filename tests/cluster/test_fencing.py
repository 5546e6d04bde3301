"""A dead predecessor is fenced: what it has not written by then, it never writes."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rbdnbd.errors import RbdnbdError
from rbdnbd.fencing import fence
from rbdnbd.spec import ClusterOptions
from tests.support.opening import opened

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2.0
LOCKABLE = ("--image-feature", "layering,exclusive-lock")
UNLOCKABLE = ("--image-feature", "layering")

PREDECESSOR = """
import json, sys, threading
from rbdnbd.opening import open_image
from rbdnbd.spec import ClusterOptions, ImageSpec

def write_on():
    try:
        while True:
            image.write(0, b"dead" * 1024)
            image.flush()
    except OSError as error:
        sys.stdout.write(f"{error.errno}\\n")  # in one piece

spec, options = ImageSpec.parse(sys.argv[1]), ClusterOptions(**json.loads(sys.argv[2]))
with open_image(spec, options, read_only=False, say=lambda doing: None) as image:
    image.write(0, b"dead" * 1024)
    print(image.address, flush=True)
    writers = [threading.Thread(target=write_on) for _ in range(4)]
    for each in writers: each.start()
    for each in writers: each.join()
"""

pytestmark = pytest.mark.usefixtures("each_handle")

Rbd = Callable[..., str]
MakeImage = Callable[..., str]
Process = subprocess.Popen[str]


@contextmanager
def predecessor(spec: str, options: ClusterOptions) -> Iterator[tuple[Process, str]]:
    """Run a client of its own that writes without end; yield it and its address."""
    argv = [sys.executable, "-c", PREDECESSOR, spec, json.dumps(asdict(options))]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def tenant(options: ClusterOptions, tmp_path: Path) -> ClusterOptions:
    """A client that may do what "profile rbd" allows, and no more."""
    keyring = tmp_path / "keyring"
    caps = ["mon", "profile rbd", "osd", "profile rbd"]
    argv = ["ceph", "--conf", options.conf, "auth", "get-or-create", "client.tenant", *caps]
    subprocess.run([*argv, "-o", str(keyring)], check=True, capture_output=True)
    return replace(options, name="client.tenant", keyring=str(keyring))


@pytest.mark.parametrize("features", [LOCKABLE, UNLOCKABLE], ids=["lock", "no-lock"])
def test_after_kill_9_the_successor_writes_at_once(
    features: tuple[str, str], image: MakeImage, tenant: ClusterOptions
) -> None:
    spec = image("16M", *features)
    with predecessor(spec, tenant) as (process, address):
        process.kill()
        process.wait()
        begin = time.monotonic()
        with opened(spec, tenant) as ours:
            fence(ours, address)
            ours.write(0, b"new!" * 1024)
            ours.flush()
            assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("features", [LOCKABLE, UNLOCKABLE], ids=["lock", "no-lock"])
def test_a_predecessor_that_comes_back_to_life_cannot_write(
    features: tuple[str, str], image: MakeImage, tenant: ClusterOptions
) -> None:
    spec = image("16M", *features)
    with predecessor(spec, tenant) as (process, address), opened(spec, tenant) as ours:
        process.send_signal(signal.SIGSTOP)
        fence(ours, address)
        ours.write(0, b"new!" * 1024)
        ours.flush()
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.read().split() == [str(errno.ESHUTDOWN)] * 4
        with opened(spec, tenant, read_only=True) as anew:
            assert anew.read(0, 4096) == b"new!" * 1024


def test_no_other_client_is_touched(image: MakeImage, tenant: ClusterOptions, rbd: Rbd) -> None:
    spec = image("16M")
    with (
        predecessor(spec, tenant) as (process, address),
        opened(spec, tenant, exclusive=True) as keeper,
        opened(spec, tenant) as ours,
    ):
        fence(ours, address)
        process.kill()
        process.wait()
        keeper.write(0, b"mine")
        keeper.flush()
        (lock,) = json.loads(rbd("lock", "ls", "--format", "json", spec))
        assert lock["address"] == keeper.address
        watchers = json.loads(rbd("status", "--format", "json", spec))["watchers"]
        assert {each["address"] for each in watchers} == {keeper.address, ours.address}


def test_to_fence_again_changes_nothing(image: MakeImage, tenant: ClusterOptions) -> None:
    spec = image("16M")
    with predecessor(spec, tenant) as (process, address), opened(spec, tenant) as ours:
        process.kill()
        fence(ours, address)
        ours.write(0, b"x")
        fence(ours, address)
        ours.write(0, b"x")
        ours.flush()


def test_a_client_does_not_fence_itself(image: MakeImage, options: ClusterOptions) -> None:
    with opened(image("16M"), options) as ours:
        with pytest.raises(RbdnbdError, match="this process itself"):
            fence(ours, ours.address)
        ours.write(0, b"x")
        ours.flush()


def test_a_client_that_may_not_fence_is_told_so(
    image: MakeImage, options: ClusterOptions, tmp_path: Path
) -> None:
    keyring = tmp_path / "keyring"
    caps = ["mon", "allow r", "osd", "allow rwx"]
    argv = ["ceph", "--conf", options.conf, "auth", "get-or-create", "client.weak", *caps]
    subprocess.run([*argv, "-o", str(keyring)], check=True, capture_output=True)
    weak = replace(options, name="client.weak", keyring=str(keyring))
    refused = pytest.raises(RbdnbdError, match="^cannot blocklist the client at 192.0.2.1:0/7: ")
    with opened(image("16M"), weak) as ours, refused:
        fence(ours, "192.0.2.1:0/7")
