"""A write of a dead process that is still on its way never lands on a newer one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from rbdnbd.fencing import fence
from rbdnbd.spec import ClusterOptions
from tests.support.opening import opened
from tests.support.torture import Torture
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.on_host,  # it cuts off a process by its ports
    pytest.mark.torture,
    pytest.mark.usefixtures("each_handle"),
]

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 4096
NEW = b"new!" * 1024
LANDED_SECONDS = 60
HOLE, TABLE = f"hole-{os.getpid()}", str(10**6 + os.getpid())
LOCKABLE = ("--image-feature", "layering,exclusive-lock")
UNLOCKABLE = ("--image-feature", "layering")

PREDECESSOR = """
import json, sys
from rbdnbd.opening import open_image
from rbdnbd.spec import ClusterOptions, ImageSpec

spec, options = ImageSpec.parse(sys.argv[1]), ClusterOptions(**json.loads(sys.argv[2]))
with open_image(spec, options, read_only=False, say=lambda doing: None) as image:
    image.write(0, b"old." * 1024)
    image.flush()
    print(image.address, flush=True)
    sys.stdin.readline()
    image.write(0, b"dead" * 1024)
    image.flush()
    print("written", flush=True)
"""


@contextmanager
def predecessor(spec: str, options: ClusterOptions) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a client that has written once, and writes again when told; yield it and its address."""
    argv = [sys.executable, "-c", PREDECESSOR, spec, json.dumps(asdict(options))]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def ports(pid: int) -> list[str]:
    """Return the local ports of a process's connections to OSDs, which listen from 6800 on."""
    said = run("ss", "-Htnp", "dport", ">=", "6800")
    lines = [line for line in said.splitlines() if f"pid={pid}," in line]
    return [line.split()[3].rpartition(":")[2] for line in lines]


def unacknowledged(ports: list[str]) -> int:
    """Return how many bytes these connections have sent that their peers have not got."""
    said = [run("ss", "-Htn", "sport", "=", port) for port in ports]
    return sum(int(line.split()[2]) for lines in said for line in lines.splitlines())


def run(*argv: str) -> str:
    """Run a command that has to succeed, and return what it prints."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


@contextmanager
def cut_off(cut: list[str]) -> Iterator[None]:
    """Let nothing that is sent from these ports arrive; it is sent again when the `with` ends.

    It is routed to a link at whose other end nobody listens. An error of routing would not do: at
    the first one the kernel gives up the connections of a dead process (tcp_orphan_retries).
    """
    run("ip", "link", "add", HOLE, "type", "veth", "peer", "name", f"{HOLE}-end")
    try:
        for end in (HOLE, f"{HOLE}-end"):
            run("ip", "link", "set", end, "up", "arp", "off")
        run("ip", "route", "add", "default", "dev", HOLE, "table", TABLE)
        for port in cut:
            run("ip", "rule", "add", "ipproto", "tcp", "sport", port, "lookup", TABLE)
        yield
    finally:
        for port in cut:
            run("ip", "rule", "del", "ipproto", "tcp", "sport", port, "lookup", TABLE)
        run("ip", "link", "del", HOLE)  # and the route with it


@pytest.fixture
def unlucky_osd(ceph_conf: Path) -> Iterator[None]:
    """Have an OSD that performs what it reads from a connection which has ended by then.

    As a rule, but not always, it notices the end first and drops the request.
    """
    config = ("ceph", "--conf", str(ceph_conf), "config")
    run(*config, "set", "osd", "osd_discard_disconnected_ops", "false")
    yield
    run(*config, "rm", "osd", "osd_discard_disconnected_ops")


@pytest.mark.usefixtures("unlucky_osd")
@pytest.mark.parametrize("features", [LOCKABLE, UNLOCKABLE], ids=["lock", "no-lock"])
def test_what_a_killed_process_has_sent_never_lands_on_what_its_successor_wrote(
    features: tuple[str, str],
    torture: Torture,
    image: Callable[..., str],
    options: ClusterOptions,
) -> None:
    """The kernel goes on sending what a dead process has sent, until it arrives.

    Seen to fail without the call of `fence`: an image without a lock has the dead one's bytes then.
    """
    for _ in torture.rounds(short=1, whole=20):
        spec = image("16M", *features)
        with predecessor(spec, options) as (process, address), opened(spec, options) as ours:
            cut = ports(process.pid)
            assert cut
            with cut_off(cut):
                send_write(process, cut)
                process.kill()
                process.wait()
                assert unacknowledged(cut) > LENGTH
                fence(ours, address)
                ours.write(0, NEW)
                ours.flush()
            wait_until(partial(all_arrived, cut), LANDED_SECONDS, "the dead one's bytes arrive")
            with opened(spec, options, read_only=True) as anew:
                assert anew.read(0, LENGTH) == NEW


def send_write(process: subprocess.Popen[str], ports: list[str]) -> None:
    """Have a process write, and wait until the write is on its way."""
    assert process.stdin is not None
    process.stdin.write("write\n")
    process.stdin.flush()
    wait_until(lambda: unacknowledged(ports) > LENGTH, 10, "the write is on its way")


def all_arrived(ports: list[str]) -> bool:
    """Tell whether nothing is on its way any more."""
    return not unacknowledged(ports)
