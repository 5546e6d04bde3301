"""Which way a device is attached, what is undone when that fails, and what is said."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rbdnbd import kernel
from rbdnbd.blockqueue import tune
from rbdnbd.errors import RbdnbdError
from rbdnbd.kernel import Attachment, NbdDriver
from rbdnbd.netlink import Connect, FamilyNotFoundError
from tests.support.nbd_driver import FakeDriver
from tests.support.waiting import wait_until

SIZE = 64 << 20


class FakeFamily:
    """The family "nbd" of a FakeDriver; `refusals` are used up one a CONNECT."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.refusals: list[int] = []
        self.connects: list[Connect] = []
        self.disconnects: list[int] = []
        self.missing = False

    def __call__(self) -> FakeFamily:
        if self.missing:
            raise FamilyNotFoundError(errno.ENOENT, "no generic-netlink family nbd")
        return self

    def __enter__(self) -> FakeFamily:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def connect(self, request: Connect) -> int:
        self.connects.append(request)
        if self.refusals:
            number = self.refusals.pop(0)
            raise OSError(number, os.strerror(number))
        index = request.index or 0
        if self.driver.alive:
            self.driver.connect(index, request.size)
        return index

    def disconnect(self, index: int) -> None:
        self.disconnects.append(index)
        self.driver.let_go(f"nbd{index}")


@pytest.fixture
def fake(tmp_path):
    return FakeDriver(tmp_path)


@pytest.fixture
def family(fake):
    return FakeFamily(fake)


@pytest.fixture
def driver(fake, family):
    return NbdDriver(fake.devices, fake.ioctls, family)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    for limit in ("LIVE_LIMIT", "BUSY_LIMIT", "RELEASE_LIMIT"):
        monkeypatch.setattr(kernel, limit, 0.1)


@pytest.fixture
def pair():
    server, client = socket.socketpair()
    with server, client:
        yield server, client


@pytest.fixture
def attach(driver, pair):
    def attach(**options: object) -> Attachment:
        given = {"size": SIZE, "block_size": 512, "flags": 5} | options
        return driver.attach(pair[1], **given)

    return attach


def refused(act: Callable[[], object]) -> RbdnbdError:
    with pytest.raises(RbdnbdError) as refusal:
        act()
    return refusal.value


def test_netlink_is_preferred_and_told_everything(attach, family, fake, pair):
    fd = pair[1].fileno()
    attachment = attach(device=str(fake.devices.path(1)), timeout=3, cookie="c", block_size=4096)
    assert family.connects == [
        Connect(
            sockets=(fd,),
            size=SIZE,
            block_size=4096,
            flags=5,
            index=1,
            timeout=3,
            backend_identifier="c",
        )
    ]
    assert (attachment.index, attachment.method) == (1, "netlink")
    assert attachment.device == str(fake.devices.path(1))


def test_the_kernel_chooses_when_no_device_is_named(attach, family):
    assert attach().index == 0
    assert family.connects[0].index is None


def test_ioctl_is_taken_where_the_family_is_missing(attach, family, fake):
    family.missing = True
    attachment = attach()
    assert (attachment.method, fake.names()[0]) == ("ioctl", "NBD_SET_SOCK")
    attachment.disconnect()


def test_ioctl_is_taken_when_it_is_asked_for(attach, family, fake):
    attachment = attach(use_ioctl=True)
    assert (attachment.method, family.connects) == ("ioctl", [])
    attachment.disconnect()


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_a_size_is_cut_to_whole_blocks(attach, fake, use_ioctl):
    attachment = attach(size=SIZE + 4095, block_size=4096, use_ioctl=use_ioctl)
    assert fake.devices.size(attachment.index) == SIZE
    attachment.disconnect()


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_an_attached_device_is_opened_once_and_freed_of_a_read_only_mark(attach, fake, use_ioctl):
    attachment = attach(use_ioctl=use_ioctl)
    assert fake.calls[-1] == (f"nbd{attachment.index}", "BLKROSET", 0)
    attachment.disconnect()
    wait_until(lambda: fake.open_here() == [], 5, "the device is closed")


def test_the_socket_is_closed_once_the_kernel_has_it(attach, pair):
    attach()
    assert pair[0].recv(1) == b""


def test_the_socket_is_closed_when_the_attach_fails(attach, family, pair):
    family.refusals = [errno.EINVAL]
    refused(attach)
    assert pair[0].recv(1) == b""


def test_a_malformed_device_is_refused_before_anything_is_done(attach, family):
    refusal = refused(lambda: attach(device="/dev/sda"))
    assert refusal.message.startswith("invalid device path: /dev/sda ")
    assert family.connects == []


def test_a_refusal_of_the_kernel_is_one_sentence(attach, family):
    family.refusals = [errno.EINVAL]
    assert refused(attach).message == "cannot attach an nbd device: Invalid argument"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_who_is_not_root_is_told_so(attach, family, number):
    family.refusals = [number]
    refusal = refused(attach)
    assert refusal.message == "cannot attach an nbd device: this needs root (CAP_SYS_ADMIN)"
    assert refusal.errno == number


def test_a_free_device_that_is_open_somewhere_is_asked_for_again(attach, family, fake):
    family.refusals = [errno.EBUSY, errno.EBUSY]
    assert attach(device=str(fake.devices.path(1))).index == 1


def test_a_device_that_stays_open_somewhere_is_refused_in_the_end(attach, family, fake):
    family.refusals = [errno.EBUSY] * 1000
    device = str(fake.devices.path(1))
    refusal = refused(lambda: attach(device=device))
    assert refusal.message == f"{device} is busy: another process has it open"
    assert len(family.connects) > 1


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_a_connected_device_is_refused_at_once(attach, family, fake, use_ioctl):
    family.refusals = [errno.EBUSY] * 1000
    fake.connect(1, SIZE, pid=4711)
    device = str(fake.devices.path(1))
    refusal = refused(lambda: attach(device=device, use_ioctl=use_ioctl))
    assert refusal.message == f"{device} is already in use (by process 4711)"
    assert refusal.errno == errno.EBUSY
    assert len(family.connects) <= 1


def test_ioctl_takes_the_first_device_that_is_free(attach, fake):
    fake.connect(0, SIZE)
    attachment = attach(use_ioctl=True)
    assert attachment.index == 1
    attachment.disconnect()


def test_ioctl_passes_over_a_device_that_another_process_sets_up(attach, fake):
    fake.refusals["NBD_SET_SOCK"] = errno.EBUSY
    refused(lambda: attach(use_ioctl=True))
    assert [device for device, _, _ in fake.calls] == ["nbd0", "nbd1"]


def test_no_free_device_is_said_with_the_number_of_devices(attach, fake):
    fake.connect(0, SIZE)
    fake.connect(1, SIZE)
    refusal = refused(lambda: attach(use_ioctl=True))
    assert refusal.message == (
        "no free nbd device: all 2 are in use (the nbd module's nbds_max sets how many)"
    )


def test_a_device_that_does_not_exist_is_refused(attach, fake):
    device = str(fake.devices.path(7))
    refusal = refused(lambda: attach(device=device, use_ioctl=True))
    assert refusal.message == f"cannot attach {device}: No such file or directory"


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_a_device_that_does_not_come_to_life_is_disconnected(attach, family, fake, use_ioctl):
    fake.alive = False
    refusal = refused(lambda: attach(use_ioctl=use_ioctl))
    assert refusal.message == f"{fake.devices.path(0)} did not come to life"
    assert family.disconnects == [0]
    wait_until(lambda: fake.open_here() == [], 5, "the device is closed")


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_a_device_that_cannot_be_opened_is_disconnected(attach, family, fake, use_ioctl):
    fake.refusals["BLKROSET"] = errno.EACCES
    refused(lambda: attach(use_ioctl=use_ioctl))
    assert family.disconnects == [0]


def test_a_do_it_that_fails_says_why_and_disconnects_nobody(attach, family, fake):
    fake.refusals["NBD_DO_IT"] = errno.EBUSY
    refusal = refused(lambda: attach(use_ioctl=True))
    assert refusal.message == "cannot attach an nbd device: Device or resource busy"
    assert family.disconnects == []


def test_tuning_lets_a_request_carry_an_object_and_reads_two_ahead(driver, fake):
    queue = queue_of(fake, limit=32768)
    tune(driver.devices, 0, 4 << 20)
    assert (queue / "max_sectors_kb").read_text() == "4096"
    assert (queue / "read_ahead_kb").read_text() == "8192"


def test_tuning_keeps_to_the_drivers_limit(driver, fake):
    queue = queue_of(fake, limit=32768)
    tune(driver.devices, 0, 64 << 20)
    assert (queue / "max_sectors_kb").read_text() == "32768"


def test_a_device_that_cannot_be_tuned_is_logged(driver, caplog):
    tune(driver.devices, 0, 4 << 20)
    assert "cannot tune" in caplog.text


def queue_of(fake: FakeDriver, limit: int) -> Path:
    queue = fake.devices.queue(0)
    (queue / "max_hw_sectors_kb").write_text(f"{limit}\n")
    return queue


@pytest.fixture
def claimed_elsewhere(monkeypatch):
    """Every exclusive open fails with EBUSY."""

    def open_device(path: Path, flags: int = 0) -> int:
        assert flags & os.O_EXCL
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(kernel, "open_device", open_device)


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


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_an_attachment_knows_when_it_is_released(attach, fake, use_ioctl):
    attachment = attach(use_ioctl=use_ioctl)
    assert not attachment.wait_released(0)
    fake.let_go("nbd0")
    assert attachment.wait_released(5)


def test_a_device_that_is_somebody_elses_by_now_is_released(attach, fake):
    attachment = attach()
    fake.connect(0, SIZE, pid=4712)
    assert attachment.released()


def test_an_attachment_that_is_released_is_not_disconnected_again(attach, fake, family):
    attachment = attach()
    fake.let_go("nbd0")
    attachment.disconnect()
    assert family.disconnects == []
