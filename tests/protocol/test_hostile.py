"""Clients that nobody can trust, and one that works through all that they do."""

from __future__ import annotations

import logging
import os
import random
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rbdnbd.buffers import Buffers
from rbdnbd.distrust import Distrust
from rbdnbd.pressure import raise_file_limit
from tests.support.client import READ, WRITE, RawClient
from tests.support.memory import Gate, MemoryImage
from tests.support.serving import Door
from tests.support.waiting import wait_until

MIB = 1 << 20
SIZE = 64 * MIB
OURS = 4 * MIB
"""The range, at the image's beginning, that the client that works has for itself."""
FAST = 1 << 30
Serve = Callable[..., Door]


@pytest.fixture(autouse=True)
def files() -> None:
    """Both ends of a thousand connections are in this process."""
    raise_file_limit()


@pytest.fixture
def image() -> MemoryImage:
    return MemoryImage(SIZE)


@contextmanager
def working(door: Door) -> Iterator[list[int]]:
    """Have libnbd write and read for the time of a `with`, and at least 20 times in it.

    What it reads must be what it wrote. Yields a list that grows with every round.
    """
    client, over, rounds, wrong = door.libnbd(), threading.Event(), list[int](), list[str]()

    def work() -> None:
        noise = random.Random(5)
        try:
            while not over.is_set():
                length = noise.randrange(1, 256 << 10)
                offset, data = noise.randrange(OURS - length), noise.randbytes(length)
                client.pwrite(data, offset)
                if client.pread(length, offset) != data:
                    wrong.append(f"{length} bytes at {offset}")
                rounds.append(length)
        except Exception as error:
            wrong.append(repr(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield rounds
        begun = len(rounds)
        wait_until(lambda: wrong or len(rounds) > begun + 20, 20, "twenty rounds more")
    finally:
        over.set()
        thread.join(20)
    assert not thread.is_alive()
    assert wrong == []
    client.shutdown()


def untouched(image: MemoryImage) -> bool:
    """Tell whether nothing but the client that works has written."""
    return image.read(OURS, SIZE - OURS) == bytes(SIZE - OURS)


def resident() -> int:
    """Return this process's resident memory, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def header(command: int, offset: int, length: int, magic: int = 0x25609513) -> bytes:
    return struct.pack(">IHHQQI", magic, 0, command, 7, offset, length)


def ends(client: RawClient) -> bool:
    """Take what comes, and tell that the connection then ends."""
    client.take_all()
    return True


def test_garbage_ends_the_connections_that_it_comes_on_and_nothing_else(
    serve: Serve, image: MemoryImage
) -> None:
    """Seen to fail with a server that takes any magic."""
    door, noise = serve(image), random.Random(3)
    with working(door):
        for _ in range(50):
            greeted, going = door.connect(), door.client()
            greeted.receive(18)
            for client in (greeted, going):
                client.send(b"\xee" + noise.randbytes(noise.randrange(30, 2000)))
                assert ends(client)
    assert untouched(image)


@pytest.mark.parametrize(
    "begun",
    [
        header(READ, OURS, 4096)[:1],
        header(READ, OURS, 4096)[:27],
        header(WRITE, OURS, MIB),
        header(WRITE, OURS, MIB) + b"x" * (MIB - 1),
        header(WRITE, OURS, 2**32 - 1) + b"x" * 1000,
    ],
    ids=["a byte", "27 bytes", "no payload", "a byte short", "4 GiB"],
)
def test_half_a_request_is_hung_up_on_in_time_and_nothing_of_it_is_written(
    serve: Serve, image: MemoryImage, begun: bytes
) -> None:
    """Seen to fail with a listener that does not look for what is overdue."""
    limits = Distrust(seconds=0.3, bytes_a_second=1 << 40)
    door = serve(image, distrust=limits)
    with working(door):
        client = door.client()
        client.send(begun)
        assert ends(client)
    assert untouched(image)
    assert limits.used == 0


def test_a_request_that_comes_byte_by_byte_is_hung_up_on_in_time(
    serve: Serve, image: MemoryImage
) -> None:
    """Seen to fail without a limit, and with one that begins anew with every byte."""
    door = serve(image, distrust=Distrust(seconds=0.5, bytes_a_second=FAST))
    client = door.client()
    client.send(header(WRITE, OURS, MIB))
    client.sock.settimeout(0.05)

    def dribble() -> bool:
        try:
            client.send(b"x")
            return client.sock.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    with working(door):
        wait_until(dribble, 10, "the server hangs up")
    assert untouched(image)


def test_a_client_that_does_nothing_stays(serve: Serve, image: MemoryImage) -> None:
    """Seen to fail with requests that never count as ended."""
    door = serve(image, distrust=Distrust(seconds=0.1, bytes_a_second=FAST))
    with door.client() as patient:
        patient.write(OURS, b"data")
        late = door.client()
        late.send(header(READ, 0, 4)[:5])
        assert late.ended()
        assert patient.read(OURS, 4) == b"data"


def test_a_request_that_takes_the_image_long_is_waited_for(
    serve: Serve, image: MemoryImage
) -> None:
    """Seen to fail with requests that never count as ended."""
    gate = image.hook = Gate("write")
    door = serve(image, distrust=Distrust(seconds=0.1, bytes_a_second=FAST))
    slow, late = door.client(), door.client()
    sent = slow.request(WRITE, OURS, payload=b"data")
    wait_until(lambda: gate.waiting, 5, "the write")
    late.send(header(READ, 0, 4)[:5])
    assert late.ended()
    gate.open()
    assert slow.reply() == (sent, 0, b"")


def test_clients_that_do_not_take_their_replies_are_hung_up_on_and_hold_bounded_memory(
    serve: Serve, image: MemoryImage
) -> None:
    """Five of them ask for 2 GiB each.

    Seen to fail with memory that is not counted, and with a listener that does not look for what is
    overdue.
    """
    limits = Distrust(seconds=1.0, bytes_a_second=FAST, memory=96 * MIB)
    door = serve(image, distrust=limits)
    with working(door):
        before = most = resident()
        deaf = [door.client() for _ in range(5)]
        for client in deaf:
            for _ in range(64):
                client.request(READ, OURS, 32 * MIB)

        def all_over() -> bool:
            nonlocal most
            most = max(most, resident())
            return limits.most_used > 0 and limits.used == 0

        wait_until(all_over, 30, "the server hangs up on all of them")
        assert all(ends(client) for client in deaf)
    assert limits.most_used <= 96 * MIB
    assert most - before < (96 + 96) * MIB, f"{(most - before) // MIB} MiB more"


def test_payloads_that_do_not_come_hold_bounded_memory(serve: Serve, image: MemoryImage) -> None:
    """Seen to fail with memory that is not counted."""
    limits = Distrust(seconds=1.0, bytes_a_second=FAST, memory=96 * MIB)
    door = serve(image, distrust=limits)
    with working(door):
        before = resident()
        clients = [door.client() for _ in range(6)]
        for client in clients:
            client.send(header(WRITE, OURS, 32 * MIB) + b"x" * 1000)
        wait_until(lambda: limits.used > 64 * MIB, 10, "the memory to be taken")
        assert resident() - before < (96 + 64) * MIB
        assert all(ends(client) for client in clients)
    assert limits.most_used <= 96 * MIB
    assert untouched(image)
    assert limits.used == 0


def test_a_client_waits_for_memory_that_others_hold_and_then_gets_it(
    serve: Serve, image: MemoryImage
) -> None:
    """Seen to fail with memory that is given back without waking whoever waits for it."""
    gate = image.hook = Gate("read")
    door = serve(image, distrust=Distrust(memory=8 * MIB, own=4096))
    rich, poor = door.client(), door.client()
    rich.request(READ, 0, 8 * MIB)
    wait_until(lambda: gate.waiting == 1, 5, "the first read")
    sent = poor.request(READ, OURS, MIB)
    small = door.client()
    small.write(0, b"y" * 4096)
    assert gate.waiting == 1
    gate.open()
    assert rich.reply()[1] == 0
    assert poor.reply() == (sent, 0, bytes(MIB))


def test_stopping_does_not_wait_for_a_client_that_waits_for_memory(
    serve: Serve, image: MemoryImage
) -> None:
    """Seen to fail with a wait that stopping does not end."""
    limits = Distrust(memory=MIB, own=4096)
    door = serve(image, distrust=limits)
    client = door.client()
    client.request(READ, 0, 32 * MIB)
    wait_until(lambda: limits.waiting, 5, "a request for which there is no memory")
    door.listener.stop(5)
    assert client.ended()


def test_a_thousand_silent_connections_keep_nobody_out_and_are_hung_up_on(
    serve: Serve, image: MemoryImage
) -> None:
    """Seen to fail with 128 places, and with a handshake that may take for ever."""
    door = serve(image, "tcp", handshake_seconds=3.0)
    with working(door):
        silent = [door.connect() for _ in range(1000)]
        with door.client() as late:
            assert late.read(OURS, 4) == bytes(4)
        assert all(ends(client) for client in silent)
    assert untouched(image)


def test_a_thousand_connections_with_requests_share_the_threads(
    serve: Serve, image: MemoryImage, engine_name: str
) -> None:
    """Seen to fail with workers that are not counted."""
    gate = image.hook = Gate("read")
    door = serve(image, distrust=Distrust(workers=100))
    clients = [door.client() for _ in range(200)]
    try:
        for client in clients:
            for _ in range(16):
                client.request(READ, OURS, 512)
        wait_until(lambda: gate.waiting >= 200, 20, "a read of each")
        workers = [each for each in threading.enumerate() if each.name.startswith("nbd-")]
        counted = [each for each in workers if each.name[4:].isdecimal()]
        assert len(counted) == (100 if engine_name == "threads" else 0)
    finally:
        gate.open()
    for client in clients:
        assert {client.reply()[1] for _ in range(16)} == {0}


def test_clients_that_disappear_in_mid_write_leave_nothing_behind(
    serve: Serve, image: MemoryImage
) -> None:
    """Seen to fail with an account that a connection's end does not settle."""
    limits, noise = Distrust(), random.Random(11)
    door = serve(image, "tcp", distrust=limits)
    with working(door):
        for _ in range(100):
            client = door.client()
            client.send(header(WRITE, OURS, 32 * MIB) + bytes(noise.randrange(100_000)))
            if noise.randrange(2):
                linger = struct.pack("ii", 1, 0)
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.sock.close()
    wait_until(lambda: limits.used == 0, 10, "all memory to be given back")
    assert untouched(image)


def test_requests_of_ever_other_sizes_leave_no_memory_behind() -> None:
    """Seen to fail with buffers that remember every size."""
    buffers = Buffers()
    tracemalloc.start()
    try:
        for length in range(1, 20_000):
            buffers.give_back(buffers.take(length))
            buffers.take(length)
        assert tracemalloc.get_traced_memory()[0] < 128 << 10
    finally:
        tracemalloc.stop()


def test_that_further_clients_have_to_wait_is_said_once(
    serve: Serve, image: MemoryImage, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail with a line for each client that waits."""
    caplog.set_level(logging.WARNING)
    door = serve(image, clients=1, handshake_seconds=0.1)
    clients = [door.connect() for _ in range(10)]
    assert all(ends(client) for client in clients)
    assert caplog.messages == ["1 clients are connected: further ones have to wait"]


def test_clients_that_come_again_and_again_fill_no_log(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail with a line for each."""
    caplog.set_level(logging.INFO)
    door = serve(MemoryImage(512))
    for _ in range(100):
        client = door.connect()
        client.send(bytes(100))
        assert ends(client)
    door.listener.stop(1)
    assert len(caplog.messages) == 30
    assert set(caplog.messages) == {
        "a client did not get through the handshake: expected option magic 0x49484156454f5054, "
        "got 0x0"
    }
