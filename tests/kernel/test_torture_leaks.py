"""Images that are mapped and unmapped again and again, and many at once, leave nothing behind."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.kernel.test_take_over import process_of, succeed
from tests.support.census import Census, census, kernel_memory, nodes, size
from tests.support.forked import Forks, forks
from tests.support.torture import Torture
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.usefixtures("nbd_module"), pytest.mark.torture]

Rbd = Callable[..., str]
MakeImage = Callable[..., str]

WAYS = ((), ("--ioctl",), ("--io-engine", "events"), ("--exclusive",))
SETTLE_SECONDS = 20
WARM = 1
"""Rounds after which everything that is kept has been made."""
BY_COMMAND = 25
"""One round in so many is of the commands as a user runs them, and the first."""
GROWTH_KIB = 2048
"""What a process or the kernel may have more, for all rounds together."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands have their temporary files: a VM sees all that come and go on its host."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


@pytest.fixture
def forked(tmp_path: Path, ceph_conf: Path) -> Iterator[Forks]:
    """Commands that are forked."""
    with forks(tmp_path / "commands", ceph_conf) as started:
        yield started


@pytest.fixture
def staying(image: MakeImage, rbdnbd: Command) -> Iterator[int]:
    """The process of a mapping that stays while others come and go."""
    device = succeed(rbdnbd("map", image("16M")))
    yield process_of(rbdnbd, device)
    succeed(rbdnbd("unmap", device))


def test_mapping_and_unmapping_again_and_again_leaves_nothing_behind(
    staying: int,
    image: MakeImage,
    rbdnbd: Command,
    forked: Forks,
    rbd: Rbd,
    torture: Torture,
    temporary: Path,
) -> None:
    """Seen to fail with a control socket that left a file open for each question."""
    spec = image("16M")
    forked.run("list-mapped")
    for number, random in torture.rounds(short=4, whole=500):
        if number == WARM:
            before, process, kernel = census(temporary), size(staying), kernel_memory()
            watchers, there = rbd("status", spec), nodes()
        way, noise = random.choice(WAYS), random.randbytes(4096)
        if number % BY_COMMAND:
            device = forked.run("map", spec, *way)
            use(device, noise)
            forked.run("unmap", random.choice((spec, device)))
            forked.all[-2].gone()
        else:
            device = succeed(rbdnbd("map", spec, *way))
            use(device, noise)
            succeed(rbdnbd("unmap", random.choice((spec, device))))
    left_as_it_was(temporary, before)
    after = size(staying)
    assert after[:2] == process[:2]
    assert after.memory - process.memory < GROWTH_KIB
    assert kernel_memory() - kernel < GROWTH_KIB
    assert nodes() == there
    assert rbd("status", spec) == watchers == "Watchers: none\n"
    assert json.loads(rbd("lock", "ls", "--format", "json", spec)) == []


def test_many_images_are_mapped_at_once_and_unmapped_at_once(
    staying: int,
    image: MakeImage,
    forked: Forks,
    rbd: Rbd,
    torture: Torture,
    temporary: Path,
) -> None:
    """Twenty in the whole form. Seen to fail as the test above."""
    count = 20 if torture.whole else 3
    specs = [image("16M") for _ in range(count)]
    forked.run("list-mapped")
    before, process, there = census(temporary), size(staying), len(nodes())
    for _, random in torture.rounds(short=1, whole=5):
        maps = {spec: forked.start("map", spec, *random.choice(WAYS)) for spec in specs}
        ended = {spec: each.ended() for spec, each in maps.items()}
        devices = {spec: each.out.strip() for spec, each in ended.items()}
        assert len(set(devices.values()) - {""}) == count, ended
        for spec, device in devices.items():
            use(device, spec.encode().ljust(4096))
        listed = json.loads(forked.run("list-mapped", "--format", "json"))
        found = {f"{each['pool']}/{each['image']}": each["device"] for each in listed}
        assert {spec: found.get(spec) for spec in specs} == devices
        unmaps = [forked.start("unmap", random.choice(pair)) for pair in devices.items()]
        assert [each.ended() for each in unmaps] == [(0, "", "")] * count
        for each in maps.values():
            each.gone()
    left_as_it_was(temporary, before)
    assert size(staying)[:2] == process[:2]
    assert len(nodes()) == max(there, count + 1)  # the kernel keeps those that it had to make
    for spec in specs:
        assert rbd("status", spec) == "Watchers: none\n"


def left_as_it_was(temporary: Path, before: Census) -> None:
    """Wait until there is what there was before, and nothing else."""
    try:
        wait_until(lambda: census(temporary) == before, SETTLE_SECONDS, "as it was")
    except AssertionError:
        assert census(temporary) == before  # which shows what is not
        raise


def use(device: str, data: bytes) -> None:
    """Write to a device and read it back, past the page cache."""
    with mmap.mmap(-1, len(data)) as room:
        fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        try:
            room[:] = data
            assert os.pwritev(fd, [room], 0) == len(data)
            room[:] = bytes(len(data))
            assert os.preadv(fd, [room], 0) == len(data)
        finally:
            os.close(fd)
        assert room[:] == data
