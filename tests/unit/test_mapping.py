"""Whether librbd may answer writes from its cache, and what a successor makes of a record."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rbdnbd.attaching import _as_recorded, _connections
from rbdnbd.errors import RbdnbdError
from rbdnbd.holdings import without_cache
from rbdnbd.record import Ownership, Record, find
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions

ASKED_FOR = (("rbd_cache", "true"),)


@pytest.mark.parametrize(
    ("options", "settings", "cache"),
    [
        (MapOptions(), (), "false"),
        (MapOptions(io_timeout=5), (), "false"),
        (MapOptions(), ASKED_FOR, "true"),
        (MapOptions(reattach_timeout=0), (), None),
        (MapOptions(use_ioctl=True), (), None),
    ],
    ids=["as it comes", "timeout", "asked for", "nobody can succeed", "ioctl"],
)
def test_where_a_successor_may_come_the_cache_is_off_unless_asked_for(
    options: MapOptions, settings: tuple[tuple[str, str], ...], cache: str | None
) -> None:
    opened_with = without_cache(ClusterOptions(settings=settings), options).overrides()
    assert opened_with.get("rbd_cache") == cache


RECORD = Record(
    cookie="c",
    spec=ImageSpec("rbd", "", "vol"),
    image_id="10d4",
    address="",
    cluster=ClusterOptions(),
    options=asdict(MapOptions(connections=4, queue=(("nomerges", "1"), ("scheduler", "bfq")))),
)


def test_a_record_keeps_connections_and_settings_of_the_queue(tmp_path: Path) -> None:
    """Seen to fail with an `_as_recorded` that leaves the lists of JSON as they are."""
    Ownership("c", tmp_path).write(RECORD)
    _, _, options = _as_recorded(find("c", tmp_path), MapOptions(device="/dev/nbd0"))
    assert options.connections == 4
    assert options.queue == (("nomerges", "1"), ("scheduler", "bfq"))


def test_a_record_of_an_older_version_is_of_one_connection() -> None:
    older = {key: RECORD.options[key] for key in RECORD.options if key not in NEW}
    _, _, options = _as_recorded(replace(RECORD, options=older), MapOptions())
    assert (options.connections, options.queue) == (0, ())
    assert _connections(replace(RECORD, options=older), options) == 1


NEW = ("connections", "queue")


@pytest.mark.parametrize(("asked", "found"), [(0, 4), (4, 4)])
def test_a_device_keeps_the_number_of_its_connections(asked: int, found: int) -> None:
    assert _connections(RECORD, MapOptions(connections=asked)) == found


def test_another_number_of_connections_is_refused() -> None:
    with pytest.raises(RbdnbdError) as refused:
        _connections(RECORD, MapOptions(connections=2, device="/dev/nbd0"))
    assert refused.value.message == (
        "/dev/nbd0 was mapped with --connections 4, and keeps that number"
    )


def test_where_nothing_is_recorded_the_number_of_connections_is_what_is_said() -> None:
    assert _connections(None, MapOptions(connections=2)) == 2
    assert _connections(None, MapOptions()) == 1
