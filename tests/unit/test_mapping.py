"""Whether librbd may answer writes from its cache."""

from __future__ import annotations

import pytest

from rbdnbd.holdings import without_cache
from rbdnbd.spec import ClusterOptions, MapOptions

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
