"""The event loop: what it does when it breaks, and with its memory."""

from __future__ import annotations

import socket

import pytest

from rbdnbd.buffers import KEPT_BYTES, Buffers
from rbdnbd.events import EventConnection
from rbdnbd.loop import Loop
from tests.support.client import READ, RawClient
from tests.support.memory import MemoryImage
from tests.support.polled import polled
from tests.support.serving import Pair, export_of


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_breaks_ends_all_its_connections_and_those_that_come_later(monkeypatch, stack):
    image = MemoryImage(4096)
    pollable = stack.enter_context(polled(image))
    loop = stack.enter_context(Loop(pollable))
    monkeypatch.setattr(pollable, "finished", lambda: 1 // 0)

    def connect() -> Pair:
        ours, theirs = socket.socketpair()
        client = stack.enter_context(RawClient(theirs))
        return Pair(EventConnection(loop, ours, export_of(image)), client)

    pairs = [connect(), connect()]
    pairs[1].client.request(READ, 0, 512)
    for pair in (*pairs, connect()):
        assert pair.ended().startswith("the event loop has failed: ZeroDivisionError")


def test_a_loop_that_ends_takes_its_connections_along(stack):
    image = MemoryImage(4096)
    ours, theirs = socket.socketpair()
    client = stack.enter_context(RawClient(theirs))
    with polled(image) as pollable, Loop(pollable) as loop:
        pair = Pair(EventConnection(loop, ours, export_of(image)), client)
        assert client.read(0, 512) == bytes(512)
    assert pair.ended() == "the event loop has ended"


def test_a_request_that_waits_for_room_is_taken_when_a_full_socket_has_room_a_moment_later(
    monkeypatch, stack
):
    """A device hung for ever. Seen to fail with replies sent once more behind the last look."""
    image = MemoryImage(4096)
    ours, theirs = socket.socketpair()
    client = stack.enter_context(RawClient(theirs))
    loop = stack.enter_context(Loop(stack.enter_context(polled(image))))
    connection = EventConnection(loop, ours, export_of(image), limit=1)
    send, full = connection._replies.send, iter([True])
    monkeypatch.setattr(connection._replies, "send", lambda: next(full, False) or send())
    cookies = [client.request(READ, 0, 512), client.request(READ, 512, 512)]
    Pair(connection, client)
    assert [client.reply()[0] for _ in cookies] == cookies


def test_a_buffer_is_used_again_for_a_request_of_its_size():
    buffers = Buffers()
    first = buffers.take(4096)
    buffers.give_back(first)
    assert buffers.take(512) is not first
    assert buffers.take(4096) is first


def test_no_more_is_kept_than_the_limit():
    buffers = Buffers()
    for _ in range(5):
        buffers.give_back(bytearray(KEPT_BYTES // 4))
    assert buffers.kept == KEPT_BYTES
    buffers.clear()
    assert buffers.kept == 0
    assert buffers.take(KEPT_BYTES // 4) == bytes(KEPT_BYTES // 4)
