"""What is fuzzed: each target takes any bytes, and raises if the server does wrong with them.

Nothing here needs atheris: the corpus is replayed by tests/protocol/test_corpus.py.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any, Final, cast

from rbdnbd.distrust import Distrust
from rbdnbd.events import EventConnection
from rbdnbd.handshake import MAX_OPTION, negotiate
from rbdnbd.loop import Loop, Operation
from rbdnbd.server import Connection
from rbdnbd.wire import Export, ProtocolError, transmission_flags
from tests.fuzz import model
from tests.fuzz.socket import MemorySocket

NAME: Final = "rbd/image"
_TURNS: Final = 1000


def handshake(data: bytes) -> None:
    """Negotiate with a client that sends these bytes and then hangs up."""
    export = Export(NAME, model.SIZE, transmission_flags(read_only=False))
    conversation = negotiate(export)
    left, sent, answer = data, bytearray(), b""
    try:
        step = next(conversation)
        while True:
            if isinstance(step, bytes):
                sent += step
                answer = b""
            else:
                assert 0 < step <= MAX_OPTION, f"asks for {step} bytes"
                if len(left) < step:
                    return
                answer, left = left[:step], left[step:]
            step = conversation.send(answer)
    except ProtocolError:
        return
    except StopIteration as end:
        _check_negotiated(data[: len(data) - len(left)], bytes(sent), bool(end.value))


def _check_negotiated(heard: bytes, sent: bytes, begins: bool) -> None:
    """Hold what was negotiated against the specification, option by option."""
    options, position = [], 4
    while position < len(heard):
        magic, option, length = struct.unpack_from(">QII", heard, position)
        assert magic == 0x49484156454F5054
        options.append((option, heard[position + 16 : position + 16 + length]))
        position += 16 + length
    assert position == len(heard)
    last, data = options[-1]
    assert begins == (last in (1, 7)), f"option {last} ended it"
    assert all(option not in (1, 2) for option, _ in options[:-1]), "went on after the end"
    if last == 7:
        data = data[4 : 4 + int.from_bytes(data[:4], "big")]
    assert last == 2 or data in (b"", NAME.encode()), f"export {data!r}"
    assert sent.startswith(b"NBDMAGICIHAVEOPT\0\3")
    _check_replies(sent[18:], [option for option, _ in options], heard)


def _check_replies(sent: bytes, options: list[int], heard: bytes) -> None:
    for option in options:
        if option == 1:
            zeroes = 0 if heard[3] & 2 else 124
            size = struct.pack(">QH", model.SIZE, transmission_flags(read_only=False))
            assert sent == size + bytes(zeroes)
            return
        kind = 2
        while kind in (2, 3):
            magic, of, kind, length = struct.unpack_from(">QIII", sent)
            assert (magic, of) == (0x3E889045565A9, option)
            sent = sent[20 + length :]
    assert sent == b""


def transmission(data: bytes) -> None:
    """Serve a client with each engine; their replies and their images must be the model's.

    The first two bytes choose how; what follows is the stream itself, or a script of requests.
    """
    if len(data) < 2:
        return
    how, piece = data[0], 1 + data[1]
    stream = data[2:] if how & 1 else requests(data[2:])
    read_only = bool(how & 2)
    replies, early, expected = model.answer(stream, read_only=read_only)
    export = Export(NAME, model.SIZE, transmission_flags(read_only=read_only))
    for serve in (by_threads, by_events):
        limits = Distrust()
        sock = MemorySocket(stream, piece, 7 * piece if how & 4 else None)
        image = serve(sock, export, limits)
        model.check(bytes(sock.sent), replies, early)
        assert image == expected, f"the image, written {serve.__name__}"
        assert limits.used == 0, "memory that was not given back"


def requests(script: bytes) -> bytes:
    """Write the requests that a script of six bytes each stands for, most of them legal."""
    stream = bytearray()
    for at in range(0, len(script) - 5, 6):
        kind, flags, cookie, start, length, scale = script[at : at + 6]
        offset = start << (scale & 7)
        count = length << (scale >> 3 & 7)
        if scale == 255:
            count |= 0xFFFF0000
        magic = 0x25609513 if kind != 255 else kind
        command = kind % 8
        stream += struct.pack(">IHHQQI", magic, flags % 4, command, cookie, offset, count)
        if command == model.WRITE:
            stream += bytes([cookie]) * min(count, model.SIZE + 1)
    return bytes(stream)


def by_threads(sock: MemorySocket, export: Export, limits: Distrust) -> bytes:
    """Serve with one worker, which is this thread."""
    image = _Image()
    connection = Connection(cast("Any", sock), image, export, workers=1)
    connection.distrust(limits)
    sock.unlimited()
    connection.serve()
    return bytes(image.data)


def by_events(sock: MemorySocket, export: Export, limits: Distrust) -> bytes:
    """Serve as the loop does, whose thread is this one."""
    polled = _PolledImage()
    loop = _loop()
    loop.image = polled
    connection = EventConnection(loop, cast("Any", sock), export)
    connection.distrust(limits)
    for _ in range(_TURNS):
        sock.turn()
        if connection.proceed(True, 0.0) is None:
            connection.leave()
            connection.serve()
            loop._new.clear()  # serve has added it, and no thread takes it
            return bytes(polled.image.data)
        for operation, result in polled.finished():
            operation.finish(result, 0.0)
    raise AssertionError("the connection does not end")


_LOOPS: list[Loop] = []


def _loop() -> Loop:
    """Return the one loop, which no thread runs."""
    if not _LOOPS:
        _LOOPS.append(Loop(_PolledImage()))
    return _LOOPS[0]


class _Image:
    """An image that is broken in one place."""

    def __init__(self) -> None:
        self.data = bytearray(range(256)) * (model.SIZE // 256)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._range(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        self._range(offset, len(data))
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        self.write(offset, bytes(length))

    def _range(self, offset: int, length: int) -> bytearray:
        assert length and offset + length <= len(self.data), "past the end of the image"
        if offset == model.BROKEN:
            raise OSError(errno.EIO, "broken")
        return self.data[offset : offset + length]


class _PolledImage:
    """The same, whose requests are done when they are started, and found finished later."""

    def __init__(self) -> None:
        self.image = _Image()
        self._finished: list[tuple[Operation, int | Exception]] = []

    def fileno(self) -> int:
        return -1

    def start_read(self, operation: Operation, offset: int, buffer: bytearray) -> None:
        def read() -> int:
            buffer[:] = self.image.read(offset, len(buffer))
            return len(buffer)

        self._finish(operation, read)

    def start_write(self, operation: Operation, offset: int, data: bytes | bytearray) -> None:
        self._finish(operation, lambda: self.image.write(offset, bytes(data)))

    def start_flush(self, operation: Operation) -> None:
        self._finish(operation, self.image.flush)

    def start_discard(self, operation: Operation, offset: int, length: int) -> None:
        self._finish(operation, lambda: self.image.discard(offset, length))

    def start_write_zeroes(
        self, operation: Operation, offset: int, length: int, *, no_hole: bool
    ) -> None:
        self._finish(operation, lambda: self.image.write_zeroes(offset, length, no_hole=no_hole))

    def finished(self) -> list[tuple[Operation, int | Exception]]:
        finished, self._finished = self._finished, []
        return finished

    def _finish(self, operation: Operation, perform: Callable[[], int | None]) -> None:
        result: int | Exception
        try:
            result = perform() or 0
        except OSError as error:
            result = error
        self._finished.append((operation, result))


TARGETS: Final = {"handshake": handshake, "transmission": transmission}
