"""What udev is told of a device, and names that cannot do harm in /dev."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbdnbd.control import Control
from rbdnbd.names import announce, path_of, properties
from rbdnbd.record import Ownership, Record
from rbdnbd.spec import ClusterOptions, ImageSpec
from tests.support.nbd_driver import FakeDriver

COOKIE = "4711"


@pytest.fixture
def driver(tmp_path: Path) -> FakeDriver:
    """A device nbd0 that is connected."""
    driver = FakeDriver(tmp_path)
    driver.show(0, "pid", 42)
    return driver


def recorded(run_dir: Path, spec: ImageSpec) -> Ownership:
    """Be the process that serves an image."""
    owner = Ownership(COOKIE, run_dir)
    details = {"image_id": "", "address": "", "cluster": ClusterOptions(), "options": {}}
    owner.write(Record(cookie=COOKIE, spec=spec, **details))
    return owner


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (ImageSpec("rbd", "", "vol"), "rbd/vol"),
        (ImageSpec("rbd", "ns", "vol_1.x-y", "s"), "rbd/ns/vol_1.x-y@s"),
        (ImageSpec("rbd", "", "vol", snap_id=7), "rbd/vol@7"),
        (ImageSpec("rbd", "", "a sda"), r"rbd/a\x20sda"),
        (ImageSpec("a\\x", "", "$env{X}%k"), r"a\x5cx/\x24env\x7bX\x7d\x25k"),
        (ImageSpec("..", ".", "..x"), r"\x2e\x2e/\x2e/..x"),
        (ImageSpec("rbd", "", "Größe"), r"rbd/Gr\xc3\xb6\xc3\x9fe"),
        (ImageSpec("rbd", "", "'\""), r"rbd/\x27\x22"),
    ],
)
def test_a_name_is_a_path_below_one_directory_whatever_it_holds(spec: ImageSpec, path: str) -> None:
    assert path_of(spec) == path


def test_a_device_has_its_records_name(driver: FakeDriver, tmp_path: Path) -> None:
    driver.show(0, "backend", COOKIE)
    owner = recorded(tmp_path / "run", ImageSpec("rbd", "", "vol"))
    assert properties(0, driver.devices, tmp_path / "run") == {"RBDNBD_NAME": "rbd/vol"}
    owner.give_up()


def test_a_device_whose_process_is_gone_waits(driver: FakeDriver, tmp_path: Path) -> None:
    driver.show(0, "backend", COOKIE)
    recorded(tmp_path / "run", ImageSpec("rbd", "", "vol")).give_up()
    assert properties(0, driver.devices, tmp_path / "run") == {
        "RBDNBD_NAME": "rbd/vol",
        "RBDNBD_WAITING": "1",
    }


def test_a_device_without_a_cookie_is_asked_for_at_the_control_sockets(
    driver: FakeDriver, tmp_path: Path
) -> None:
    document = {"pool": "rbd", "namespace": "", "image": "vol", "snap": "", "snap_id": None}
    document |= {"device": str(driver.devices.path(0)), "cookie": COOKIE}
    with Control(lambda: document, tmp_path / "run"):
        assert properties(0, driver.devices, tmp_path / "run") == {"RBDNBD_NAME": "rbd/vol"}


@pytest.mark.parametrize("cookie", [None, "a stranger's"])
def test_a_strangers_device_has_no_name(
    driver: FakeDriver, tmp_path: Path, cookie: str | None
) -> None:
    if cookie:
        driver.show(0, "backend", cookie)
    assert properties(0, driver.devices, tmp_path / "run") is None


def test_a_free_device_has_no_name(driver: FakeDriver, tmp_path: Path) -> None:
    driver.show(1, "backend", COOKIE)
    owner = recorded(tmp_path / "run", ImageSpec("rbd", "", "vol"))
    assert properties(1, driver.devices, tmp_path / "run") is None
    owner.give_up()


def test_a_device_and_its_partitions_are_announced(driver: FakeDriver) -> None:
    disk = driver.devices.queue(0).parent
    (disk / "nbd0p1").mkdir()
    announce(0, driver.devices)
    assert [(path / "uevent").read_text() for path in (disk, disk / "nbd0p1")] == ["change"] * 2


def test_a_kernel_that_refuses_an_announcement_is_no_obstacle(
    driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (driver.devices.queue(0).parent / "uevent").mkdir()
    announce(0, driver.devices)
    assert caplog.messages == [f"udev is not told of {driver.devices.path(0)}: Is a directory"]
