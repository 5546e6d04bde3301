"""The settings that a mapping makes on its device's queue."""

from __future__ import annotations

import pytest

from rbdnbd.blockqueue import expect_successor, tune
from tests.support.nbd_driver import FakeDriver


@pytest.fixture
def fake(tmp_path):
    return FakeDriver(tmp_path)


@pytest.fixture
def queue(fake):
    """The queue of a device that takes 32 MiB a request."""
    queue = fake.devices.queue(0)
    (queue / "max_hw_sectors_kb").write_text("32768\n")
    return queue


def test_tuning_lets_a_request_carry_an_object_and_reads_two_ahead(fake, queue):
    tune(fake.devices, 0, 4 << 20)
    assert (queue / "max_sectors_kb").read_text() == "4096"
    assert (queue / "read_ahead_kb").read_text() == "8192"


def test_tuning_keeps_to_the_drivers_limit(fake, queue):
    tune(fake.devices, 0, 64 << 20)
    assert (queue / "max_sectors_kb").read_text() == "32768"


def test_a_device_that_cannot_be_tuned_is_logged(fake, caplog):
    tune(fake.devices, 0, 4 << 20)
    assert "cannot tune" in caplog.text


def test_the_timer_of_requests_is_shortened_for_a_successor(fake, queue):
    expect_successor(fake.devices, 0)
    assert (queue / "io_timeout").read_text() == "500"


def test_a_timer_that_cannot_be_shortened_is_logged(fake, caplog):
    expect_successor(fake.devices, 7)
    assert "cannot shorten the timer of" in caplog.text
