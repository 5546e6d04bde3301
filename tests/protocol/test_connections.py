"""Several connections as one mapping, with a test in the kernel's place."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from rbdnbd import connections as room
from rbdnbd.connections import Connections
from rbdnbd.errors import Busy
from rbdnbd.transmission import WORKERS
from tests.support.client import DISC, FLUSH, READ, WRITE, RawClient
from tests.support.memory import Gate, MemoryImage
from tests.support.polled import engine
from tests.support.serving import export_of
from tests.support.waiting import wait_until


class Kernel:
    """Whoever has the other ends: `clients` are those that were taken, `told` is the end."""

    def __init__(self, connections: Connections, stack: ExitStack) -> None:
        self.connections, self._stack = connections, stack
        self.clients: list[RawClient] = []
        self.alive = False
        self.refused = 0

    def take(self, offer: Callable[[], socket.socket]) -> None:
        """Take one more, unless the last server is thought to be alive."""
        sock = self._stack.enter_context(offer())
        if self.alive:
            sock.close()
            self.refused += 1
            raise Busy("still has a server")
        self.clients.append(RawClient(sock))


@pytest.fixture
def told() -> list[str]:
    """What was said of the end of all connections."""
    return []


@pytest.fixture
def mapped(
    image: MemoryImage, engine_name: str, stack: ExitStack, told: list[str]
) -> Iterator[Callable[..., Kernel]]:
    """Serve two connections of the image; those that are dropped are replaced if that is asked."""

    def mapped(*, replacing: bool = True) -> Kernel:
        connect = stack.enter_context(engine(engine_name, image))
        connections = stack.enter_context(
            Connections(connect, export_of(image), told.append, several=True)
        )
        kernel = Kernel(connections, stack)
        for _ in range(2):
            kernel.take(connections.offer)
        connections.attached(kernel.take if replacing else None)
        return kernel

    yield mapped


def test_figures_and_requests_in_flight_are_those_of_all(
    mapped: Callable[..., Kernel], image: MemoryImage
) -> None:
    """Seen to fail with sums that leave out all but the first."""
    kernel = mapped()
    for client in kernel.clients:
        client.write(0, bytes(512))
    image.hook = gate = Gate("read")
    for client in kernel.clients:
        client.request(READ, 0, 512)
    wait_until(lambda: len(kernel.connections.in_flight()) == 2, 5, "both are in flight")
    gate.open()
    assert all(client.reply()[1] == 0 for client in kernel.clients)
    kernel.clients[0].sock.close()
    wait_until(lambda: len(kernel.clients) == 3, 5, "it is replaced")
    figures = kernel.connections.stats().as_dict()
    assert [figures[name]["requests"] for name in ("read", "write")] == [2, 2]


def test_a_new_size_holds_on_all(mapped: Callable[..., Kernel], image: MemoryImage) -> None:
    """Seen to fail with a `resize` of the export alone."""
    kernel = mapped()
    kernel.connections.resize(4096)
    for client in kernel.clients:
        assert client.call(READ, 4096, 512)[0] != 0
        assert client.read(0, 512) == bytes(512)


def test_one_that_the_kernel_drops_is_replaced_and_the_other_goes_on(
    mapped: Callable[..., Kernel], told: list[str]
) -> None:
    """Seen to fail with a `_leave` and a `_watch` that replace nothing."""
    kernel = mapped()
    kernel.clients[0].sock.close()
    wait_until(lambda: len(kernel.clients) == 3, 5, "it is replaced")
    for client in kernel.clients[1:]:
        assert client.read(0, 512) == bytes(512)
    assert told == []


def test_all_that_the_kernel_drops_at_once_are_replaced(
    mapped: Callable[..., Kernel], image: MemoryImage, told: list[str]
) -> None:
    """Seen to fail with a `_replace` that does nothing."""
    kernel = mapped()
    image.hook = gate = Gate("read")
    for client in kernel.clients:
        client.request(READ, 0, 512)
    wait_until(lambda: gate.waiting == 2, 5, "requests that hang")
    for client in kernel.clients:
        client.sock.close()
    wait_until(lambda: len(kernel.clients) == 4, 5, "they are replaced")
    gate.open()
    for client in kernel.clients[2:]:
        assert client.read(0, 512) == bytes(512)
    assert told == []


def test_what_is_read_of_a_connection_that_was_dropped_is_not_performed(
    mapped: Callable[..., Kernel], image: MemoryImage
) -> None:
    """It was sent again elsewhere, and is out of date. Seen to fail, by threads, without that."""
    kernel = mapped()
    dropped, other = kernel.clients
    image.hook = gate = Gate("read")
    for _ in range(WORKERS):
        dropped.request(READ, 0, 512)
    wait_until(lambda: gate.waiting == WORKERS, 10, "no more is read")
    dropped.request(WRITE, 512, payload=b"o" * 512)
    dropped.sock.close()
    other.write(512, b"n" * 512)
    gate.open()
    wait_until(lambda: not kernel.connections.in_flight(), 10, "all that was read is done")
    wait_until(lambda: len(kernel.clients) == 3, 5, "it is replaced")
    assert other.read(512, 512) == b"n" * 512


def test_while_too_much_is_done_in_vain_a_replacement_is_not_read(
    mapped: Callable[..., Kernel], image: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail without `_wait_for_room`: it waits for a third request, and gets it."""
    monkeypatch.setattr(room, "WORKERS", 1)
    kernel = mapped()
    image.hook = gate = Gate("read")
    for _ in range(2):
        kernel.clients[0].request(READ, 0, 512)
    wait_until(lambda: gate.waiting == 2, 5, "requests that hang")
    kernel.clients[0].sock.close()
    wait_until(lambda: len(kernel.clients) == 3, 5, "it is replaced")
    again = kernel.clients[2].request(READ, 0, 512)
    kernel.clients[2].sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        kernel.clients[2].reply()
    assert (gate.most, len(kernel.connections.in_flight())) == (2, 2)
    kernel.clients[2].sock.settimeout(10)
    gate.open()
    assert kernel.clients[2].reply() == (again, 0, bytes(512))


def test_a_replacement_that_is_dropped_unread_is_replaced_and_never_read(
    mapped: Callable[..., Kernel], image: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail with a `_serve` that reads it all the same: three reads are counted."""
    monkeypatch.setattr(room, "WORKERS", 0)
    kernel = mapped()
    image.hook = gate = Gate("read")
    kernel.clients[0].request(READ, 0, 512)
    wait_until(lambda: gate.waiting == 1, 5, "a request that hangs")
    kernel.clients[0].sock.close()
    wait_until(lambda: len(kernel.clients) == 3, 5, "it is replaced")
    kernel.clients[2].request(READ, 0, 512)
    kernel.clients[2].sock.close()
    wait_until(lambda: len(kernel.clients) == 4, 5, "that is replaced, too")
    gate.open()
    assert kernel.clients[3].read(0, 512) == bytes(512)
    assert image.calls.count("read") == 2


def test_the_mapping_ends_with_the_last_connection(
    mapped: Callable[..., Kernel], told: list[str]
) -> None:
    """Seen to fail with a `_tell_if_over` that tells of every end."""
    kernel = mapped(replacing=False)
    kernel.clients[0].sock.close()
    assert kernel.clients[1].read(0, 512) == bytes(512)
    assert told == []
    kernel.clients[1].sock.close()
    wait_until(lambda: told == ["the peer hung up"], 5, "the end is told")


def test_a_goodbye_is_no_reason_to_offer_more(
    mapped: Callable[..., Kernel], told: list[str]
) -> None:
    """One of them had been dropped just before. Seen to fail without waiting for a goodbye."""
    kernel = mapped()
    kernel.clients[0].sock.close()
    kernel.clients[1].request(DISC)
    assert kernel.clients[1].ended()
    wait_until(lambda: told == [""], 5, "an orderly end")
    assert len(kernel.clients) == 2


def test_what_the_kernel_does_not_take_is_offered_anew_later(
    mapped: Callable[..., Kernel], image: MemoryImage, told: list[str]
) -> None:
    """Seen to fail with a `_replace` that does not look who was taken."""
    kernel = mapped()
    image.hook = gate = Gate("read")
    kernel.clients[0].request(READ, 0, 512)
    wait_until(lambda: gate.waiting == 1, 5, "a request that hangs")
    kernel.alive = True
    kernel.clients[0].sock.close()
    wait_until(lambda: kernel.refused > 0, 5, "an offer that is refused")
    wait_until(lambda: len(kernel.connections._all()) == 2, 5, "what was refused is gone")
    kernel.alive = False
    wait_until(lambda: len(kernel.clients) == 3, 5, "it is replaced after all")
    gate.open()
    assert kernel.clients[2].read(0, 512) == bytes(512)
    assert told == []


def test_what_was_sent_is_waited_for_and_what_comes_later_is_not(
    mapped: Callable[..., Kernel], image: MemoryImage
) -> None:
    """Seen to fail with an `answer_what_was_sent` that returns at once."""
    kernel = mapped()
    order: list[str] = []
    image.hook = lambda name, offset, length: order.append(name)
    kernel.clients[0].request(FLUSH)
    kernel.connections.answer_what_was_sent(5)
    order.append("waited")
    assert order == ["flush", "waited"]
    image.hook = gate = Gate("flush")
    kernel.clients[0].request(FLUSH)
    wait_until(lambda: gate.waiting == 1, 5, "a flush that hangs")
    kernel.connections.answer_what_was_sent(0.5)
    gate.open()
