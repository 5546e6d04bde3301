"""The order of the ioctls, and that whatever was begun is taken back."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal

import pytest

from rbdnbd.ioctl import DoIt, ioctl, opened
from rbdnbd.netlink import Connect
from tests.support.nbd_driver import FakeDriver
from tests.support.waiting import wait_until

CONNECT = Connect(sockets=[5], size=3 << 40, block_size=512, flags=0x65, timeout=7)


@pytest.fixture
def driver(tmp_path):
    return FakeDriver(tmp_path)


def attach(driver: FakeDriver, connect: Connect = CONNECT) -> DoIt:
    thread = driver.ioctls.attach(driver.devices.path(1), connect)
    wait_until(lambda: driver.devices.connected(1), 5, "NBD_DO_IT")
    return thread


def test_a_device_is_attached_and_given_back_in_the_drivers_order(driver):
    thread = attach(driver)
    driver.let_go("nbd1")
    thread.join(5)
    assert driver.calls == [
        ("nbd1", "NBD_SET_SOCK", 5),
        ("nbd1", "NBD_SET_BLKSIZE", 512),
        ("nbd1", "NBD_SET_SIZE_BLOCKS", (3 << 40) // 512),
        ("nbd1", "NBD_SET_FLAGS", 0x65),
        ("nbd1", "NBD_SET_TIMEOUT", 7),
        ("nbd1", "NBD_DO_IT", 0),
        ("nbd1", "NBD_CLEAR_SOCK", 0),
    ]
    assert driver.open_here() == []


def test_a_timeout_that_is_not_given_is_not_set(driver):
    thread = attach(driver, dataclasses.replace(CONNECT, timeout=None))
    driver.let_go("nbd1")
    thread.join(5)
    assert "NBD_SET_TIMEOUT" not in driver.names()


def test_no_signal_reaches_the_thread_in_do_it(driver):
    thread = attach(driver)
    driver.let_go("nbd1")
    thread.join(5)
    assert driver.signals_left == {signal.SIGKILL, signal.SIGSTOP}


@pytest.mark.parametrize(
    "step", ["NBD_SET_BLKSIZE", "NBD_SET_SIZE_BLOCKS", "NBD_SET_FLAGS", "NBD_SET_TIMEOUT"]
)
def test_a_step_that_fails_takes_the_socket_back(driver, step):
    driver.refusals[step] = errno.EINVAL
    with pytest.raises(OSError) as refused:
        attach(driver)
    assert refused.value.errno == errno.EINVAL
    assert driver.names()[-2:] == [step, "NBD_CLEAR_SOCK"]
    assert driver.open_here() == []


def test_a_socket_that_was_not_taken_is_not_taken_back(driver):
    driver.refusals["NBD_SET_SOCK"] = errno.EBUSY
    with pytest.raises(OSError):
        attach(driver)
    assert driver.names() == ["NBD_SET_SOCK"]
    assert driver.open_here() == []


def test_a_failing_do_it_gives_the_device_back_and_keeps_the_error(driver):
    driver.refusals["NBD_DO_IT"] = errno.EINVAL
    thread = driver.ioctls.attach(driver.devices.path(1), CONNECT)
    thread.join(5)
    assert thread.error is not None
    assert thread.error.errno == errno.EINVAL
    assert driver.names()[-1] == "NBD_CLEAR_SOCK"
    assert driver.open_here() == []


def test_a_disconnect_says_goodbye_before_it_takes_the_socket(driver):
    with opened(driver.devices.path(0)) as fd:
        driver.ioctls.disconnect(fd)
    assert driver.names() == ["NBD_DISCONNECT", "NBD_CLEAR_SOCK"]


def test_a_flush_writes_out_what_is_cached_and_closes_the_device(driver):
    flush = driver.ioctls.start_flush(opened(driver.devices.path(0)))
    flush.join(5)
    assert (driver.names(), flush.error) == (["BLKFLSBUF"], None)
    assert driver.open_here() == []


def test_a_flush_that_fails_keeps_the_error(driver):
    driver.refusals["BLKFLSBUF"] = errno.EIO
    flush = driver.ioctls.start_flush(opened(driver.devices.path(0)))
    flush.join(5)
    assert flush.error is not None
    assert flush.error.errno == errno.EIO


def test_a_device_that_cannot_be_opened_for_a_flush_is_an_error_of_the_flush(driver):
    flush = driver.ioctls.start_flush(opened(driver.devices.path(7)))
    flush.join(5)
    assert flush.error is not None
    assert flush.error.errno == errno.ENOENT


def test_a_new_size_is_given_in_blocks(driver):
    with opened(driver.devices.path(0)) as fd:
        driver.ioctls.resize(fd, (3 << 40) // 512)
    assert driver.calls == [("nbd0", "NBD_SET_SIZE_BLOCKS", (3 << 40) // 512)]


def test_the_read_only_mark_is_set_to_zero(driver):
    with opened(driver.devices.path(0)) as fd:
        driver.ioctls.clear_read_only(fd)
    assert driver.calls == [("nbd0", "BLKROSET", 0)]


def test_the_real_ioctl_raises_the_systems_errno():
    with open(os.devnull) as null, pytest.raises(OSError) as refused:
        ioctl(null.fileno(), 0xAB07, 1 << 40)
    assert refused.value.errno == errno.ENOTTY
