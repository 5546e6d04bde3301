"""The cluster goes away, or is full: requests wait, and go on when it is back, all data right.

The cluster is these tests' own, for what they do to it would fail everybody else's.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from testbed.cluster import LocalCluster, ThrowAwayCluster
from testbed.processes import output
from tests.cluster.conftest import running
from tests.support.client import WRITE
from tests.support.gateway import Gateway, gateway
from tests.support.torture import Torture
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.on_host, pytest.mark.torture]

ENGINES = ("threads", "events")
BLOCK = 4096
BLOCKS = 2048
BACK_SECONDS = 60.0
FULL_SECONDS = 60


@pytest.fixture(scope="module")
def own() -> Iterator[ThrowAwayCluster]:
    """A cluster of this file's own, of which all is taken away."""
    with running(LocalCluster()) as cluster:
        yield cluster


class Load:
    """One gateway under requests that are waited for later, and what each block has to hold."""

    def __init__(self, served: Gateway, random: random.Random) -> None:
        self.served, self._random = served, random
        self._sums: dict[int, int] = {}
        self._asked: set[int] = set()

    def ask(self, count: int) -> None:
        """Write so many blocks, each once, and do not wait."""
        for number in self._random.sample(range(BLOCKS), count):
            data = self._random.randbytes(BLOCK)
            self._sums[number] = zlib.crc32(data)
            self._asked.add(self.served.client.request(WRITE, number * BLOCK, payload=data))

    def answered(self) -> None:
        """Take all replies, which have to be successes."""
        while self._asked:
            cookie, error, _ = self.served.client.reply()
            assert error == 0
            self._asked.remove(cookie)

    def verify(self) -> None:
        """Read all that was ever written."""
        for number, expected in self._sums.items():
            assert zlib.crc32(self.served.client.read(number * BLOCK, BLOCK)) == expected, number


@pytest.fixture
def loads(own: ThrowAwayCluster, torture: Torture, tmp_path: Path) -> Iterator[list[Load]]:
    """An image under load by each engine."""
    with ExitStack() as stack:
        made = []
        for name in ENGINES:
            spec = f"rbd/{tmp_path.name}-{name}"
            own.rbd("create", "--size", f"{BLOCKS * BLOCK}B", spec)
            stack.callback(own.rbd, "rm", "--no-progress", spec)
            options = ("--io-engine", name)
            served = stack.enter_context(gateway(own.conf, spec, tmp_path / name, *options))
            served.client.sock.settimeout(BACK_SECONDS)
            load = Load(served, random.Random(f"{torture.seed}/{name}"))
            load.ask(32)
            load.answered()
            made.append(load)
        yield made


def goes_on(loads: list[Load]) -> None:
    """Hold that what was asked is answered, and everything there."""
    for load in loads:
        load.answered()
        load.ask(32)
        load.answered()
        load.verify()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["osd", "monitor", "both"])
def test_io_waits_for_what_is_away_and_goes_on(
    what: str, own: ThrowAwayCluster, loads: list[Load], torture: Torture
) -> None:
    """Seen to fail, without the OSD, with a `rados_osd_op_timeout` of 1 s: errors."""
    seconds = 60.0 if torture.whole else 1.0
    with ExitStack() as back:
        if what != "monitor":
            back.callback(own.start_osd)
            own.stop_osd()
        if what != "osd":
            back.callback(own.start_monitor)
            own.stop_monitor()
        for load in loads:
            load.ask(64)
        if what != "monitor":
            assert all(load.served.silent(seconds) for load in loads)
    goes_on(loads)


@pytest.fixture
def ratios(own: ThrowAwayCluster) -> Iterator[Callable[[str], None]]:
    """Say how full the OSD may be; at the end, as full as at the beginning."""

    def ratios(full: str) -> None:
        output("ceph", "--conf", str(own.conf), "osd", "set-full-ratio", full)

    before = ("nearfull", "0.85"), ("backfillfull", "0.90"), ("full", "0.95")
    for name in ("nearfull", "backfillfull"):
        output("ceph", "--conf", str(own.conf), "osd", f"set-{name}-ratio", "0.0001")
    yield ratios
    for name, ratio in before:
        output("ceph", "--conf", str(own.conf), "osd", f"set-{name}-ratio", ratio)
    wait_until(lambda: not is_full(own), FULL_SECONDS, "the pool has room")


def is_full(cluster: ThrowAwayCluster) -> bool:
    """Tell whether the pool's writes are to wait."""
    dump = output("ceph", "--conf", str(cluster.conf), "osd", "pool", "ls", "detail")
    return "full" in dump.partition(" flags ")[2].split()[0].split(",")


@pytest.mark.timeout(300)
def test_writes_wait_for_room_and_go_on_while_a_full_cluster_is_read(
    own: ThrowAwayCluster, loads: list[Load], ratios: Callable[[str], None]
) -> None:
    """Seen to fail without the ratio: writes are answered at once."""
    ratios("0.0002")
    wait_until(lambda: is_full(own), FULL_SECONDS, "the pool is full")
    for load in loads:
        load.verify()
        load.ask(16)
    assert all(load.served.silent(1.0) for load in loads)
    ratios("0.95")
    goes_on(loads)
