"""As many requests are performed at once as are in flight, up to the limit, by either engine."""

from __future__ import annotations

import socket
import threading
import tracemalloc

import pytest

from tests.support.client import DISC, FLUSH, READ, WRITE, RawClient
from tests.support.memory import Gate, MemoryImage
from tests.support.polled import engine
from tests.support.serving import Pair, export_of
from tests.support.waiting import wait_until

MIB = 1 << 20


THREADS = pytest.mark.parametrize("engine_name", ["threads"])
EVENTS = pytest.mark.parametrize("engine_name", ["events"])


def workers() -> int:
    """Count the threads that a connection has started beside the one that called `serve`."""
    return sum(thread.name.startswith("nbd-") for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 2, 32, 128])
def test_as_many_requests_are_performed_at_once_as_are_in_flight(connect, image, depth):
    gate = image.hook = Gate("read")
    client = connect(image).client
    sent = {client.request(READ, 0, 512) for _ in range(depth)}
    wait_until(lambda: gate.waiting == depth, 10, f"{depth} reads at once")
    gate.open()
    assert {client.reply()[0] for _ in range(depth)} == sent


def test_no_more_requests_are_performed_at_once_than_the_limit(connect, image):
    gate = image.hook = Gate("read")
    client = connect(image, workers=4).client
    sent = {client.request(READ, 0, 512) for _ in range(20)}
    wait_until(lambda: gate.waiting == 4, 5, "four reads at once")
    gate.open()
    assert {client.reply()[0] for _ in range(20)} == sent
    assert gate.most == 4


@THREADS
def test_no_more_workers_are_started_than_the_limit(connect, image):
    gate = image.hook = Gate("read")
    client = connect(image, workers=4).client
    sent = {client.request(READ, 0, 512) for _ in range(20)}
    wait_until(lambda: gate.waiting == 4, 5, "four reads at once")
    assert workers() == 3
    gate.open()
    assert {client.reply()[0] for _ in range(20)} == sent
    assert workers() == 3


@EVENTS
def test_the_loop_is_one_thread_however_many_requests_are_in_flight(connect, image):
    gate = image.hook = Gate("read")
    client = connect(image).client
    for _ in range(64):
        client.request(READ, 0, 512)
    wait_until(lambda: gate.waiting == 64, 5, "64 reads at once")
    assert workers() == 1
    gate.open()
    for _ in range(64):
        client.reply()


@THREADS
def test_one_worker_serves_one_request_after_the_other(connect, image):
    client = connect(image, workers=1).client
    sent = [client.request(READ, 0, 512) for _ in range(20)]
    assert [client.reply()[0] for _ in sent] == sent
    assert workers() == 0


@THREADS
def test_workers_are_started_on_demand_and_used_again(connect, image):
    client = connect(image).client
    for _ in range(200):
        client.read(0, 512)
    assert workers() <= 2


@THREADS
def test_a_burst_needs_no_new_workers_after_another_one(connect, image):
    client = connect(image).client
    for _ in range(5):
        gate = image.hook = Gate("read")
        for _ in range(8):
            client.request(READ, 0, 512)
        wait_until(lambda gate=gate: gate.waiting == 8, 5, "eight reads at once")
        gate.open()
        for _ in range(8):
            client.reply()
    assert workers() <= 9


def test_a_slow_request_does_not_hold_up_the_ones_after_it(connect, image):
    gate = image.hook = Gate("write")
    client = connect(image).client
    slow = client.request(WRITE, 0, payload=b"slow")
    for _ in range(10):
        assert client.call(READ, 0, 4) == (0, bytes(4))
    gate.open()
    assert client.reply() == (slow, 0, b"")


@THREADS
def test_replies_that_are_ready_while_another_is_being_sent_leave_in_one_call(
    image, stack, engine_name
):
    calls: list[int] = []
    sending = threading.Event()

    class Slow(socket.socket):
        """Holds up the first reply."""

        def sendmsg(self, buffers: list[bytes]) -> int:
            calls.append(len(buffers))
            if len(calls) == 1:
                assert sending.wait(10)
            return super().sendmsg(buffers)

    ours, theirs = socket.socketpair()
    client = stack.enter_context(RawClient(theirs))
    connect = stack.enter_context(engine(engine_name, image, workers=2))
    pair = Pair(connect(Slow(fileno=ours.detach()), export_of(image)), client)
    stack.callback(pair.ended)
    sent = [client.request(FLUSH)]
    wait_until(lambda: calls, 5, "the first reply")
    sent += [client.request(READ, 0, 4) for _ in range(2)]  # for the one worker that is left
    wait_until(lambda: len(pair.connection._unsent) == 2, 5, "two replies that are ready")
    sending.set()
    assert [client.reply()[0] for _ in sent] == sent
    assert calls == [1, 4]
    client.request(DISC)


@THREADS
def test_no_worker_is_left_when_the_connection_has_ended(connect, image):
    pair = connect(image)
    gate = image.hook = Gate("read")
    for _ in range(16):
        pair.client.request(READ, 0, 512)
    wait_until(lambda: gate.waiting == 16, 5, "sixteen reads")
    gate.open()
    pair.client.request(DISC)
    pair.ended()
    assert workers() == 0


@THREADS
def test_a_connection_goes_on_with_the_workers_it_has_when_no_more_can_be_started(
    connect, image, monkeypatch
):
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    client = connect(image).client
    monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(5):
        assert client.read(0, 4) == bytes(4)


def test_no_data_is_kept_of_requests_that_are_answered_when_there_are_no_more(connect):
    image = MemoryImage(8 * MIB)
    gate = image.hook = Gate("read", "write")
    client = connect(image).client
    tracemalloc.start()
    try:
        for _ in range(4):
            client.request(READ, 0, 8 * MIB)
            client.request(WRITE, 0, payload=bytes(8 * MIB))
        wait_until(lambda: gate.waiting == 8, 10, "eight requests at once")
        gate.open()
        for _ in range(8):
            client.reply()
        wait_until(lambda: tracemalloc.get_traced_memory()[0] < MIB, 10, "all buffers to be gone")
    finally:
        tracemalloc.stop()
