"""Random commands in flight on two connections against a bytearray, and an image out of order.

The image holds every call until the test lets it go, so that the test knows in which order they had
their effect, and the model has exactly one right answer for each, though replies come in any order.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from rbdnbd.trace import tracing
from rbdnbd.transmission import of_one_image
from rbdnbd.wire import Export, transmission_flags
from tests.support.client import (
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
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
from tests.support.held import Call, HeldImage, Key
from tests.support.polled import ENGINES, engine
from tests.support.serving import Pair
from tests.support.trace import dump

SIZE = 128 << 10
LIMIT = 3  # requests of a connection that are performed at once
UNTAKEN = 2  # requests of a connection that wait for their turn: they fit into the socket
NAMES = {READ: "read", WRITE: "write", TRIM: "discard", WRITE_ZEROES: "write_zeroes"}
ERRORS = {0: 0, errno.EIO: EIO, errno.EDQUOT: ENOSPC}

offsets = st.sampled_from([0, 0, 1, 511, 4096, 40_000, SIZE - 600])
lengths = st.sampled_from([1, 512, 512, 40_000, 40_000])
writes = st.tuples(
    st.sampled_from([WRITE, WRITE, TRIM, WRITE_ZEROES]),
    *(offsets, lengths, st.sampled_from([0, FUA, FUA])),
)
reads = st.tuples(st.just(READ), offsets, lengths, st.just(0))
anything = st.tuples(
    st.sampled_from([READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, 5]),
    st.sampled_from([0, SIZE - 1, SIZE, 2**64 - 1]),
    st.sampled_from([0, 1, 40_000]),
    st.sampled_from([0, FUA, NO_HOLE, NO_HOLE | FUA, 0x8000]),
)
commands = writes | writes | reads | st.just((FLUSH, 0, 0, 0)) | anything
bursts = st.lists(st.tuples(st.sampled_from([0, 1]), commands), min_size=1, max_size=4)
picks = st.lists(st.integers(0, 2 * LIMIT - 1), min_size=1, max_size=4)
sizes = st.sampled_from([None, None, SIZE, SIZE, 4096, 40_100])
failures = st.sampled_from([0, 0, 0, 0, errno.EIO, errno.EDQUOT])
Answer = tuple[str, int, int]


@dataclass(eq=False)
class Asked:
    """A request that has been sent, and the calls that the image has yet to do for it."""

    kind: int
    offset: int
    length: int
    flags: int
    cookie: int
    calls: list[Key] = field(init=False)

    def __post_init__(self) -> None:
        self.payload = bytes([self.cookie % 255 + 1]) * (self.length if self.kind == WRITE else 0)
        name = NAMES.get(self.kind, "")
        if self.kind == WRITE_ZEROES and self.flags & NO_HOLE:
            name += "_no_hole"
        self.calls = [Key(name, self.offset, self.length, self.payload)]
        if self.kind == FLUSH:
            self.calls = [Key("flush")]
        elif self.kind != READ and self.flags & FUA:
            self.calls.append(Key("flush"))

    def answer(self, error: int, data: bytes) -> Answer:
        """Describe an answer to this request, or to another that asks the image the same."""
        return str(self.calls[0]), error, zlib.crc32(data)


class Client:
    """One connection: what it has asked, in the order in which the server takes it."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.asked: dict[int, Asked] = {}
        self.untaken: list[Asked] = []
        self.taken: list[Asked] = []


class Interleaved(RuleBasedStateMachine):
    """Two clients of one image; after each step all has happened that can without another one."""

    def __init__(self, engine_name: str) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.path = Path(self.stack.enter_context(TemporaryDirectory())) / "trace"
        trace = self.stack.enter_context(tracing(str(self.path), with_data=True))
        self.image, self.model = HeldImage(SIZE), bytearray(SIZE)
        connect = of_one_image(
            self.stack.enter_context(engine(engine_name, self.image, LIMIT)), trace
        )
        self.clients = []
        for _ in range(2):
            ours, theirs = socket.socketpair()
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SIZE * 4)
            client = self.stack.enter_context(RawClient(theirs))
            flags = transmission_flags(read_only=False, multi_conn=True)
            pair = Pair(connect(ours, Export("model", SIZE, flags)), client)
            self.stack.callback(pair.ended)
            self.stack.callback(pair.connection.abort)
            self.clients.append(Client(pair))
        self.stack.callback(self.image.open)
        self.cookies = 0
        self.sound = True

    @rule(burst=bursts)
    def send(self, burst: list[tuple[int, tuple[int, int, int, int]]]) -> None:
        """Send requests and wait for no reply to them."""
        self.sound = False
        for index, command in burst:
            client = self.clients[index]
            asked = Asked(*command, self.cookies + 1)
            if len(client.untaken) < UNTAKEN and not self._like(asked):
                self.cookies += 1
                client.untaken.append(asked)
                client.asked[asked.cookie] = asked
                client.pair.client.request(*command, asked.payload, asked.cookie)
        self._settle(Counter())

    @rule(picked=picks, size=sizes, fail=failures)
    def let_go(self, picked: list[int], size: int | None, fail: int) -> None:
        """Let the image do some of what it was asked, and resize it before it tells."""
        self.sound = False
        held = self.image.wait_for(len(self._taken()))
        calls = list({held[pick % len(held)]: None for pick in picked if held})
        expected = Counter[Answer]()
        for call in calls:
            expected.update(self._perform(call, fail))
            fail = 0
        if size is not None:
            self.image.resize(size)
            self.model = self.model[:size].ljust(size, b"\0")
            for client in self.clients:
                client.pair.connection.resize(size)
        for call in calls:
            call.gone.set()
        self._settle(expected)

    def teardown(self) -> None:
        """Let go of all that is left, and say goodbye; show the trace of what has failed."""
        try:
            while self.sound and self._taken():
                self.let_go([0], None, 0)
            if self.sound:
                self.sound = False
                assert self.image.data == self.model
                for client in self.clients:
                    client.pair.client.request(DISC)
                    assert client.pair.ended() == ""
                self.sound = True
        finally:
            if not self.sound:
                note(dump(self.path))
            self.stack.close()

    def _taken(self) -> list[Asked]:
        return [asked for client in self.clients for asked in client.taken]

    def _like(self, asked: Asked) -> bool:
        """Tell whether it could be mistaken for another in flight, where one of them goes on."""
        others = [*self._taken(), *(each for client in self.clients for each in client.untaken)]
        return any(
            each.calls[0] == asked.calls[0] and len(each.calls) + len(asked.calls) > 2
            for each in others
        )

    def _perform(self, call: Call, fail: int) -> Iterable[Answer]:
        """Do a call to the image and to the model; return the answer that must come now, if any."""
        self.image.perform(call, fail)
        name, offset, length, data = call.key
        error = ERRORS[fail] or (EINVAL if offset + length > len(self.model) else 0)
        asked = next(asked for asked in self._taken() if asked.calls[0] == call.key)
        if error:
            return [asked.answer(error, b"")]
        if name in ("read", "flush"):
            return [asked.answer(0, bytes(self.model[offset : offset + length]))]
        self.model[offset : offset + length] = data or bytes(length)
        if len(asked.calls) == 1:
            return [asked.answer(0, b"")]
        del asked.calls[0]
        return []

    def _settle(self, expected: Counter[Answer]) -> None:
        """Receive what must be answered now, and wait until the image is asked all that is due."""
        expected += self._take()
        found = Counter[Answer]()
        while found.total() < expected.total():
            found[self._receive()] += 1
            expected += self._take()
        assert found == expected
        taken = self._taken()
        held = self.image.wait_for(len(taken))
        assert Counter(str(call.key) for call in held) == Counter(str(a.calls[0]) for a in taken)

    def _take(self) -> Counter[Answer]:
        """Take requests as the server does while it has room; return what it must refuse."""
        refused = Counter[Answer]()
        for client in self.clients:
            while client.untaken and len(client.taken) < LIMIT:
                asked = client.untaken.pop(0)
                request = (asked.kind, asked.offset, asked.length, asked.flags)
                if error := refusal(*request, len(self.model)):
                    asked.calls = [Key(f"request {asked.cookie}")]
                    refused[asked.answer(error, b"")] += 1
                else:
                    client.taken.append(asked)
        return refused

    def _receive(self) -> Answer:
        """Receive one reply, on whichever connection."""
        ready, _, _ = select.select([each.pair.client.sock for each in self.clients], [], [], 5)
        assert ready, "a reply that is owed does not come"
        client = next(each for each in self.clients if each.pair.client.sock is ready[0])
        cookie, error, data = client.pair.client.reply()
        asked = client.asked.pop(cookie)
        if asked in client.taken:
            client.taken.remove(asked)
        return asked.answer(error, data)


@pytest.mark.timeout(400)  # a failure is made smaller, for five minutes at most
@pytest.mark.parametrize("engine_name", ENGINES)
def test_requests_in_flight_on_two_connections_do_what_they_do_to_a_bytearray(engine_name, caplog):
    """Seen to fail with either engine masking errors, flushing for no FUA or for that of writes
    alone, with the flush of FUA validated again, payloads that stay in the loop's memory, a limit
    or a resize that is ignored, another's cookie, refused payloads that are left in the stream.
    """
    caplog.set_level(logging.CRITICAL, "rbdnbd")  # the calls that fail, each with a line
    run_state_machine_as_test(
        lambda: Interleaved(engine_name),
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
