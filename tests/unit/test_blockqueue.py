"""The settings that a mapping makes on its device's queue."""

from __future__ import annotations

import pytest

from rbdnbd.blockqueue import SETTINGS, parse_settings, set_timer, tune
from rbdnbd.errors import RbdnbdError, UsageError
from tests.support.nbd_driver import FakeDriver

FOUND = {
    "max_hw_sectors_kb": "32768",
    "discard_max_hw_bytes": "2199023255040",
    "scheduler": "none [mq-deadline] kyber",
    "nr_requests": "256",
    "max_sectors_kb": "128",
    "read_ahead_kb": "128",
    "rotational": "1",
    "discard_max_bytes": "0",
    "nomerges": "2",
    "rq_affinity": "0",
}
"""A queue that somebody has changed."""


@pytest.fixture
def fake(tmp_path):
    return FakeDriver(tmp_path)


@pytest.fixture
def queue(fake):
    queue = fake.devices.queue(0)
    for key, value in FOUND.items():
        (queue / key).write_text(f"{value}\n")
    return queue


def settings(queue) -> dict[str, str]:
    return {key: (queue / key).read_text() for key in SETTINGS}


def test_a_queue_has_our_defaults_whatever_it_had_before(fake, queue):
    """Seen to fail with a `tune` that knows only max_sectors_kb and read_ahead_kb."""
    tune(fake.devices, 0, 4 << 20)
    assert settings(queue) == {
        "scheduler": "none",
        "nr_requests": "128",
        "max_sectors_kb": "4096",
        "read_ahead_kb": "8192",
        "rotational": "0",
        "discard_max_bytes": "2199023255040",
        "nomerges": "0",
        "rq_affinity": "1",
    }


def test_tuning_keeps_to_the_drivers_limit(fake, queue):
    tune(fake.devices, 0, 64 << 20)
    assert (queue / "max_sectors_kb").read_text() == "32768"


def test_what_is_asked_for_comes_before_a_default(fake, queue):
    asked = (("nr_requests", "64"), ("scheduler", "kyber"), ("nomerges", "1"))
    tune(fake.devices, 0, 4 << 20, asked)
    found = settings(queue)
    assert (found["nr_requests"], found["scheduler"], found["nomerges"]) == ("64", "kyber", "1")
    assert found["read_ahead_kb"] == "8192"


def test_what_is_so_already_is_not_written(fake, queue):
    """Seen to fail with a `_write` that always writes; the kernel's own text stays as it is."""
    tune(fake.devices, 0, 4 << 20, [("scheduler", "mq-deadline")])
    assert (queue / "scheduler").read_text() == f"{FOUND['scheduler']}\n"


def test_a_default_that_is_refused_is_logged(fake, caplog):
    (fake.devices.queue(0) / "rotational").mkdir()
    tune(fake.devices, 0, 4 << 20)
    assert f"{fake.devices.path(0)} does not take rotational=0: Is a directory" in caplog.text


def test_what_was_asked_for_and_is_refused_is_one_sentence(fake):
    (fake.devices.queue(0) / "nomerges").mkdir()
    with pytest.raises(RbdnbdError) as refused:
        tune(fake.devices, 0, 4 << 20, [("nomerges", "1")])
    assert refused.value.message == (
        f"{fake.devices.path(0)} does not take nomerges=1: Is a directory"
    )


def test_settings_are_read_and_the_last_of_a_kind_counts():
    words = ("scheduler=kyber", "nr_requests=064", "nr_requests=32")
    assert parse_settings(words) == (("scheduler", "kyber"), ("nr_requests", "32"))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("wbt_lat_usec=0", None),
        ("../../nbd1/queue/rotational=0", None),
        ("rotational", "0 to 1"),
        ("rotational=2", "0 to 1"),
        ("nr_requests=3", "4 to 2048"),
        ("max_sectors_kb=-4", "4 to 32768"),
        ("read_ahead_kb=\N{ARABIC-INDIC DIGIT FOUR}", "0 to 2147483648"),
        ("scheduler=", "none, mq-deadline, kyber, bfq"),
    ],
)
def test_a_setting_that_no_kernel_takes_is_refused(word, expected):
    with pytest.raises(UsageError) as refused:
        parse_settings([word])
    assert (
        refused.value.message
        == f"invalid queue setting {word!r}: expected {expected or ', '.join(SETTINGS)}"
    )


def test_the_timer_of_requests_is_set(fake, queue):
    set_timer(fake.devices, 0, 500)
    assert (queue / "io_timeout").read_text() == "500"


def test_a_timer_that_cannot_be_set_is_logged(fake, caplog):
    set_timer(fake.devices, 7, 500)
    assert "cannot set the timer of" in caplog.text
