"""--nbds_max and --max_part, which are the driver's: rbd-nbd gives them when it loads it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import DEVICES
from tests.support.rbd_nbd import Run, printed, refused
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]

PARAMETERS = Path("/sys/module/nbd/parameters")


@pytest.fixture
def unloaded() -> Iterator[Callable[[], None]]:
    """Unload the driver; it is there again, as the other tests want it, afterwards."""

    def unload() -> None:
        subprocess.run(["modprobe", "--remove", "nbd"], check=True)

    unload()
    yield unload
    unload()
    subprocess.run(["modprobe", "nbd", f"nbds_max={DEVICES}"], check=True)
    last = Path(f"/dev/nbd{DEVICES - 1}")
    wait_until(last.exists, 10, "the devices are there again")


def parameters() -> tuple[int, int]:
    """Return what the driver was loaded with: how many devices, how many partitions."""
    read = [int((PARAMETERS / name).read_text()) for name in ("nbds_max", "max_part")]
    return read[0], read[1]


def test_they_count_when_the_driver_is_loaded_for_the_mapping(
    stock: Run, ours: Run, image: MakeImage, unloaded: Callable[[], None]
) -> None:
    spec = image("16M")
    for options, expected in (
        (("--nbds_max=1", "--max_part", "7"), (1, 7)),
        (("--nbds-max", "2"), (2, 255)),
    ):
        for program in (stock, ours):
            device = printed(program("map", spec, *options)).strip()
            assert device == "/dev/nbd0"
            assert parameters() == expected
            if program is stock and expected[0] == 1:
                assert stock("map", spec) == refused("failed to find unused device")
                assert printed(ours("map", spec)) == "/dev/nbd1\n"  # netlink makes one
                printed(ours("unmap", "/dev/nbd1"))
            printed(program("unmap", device))
            unloaded()
    printed(ours("map", spec))
    parameters_before = parameters()
    printed(ours("unmap", spec))
    printed(ours("map", spec, "--max_part=3"))
    assert parameters() == parameters_before, "of a driver that is there nothing is changed"
    printed(ours("unmap", spec))
