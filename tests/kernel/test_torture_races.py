"""Commands that race for one device, or for ten: each ends with the truth, no device is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import rados
import rbd as bindings

from tests.support.forked import forks
from tests.support.racing import Race, Subject
from tests.support.torture import Torture

pytestmark = [pytest.mark.usefixtures("nbd_module"), pytest.mark.torture]

MakeRace = Callable[[int], Race]


@pytest.fixture
def race(
    image: Callable[..., str], rbd: Callable[..., str], ceph_conf: Path, tmp_path: Path
) -> Iterator[MakeRace]:
    """Make a race for so many devices."""
    with ExitStack() as stack:
        cluster = stack.enter_context(rados.Rados(conffile=str(ceph_conf)))
        ioctx = stack.enter_context(closing(cluster.open_ioctx("rbd")))
        forked = stack.enter_context(forks(tmp_path / "commands", ceph_conf))
        threads = stack.enter_context(ThreadPoolExecutor())

        def make(devices: int) -> Race:
            subjects = []
            for _ in range(devices):
                spec = image("32M")
                opened = bindings.Image(ioctx, spec.partition("/")[2])
                subjects.append(Subject(spec, stack.enter_context(closing(opened))))
            return Race(forked, rbd, threads, subjects)

        yield make


def test_commands_that_race_for_a_device_end_with_the_truth(
    race: MakeRace, torture: Torture
) -> None:
    """Seen to fail with a detach that disconnected the device: its IO did not go on."""
    runners = race(1)
    for _, source in torture.rounds(short=2, whole=60):
        runners.run(source, commands=6)
    runners.end()


def test_commands_that_race_for_many_devices_end_with_the_truth(
    race: MakeRace, torture: Torture
) -> None:
    """Ten of them in the whole form. Seen to fail with a detach that disconnected the device."""
    runners = race(10 if torture.whole else 2)
    for _, source in torture.rounds(short=1, whole=10):
        runners.run(source, commands=3)
    runners.end()
