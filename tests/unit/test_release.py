"""When a device is let go, what is done before, and what is said when it is not."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from rbdnbd import release
from rbdnbd.errors import RbdnbdError
from rbdnbd.release import Releaser
from tests.support.nbd_driver import FakeDriver, FakeFamily

SIZE = 64 << 20


@pytest.fixture
def fake(tmp_path):
    return FakeDriver(tmp_path)


@pytest.fixture
def family(fake):
    return FakeFamily(fake)


@pytest.fixture
def driver(fake, family, monkeypatch):
    monkeypatch.setattr(release, "RELEASE_LIMIT", 0.1)
    return Releaser(fake.devices, fake.ioctls, family)


def refused(act: Callable[[], object]) -> RbdnbdError:
    with pytest.raises(RbdnbdError) as refusal:
        act()
    return refusal.value


@pytest.fixture
def claimed_elsewhere(monkeypatch):
    """Every exclusive open fails with EBUSY."""

    def open_device(path: Path, flags: int = 0) -> int:
        assert flags & os.O_EXCL
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(release, "open_device", open_device)


def hold(fake: FakeDriver, index: int) -> None:
    (fake.devices.proc / "self/mountinfo").write_text(
        f"40 21 43:0 / /mnt rw - ext4 {fake.devices.path(index)} rw\n"
    )


def test_a_mounted_device_is_not_released(driver, fake, family, claimed_elsewhere):
    fake.connect(0, SIZE)
    hold(fake, 0)
    refusal = refused(lambda: driver.release(0))
    device = fake.devices.path(0)
    assert refusal.message == f"{device} is mounted on /mnt: unmount it first, or use --force"
    assert refusal.errno == errno.EBUSY
    assert family.disconnects == []


def test_a_device_that_is_held_out_of_sight_is_not_released(driver, fake, claimed_elsewhere):
    fake.connect(0, SIZE)
    assert refused(lambda: driver.release(0)).message == (
        f"{fake.devices.path(0)} is in use by another process or mount namespace: "
        "end that first, or use --force"
    )


def test_a_free_device_cannot_be_released(driver, fake):
    refusal = refused(lambda: driver.release(0))
    assert refusal.message == f"{fake.devices.path(0)} is not attached"
    assert refusal.errno == errno.ENODEV


def test_a_device_is_flushed_and_then_disconnected(driver, fake, family, monkeypatch):
    fake.connect(0, SIZE)
    monkeypatch.setattr(family, "disconnect", lambda index: fake.calls.append(("x", "DISC", index)))
    refused(lambda: driver.release(0))
    assert fake.names() == ["BLKFLSBUF", "DISC"]


def test_a_device_is_disconnected_by_ioctl_where_the_family_is_missing(driver, fake, family):
    family.missing = True
    fake.connect(0, SIZE)
    driver.release(0)
    assert fake.names() == ["BLKFLSBUF", "NBD_DISCONNECT", "NBD_CLEAR_SOCK"]


def test_a_device_that_cannot_be_flushed_is_not_disconnected(driver, fake, family):
    fake.connect(0, SIZE)
    fake.refusals["BLKFLSBUF"] = errno.EIO
    assert refused(lambda: driver.release(0)).message == (
        f"cannot flush {fake.devices.path(0)}: Input/output error "
        "(--force gives up what is not written yet)"
    )
    assert family.disconnects == []


def test_force_disconnects_what_cannot_be_flushed_and_says_so(driver, fake, family, caplog):
    fake.connect(0, SIZE)
    fake.refusals["BLKFLSBUF"] = errno.EIO
    driver.release(0, force=True)
    assert family.disconnects == [0]
    assert "disconnected before all of it was written" in caplog.text


def test_force_does_not_wait_for_a_flush_that_hangs(driver, fake, family, monkeypatch):
    fake.connect(0, SIZE)
    disconnected = threading.Event()
    flushed_in_time: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed_in_time.append(disconnected.wait(5)))
    monkeypatch.setattr(family, "disconnect", lambda index: disconnected.set())
    refused(lambda: driver.release(0, force=True, flush_limit=0.1))
    assert flushed_in_time == [True]


def test_force_minds_no_holder_and_does_not_wait_for_it(
    driver, fake, family, claimed_elsewhere, monkeypatch, caplog
):
    fake.connect(0, SIZE)
    hold(fake, 0)
    monkeypatch.setattr(family, "disconnect", lambda index: None)
    driver.release(0, force=True)
    assert "is disconnected but not free" in caplog.text


def test_a_device_that_someone_keeps_open_is_reported(driver, fake, family, monkeypatch):
    fake.connect(0, SIZE)
    monkeypatch.setattr(family, "disconnect", lambda index: None)
    assert refused(lambda: driver.release(0)).message == (
        f"{fake.devices.path(0)} is disconnected but not free: another process has it open"
    )


def test_force_does_not_wait_for_a_device_that_cannot_be_opened(driver, fake, family, monkeypatch):
    disconnected = threading.Event()

    @contextmanager
    def opened(path):
        assert disconnected.wait(5)
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        yield

    fake.connect(0, SIZE)
    monkeypatch.setattr(release, "opened", opened)
    monkeypatch.setattr(family, "disconnect", lambda index: disconnected.set())
    refused(lambda: driver.release(0, force=True, flush_limit=0.1))
    assert disconnected.is_set()
