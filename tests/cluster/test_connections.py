"""A flush on one of several connections, and what another reader of the image finds then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import pytest

from rbdnbd.connections import Connections
from rbdnbd.engines import engine
from rbdnbd.opening import open_image
from rbdnbd.spec import ClusterOptions, ImageSpec
from rbdnbd.wire import Export, transmission_flags
from tests.support.client import FLUSH, RawClient
from tests.support.opening import opened

CACHED = (
    ("rbd_cache", "true"),
    ("rbd_cache_policy", "writeback"),
    ("rbd_cache_writethrough_until_flush", "false"),
)
BLOCK = 64 << 10


@pytest.mark.parametrize("name", ["threads", "events"])
def test_a_flush_on_one_connection_covers_what_was_written_on_the_others(
    name: str, image: Callable[..., str], options: ClusterOptions
) -> None:
    """librbd's cache holds what is written, and all connections have one image.

    Seen to fail, with either engine, without the flush: the reader finds zeroes.
    """
    spec = image("16M")
    with ExitStack() as stack:
        served = stack.enter_context(
            open_image(
                ImageSpec.parse(spec),
                replace(options, settings=CACHED),
                read_only=False,
                say=lambda doing: None,
                polled=name == "events",
            )
        )
        export = Export(spec, 16 << 20, transmission_flags(read_only=False, multi_conn=True))
        connect = stack.enter_context(engine(served, None))
        connections = stack.enter_context(
            Connections(connect, export, lambda reason: None, several=True)
        )
        clients = [stack.enter_context(RawClient(connections.offer())) for _ in range(3)]
        connections.attached(None)
        with opened(spec, options, read_only=True) as reader:
            for number, client in enumerate(clients):
                client.write(number * BLOCK, bytes([number + 1]) * BLOCK)
            assert clients[2].call(FLUSH) == (0, b"")
            for number in range(3):
                assert reader.read(number * BLOCK, BLOCK) == bytes([number + 1]) * BLOCK
