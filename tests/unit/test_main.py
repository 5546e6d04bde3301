"""Which command lines are started in the background before they are read."""

from __future__ import annotations

import pytest

from rbdnbd.main import goes_to_the_background


@pytest.mark.parametrize(
    "line",
    [
        "map rbd/vol",
        "map",
        "attach --device /dev/nbd0",
        "map -c /etc/ceph/ceph.conf --id me rbd/vol@snap",
        "map --no-such-option",
    ],
)
def test_what_is_certain_to_be_waited_for_goes_to_the_background(line):
    assert goes_to_the_background(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "",
        "unmap rbd/vol",
        "list-mapped",
        "--help",
        "map --help",
        "map -h",
        "map -f rbd/vol",
        "map rbd/vol --foreground",
        "map --cookie --foreground rbd/vol",
        "map -fc /etc/ceph/ceph.conf rbd/vol",
        "map -c/etc/ceph/f.conf rbd/vol",
        "map -- -f",
    ],
)
def test_what_may_ask_for_something_else_is_read_first(line):
    """Seen to fail with -fc taken for a word like another."""
    assert not goes_to_the_background(line.split())
