"""Random commands against a model, random cuts of the stream, and garbage."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.client import (
    DISC,
    EINVAL,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    refusal,
)
from tests.support.memory import MemoryImage
from tests.support.polled import ENGINES, engine
from tests.support.serving import Pair, export_of

SIZE = 4096
REQUEST = struct.Struct(">IHHQQI")

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
offsets = st.integers(0, SIZE + 10) | st.integers(SIZE - 5, SIZE + 5) | u64
lengths = st.integers(0, 600) | st.integers(SIZE - 5, SIZE + 5)
commands = st.tuples(
    st.sampled_from([READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, WRITE, READ, 5, 77]),
    offsets,
    lengths,
    st.sampled_from([0, 0, 0, FUA, NO_HOLE, NO_HOLE | FUA, 4, 0x8000]),
    st.integers(1, 255),
)
Command = tuple[int, int, int, int, int]

each_engine = pytest.mark.parametrize("engine_name", ENGINES)


@contextmanager
def connected(engine_name: str, workers: int = 8) -> Iterator[tuple[Pair, MemoryImage]]:
    """Serve a small image over a socketpair."""
    image = MemoryImage(SIZE)
    ours, theirs = socket.socketpair()
    with RawClient(theirs) as client, engine(engine_name, image, workers) as connect:
        pair = Pair(connect(ours, export_of(image)), client)
        try:
            yield pair, image
        finally:  # also where hypothesis gives an example up
            theirs.close()
            pair.ended()


def pack(command: Command, cookie: int) -> bytes:
    """Write a request, with its payload if it is a write."""
    kind, offset, length, flags, byte = command
    header = REQUEST.pack(0x25609513, flags, kind, cookie, offset, length)
    return header + bytes([byte]) * (length if kind == WRITE else 0)


def model(data: bytearray, command: Command) -> tuple[int, bytes]:
    """Do a command to a model; return the error and the data it must be answered with."""
    kind, offset, length, flags, byte = command
    if (error := refusal(kind, offset, length, flags, len(data))) or kind == FLUSH:
        return error, b""
    if kind == READ:
        return 0, bytes(data[offset : offset + length])
    data[offset : offset + length] = bytes([byte if kind == WRITE else 0]) * length
    return 0, b""


@each_engine
@settings(deadline=None, max_examples=60)
@given(st.lists(commands, max_size=30))
def test_commands_one_after_the_other_do_what_they_do_to_a_bytearray(engine_name, sequence):
    data = bytearray(SIZE)
    with connected(engine_name) as (pair, image):
        for command in sequence:
            kind, offset, length, flags, byte = command
            payload = bytes([byte]) * length if kind == WRITE else b""
            found = pair.client.call(kind, offset, length, flags, payload)
            assert found == model(data, command), command
        assert image.read(0, SIZE) == data


@each_engine
@settings(deadline=None, max_examples=60)
@given(st.lists(commands, max_size=30), st.randoms(use_true_random=False), st.integers(1, 9))
def test_commands_cut_anywhere_and_all_in_flight_are_each_answered_as_alone(
    engine_name, sequence, randomly, workers
):
    """Each command has a lane of its own on the image, so that their order does not matter."""
    sequence = [
        (kind, offset if offset > SIZE else n * 100, length % 101 if offset <= SIZE else length, *x)
        for n, (kind, offset, length, *x) in enumerate(sequence)
    ]
    data = bytearray(range(256)) * (SIZE // 256)
    expected = {n: model(data, command) for n, command in enumerate(sequence)}
    stream = b"".join(pack(command, n) for n, command in enumerate(sequence))
    with connected(engine_name, workers) as (pair, image):
        image.write(0, bytes(range(256)) * (SIZE // 256))
        for piece in pieces(stream, randomly):
            pair.client.send(piece)
        found = {}
        for _ in sequence:
            cookie, error, answer = reply(pair.client, sequence)
            found[cookie] = (error, answer)
        assert found == expected
        assert image.read(0, SIZE) == data


def pieces(stream: bytes, randomly: random.Random) -> Iterator[bytes]:
    """Cut a stream at random places."""
    while stream:
        cut = randomly.choice([1, 3, 16, 27, 28, 29, 100, 1000])
        yield stream[:cut]
        stream = stream[cut:]


def reply(client: RawClient, sequence: list[Command]) -> tuple[int, int, bytes]:
    """Receive one reply to a request whose cookie is its place in the sequence."""
    magic, error, cookie = struct.unpack(">IIQ", client.receive(16))
    assert magic == 0x67446698
    kind, _, length, _, _ = sequence[cookie]
    return cookie, error, client.receive(length if kind == READ and not error else 0)


invalid = st.builds(
    REQUEST.pack,
    st.just(0x25609513),
    st.integers(4, 2**16 - 1),
    st.sampled_from([READ, FLUSH, TRIM, WRITE_ZEROES, 5, 7, 77, 0xFFFF]),
    u64,
    u64,
    u32,
)
broken = st.builds(
    REQUEST.pack, u32.filter(lambda magic: magic != 0x25609513), u16, u16, u64, u64, u32
)


@each_engine
@settings(deadline=None, max_examples=100)
@given(st.lists(invalid, max_size=10), broken | st.binary(max_size=27))
def test_invalid_requests_and_garbage_are_refused_and_leave_the_image_untouched(
    engine_name, requests, garbage
):
    with connected(engine_name) as (pair, image):
        pair.client.send(b"".join(requests) + garbage)
        pair.client.sock.shutdown(socket.SHUT_WR)
        for _ in requests:
            assert pair.client.reply()[1] == EINVAL
        assert pair.client.ended()
        assert image.calls == []


@each_engine
@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_end_the_connection_when_they_end(engine_name, data):
    """Bytes without the magic's first byte are no request, so they change nothing."""
    data = data.replace(b"\x25", b"\x00")
    with connected(engine_name) as (pair, image):
        pair.client.send(data)
        pair.client.sock.shutdown(socket.SHUT_WR)
        assert pair.client.ended()
        assert pair.ended()
        assert image.calls == []


@each_engine
@settings(deadline=None, max_examples=30)
@given(st.lists(commands, min_size=1, max_size=10), st.data())
def test_a_stream_that_ends_anywhere_ends_the_connection(engine_name, sequence, draw):
    stream = b"".join(pack(command, n) for n, command in enumerate(sequence))
    cut = draw.draw(st.integers(0, len(stream)))
    with connected(engine_name) as (pair, _):
        pair.client.send(stream[:cut])
        pair.client.sock.shutdown(socket.SHUT_WR)
        pair.client.take_all()
        assert pair.ended().startswith("the peer hung up")
        assert pair.connection.in_flight() == []


@each_engine
@settings(deadline=None, max_examples=30)
@given(st.lists(commands, max_size=10))
def test_a_goodbye_after_any_requests_answers_them_all(engine_name, sequence):
    with connected(engine_name) as (pair, _):
        for n, command in enumerate(sequence):
            pair.client.send(pack(command, n))
        pair.client.request(DISC)
        assert {reply(pair.client, sequence)[0] for _ in sequence} == set(range(len(sequence)))
        assert pair.client.ended()
        assert pair.ended() == ""
