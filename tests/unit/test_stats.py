"""Counters and latency buckets, and their sums."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbdnbd.stats import BUCKETS, Stats, total
from rbdnbd.wire import CMD_DISC, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES

COMMANDS = (CMD_READ, CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES)
records = st.tuples(
    st.sampled_from(COMMANDS), st.integers(0, 2**32), st.integers(0, 10**4), st.sampled_from([0, 5])
)

patient = settings(deadline=None)


def recorded(*of: tuple[int, int, float, int]) -> Stats:
    stats = Stats()
    for each in of:
        stats.record(*each)
    return stats


def bucket(seconds: float) -> int:
    latency = recorded((CMD_READ, 1, seconds, 0)).as_dict()["read"]["latency_log2_us"]
    assert sum(latency) == 1
    return latency.index(1)


def test_a_command_that_was_never_seen_has_zeroes():
    assert Stats().as_dict()["trim"] == {
        "requests": 0,
        "errors": 0,
        "bytes": 0,
        "seconds": 0,
        "latency_log2_us": [],
    }


def test_an_answered_request_is_counted_with_its_bytes_and_seconds():
    read = recorded((CMD_READ, 4096, 0.25, 0), (CMD_READ, 512, 0.5, 0)).as_dict()["read"]
    assert (read["requests"], read["errors"], read["bytes"]) == (2, 0, 4608)
    assert read["seconds"] == 0.75


def test_a_failed_request_is_counted_without_its_bytes():
    write = recorded((CMD_WRITE, 4096, 0.25, 28)).as_dict()["write"]
    assert (write["requests"], write["errors"], write["bytes"]) == (1, 1, 0)


def test_commands_are_counted_apart():
    figures = recorded(*((command, 1, 0.0, 0) for command in COMMANDS)).as_dict()
    assert {name: each["requests"] for name, each in figures.items()} == dict.fromkeys(
        ("read", "write", "flush", "trim", "write_zeroes"), 1
    )


def test_an_unknown_command_is_not_counted():
    assert recorded((77, 1, 0.0, 22), (CMD_DISC, 1, 0.0, 0)).as_dict() == Stats().as_dict()


@pytest.mark.parametrize(
    ("microseconds", "expected"), [(0.5, 0), (1, 1), (1.9, 1), (2, 2), (3.9, 2), (4, 3), (1000, 10)]
)
def test_a_bucket_holds_latencies_below_its_power_of_two(microseconds, expected):
    assert bucket((microseconds + 0.01) / 1e6) == expected


def test_the_last_bucket_takes_whatever_is_slower():
    assert bucket(1e9) == BUCKETS - 1


@patient
@given(st.lists(records), st.lists(records))
def test_the_total_is_what_one_connection_would_have_counted(ours, theirs):
    assert total([recorded(*ours), recorded(*theirs)]).as_dict() == (
        recorded(*ours, *theirs).as_dict()
    )


def test_adding_leaves_the_other_figures_alone():
    other = recorded((CMD_READ, 1, 0.5, 0))
    before = other.as_dict()
    total([other]).record(CMD_READ, 1, 0.5, 0)
    assert other.as_dict() == before


def test_the_figures_are_json():
    figures = recorded((CMD_READ, 4096, 0.25, 0)).as_dict()
    assert json.loads(json.dumps(figures)) == figures
