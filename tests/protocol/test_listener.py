"""The door: negotiation over sockets, clients that misbehave, places, stopping, addresses."""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import nbd
import pytest

from rbdnbd.addresses import listen_tcp, listen_unix, parse_address, uri
from rbdnbd.errors import RbdnbdError, UsageError
from rbdnbd.handshake import Conversation
from rbdnbd.listener import Listener, converse
from rbdnbd.server import threads
from tests.support.client import DISC, FLUSH, OPT_GO, READ, WRITE, RawClient
from tests.support.memory import Gate, MemoryImage, failing
from tests.support.serving import NAME, export_of
from tests.support.waiting import wait_until

MIB = 1 << 20
OPT_ABORT = 2


def stop(listener: Listener, seconds: float) -> float:
    """Stop a listener in a thread of its own; fail if it takes 10 s; return how long it took."""
    began = time.monotonic()
    thread = threading.Thread(target=listener.stop, args=(seconds,), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "stop did not return"
    return time.monotonic() - began


def enter(context: AbstractContextManager[object]) -> None:
    """Enter a context that is expected to refuse."""
    with context:
        pass


def reads(door) -> None:
    """Show that a new client is served."""
    with door.client() as client:
        assert client.read(0, 4) == bytes(4)


def test_negotiation_goes_on_after_an_option_that_is_refused(door):
    client = door.connect()
    client.greet()
    assert client.option(8)[0][0] == 2**31 + 1
    assert client.option(OPT_GO, bytes(6))[-1] == (1, b"")
    assert client.read(0, 4) == bytes(4)


def test_an_option_that_comes_byte_by_byte_is_read_whole(door):
    client = door.connect()
    client.greet()
    for byte in b"IHAVEOPT" + struct.pack(">II", OPT_GO, 6) + bytes(6):
        client.send(bytes([byte]))
    client.receive(20 + 12 + 20 + 14 + 20)
    assert client.read(0, 4) == bytes(4)


def test_requests_sent_along_with_go_are_answered(door):
    client = door.connect()
    request = struct.pack(">IHHQQI", 0x25609513, 0, FLUSH, 1, 0, 0)
    client.send(struct.pack(">I8sII", 3, b"IHAVEOPT", OPT_GO, 6) + bytes(6) + request)
    client.receive(18 + 20 + 12 + 20 + 14 + 20)
    assert client.reply() == (1, 0, b"")


def test_abort_is_acknowledged_and_the_connection_closed(door):
    client = door.connect()
    client.greet()
    assert client.option(OPT_ABORT) == [(1, b"")]
    assert client.ended()


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 1000],
    ids=["http", "zeroes", "ones"],
)
def test_garbage_instead_of_a_negotiation_ends_that_connection_alone(door, data):
    client = door.connect()
    client.receive(18)
    client.send(data)
    assert client.ended()
    reads(door)


def test_a_client_that_leaves_at_once_harms_nobody(door):
    for _ in range(20):
        door.connect().sock.close()
    reads(door)


def test_a_client_that_resets_its_connection_in_mid_write_harms_nobody(door):
    bystander, rude = door.client(), door.client()
    rude.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    rude.request(WRITE, 0, MIB)
    rude.send(b"x" * 1000)
    rude.sock.close()
    assert bystander.read(0, 1000) == bytes(1000)
    reads(door)


def test_a_client_that_says_nothing_is_hung_up_on_in_time(serve, image):
    client = serve(image, handshake_seconds=0.2).connect()
    client.receive(18)
    assert client.ended()


def test_a_client_that_dawdles_in_its_negotiation_is_hung_up_on_in_time(serve, image):
    client = serve(image, handshake_seconds=0.3).connect()
    client.greet()
    began = time.monotonic()
    with pytest.raises((ConnectionError, EOFError)):
        while time.monotonic() < began + 5:
            client.option(77)
    assert time.monotonic() - began < 2


def test_no_byte_of_a_negotiation_is_read_when_its_time_is_over():
    """Whoever always has the next byte ready never lets a single receive run into its limit."""

    def conversation() -> Conversation:
        while True:
            taken.append((yield 1))

    taken: list[bytes] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(bytes(100))
        with pytest.raises(TimeoutError):
            converse(ours, conversation(), 0)
    assert taken == []


def test_an_idle_client_in_the_transmission_phase_is_left_in_peace(serve, image):
    door = serve(image, handshake_seconds=0.1)
    patient, silent = door.client(), door.connect()
    silent.receive(18)
    assert silent.ended()
    assert patient.read(0, 4) == bytes(4)


def test_a_client_for_whom_there_is_no_place_waits_until_there_is_one(serve, image):
    door = serve(image, clients=2)
    first, _second, third = door.client(), door.client(), door.connect()
    third.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        third.receive(18)
    first.request(DISC)
    third.sock.settimeout(10)
    assert third.go().read(0, 4) == bytes(4)


def test_places_come_back_however_clients_leave(serve, image):
    door = serve(image, clients=1, handshake_seconds=0.2)
    for leave in (
        lambda client: client.sock.close(),
        lambda client: client.send(bytes(100)),
        lambda client: client.go().sock.close(),
        lambda client: client.go().send(bytes(100)),
        lambda client: client.go().request(DISC),
        lambda client: client.receive(18),
    ):
        leave(door.connect())
        reads(door)


def test_what_a_client_has_written_is_flushed_when_it_leaves(unix, image):
    with unix.client() as client:
        client.write(0, b"data")
    wait_until(lambda: image.calls == ["write", "flush"], 5, "a flush")


def test_a_flush_that_fails_when_a_client_leaves_is_logged_and_its_place_comes_back(
    serve, image, caplog
):
    image.hook = failing(OSError(errno.EIO, "broken"), "flush")
    door = serve(image, clients=1)
    reads(door)
    reads(door)
    assert "flush after a client's end failed: [Errno 5] broken" in caplog.messages


def test_the_figures_are_those_of_clients_past_and_present(unix):
    with unix.client() as gone:
        gone.read(0, 512)
        gone.request(DISC)
        assert gone.ended()
    here = unix.client()
    here.read(0, 1024)
    read = unix.listener.stats().as_dict()["read"]
    wait_until(lambda: unix.listener.stats().as_dict()["read"]["bytes"] == 1536, 5, f"{read}")


@pytest.mark.parametrize("failure", [errno.EMFILE, errno.EPROTO, errno.ENETDOWN, errno.ENOBUFS])
def test_a_client_that_cannot_be_accepted_does_not_close_the_door(image, stack, failure):
    class Socket(socket.socket):
        failures = [failure]

        def accept(self):
            if self.failures:
                raise OSError(self.failures.pop(), "no")
            return super().accept()

    sock = Socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    listener = Listener(sock, image, export_of(image), threads(image))
    listener.start()
    stack.callback(listener.stop, 1.0)
    with RawClient(socket.create_connection(sock.getsockname())) as client:
        client.sock.settimeout(5)
        assert client.go().read(0, 4) == bytes(4)


def test_a_client_for_whom_no_thread_can_be_started_does_not_close_the_door(
    serve, image, monkeypatch
):
    door = serve(image, clients=1)
    begin, failures = threading.Thread.start, [1]

    def start(thread: threading.Thread) -> None:
        if failures:
            failures.pop()
            raise RuntimeError("can't start new thread")
        begin(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert door.connect().ended()
    reads(door)
    stop(door.listener, 1)


def test_stopping_with_no_clients_returns_at_once(door):
    assert stop(door.listener, 5) < 1
    with pytest.raises(ConnectionError):
        door.connect()


def test_stopping_hangs_up_on_idle_clients_at_once(door):
    clients = [door.client() for _ in range(5)]
    assert stop(door.listener, 5) < 1
    assert all(client.ended() for client in clients)


def test_stopping_hangs_up_on_clients_in_their_negotiation_at_once(door):
    client = door.connect()
    client.greet()
    assert stop(door.listener, 5) < 1
    assert client.ended()


def test_stopping_lets_nobody_in_who_waits_for_a_place(serve, image):
    door = serve(image, clients=1)
    inside, outside = door.client(), door.connect()
    assert stop(door.listener, 5) < 1
    assert inside.ended() and outside.ended()


def test_stopping_answers_what_was_read_before(door, image):
    gate = image.hook = Gate("read")
    client = door.client()
    sent = {client.request(READ, 0, 512) for _ in range(8)}
    wait_until(lambda: gate.waiting == 8, 5, "eight reads")
    threading.Timer(0.2, gate.open).start()
    stop(door.listener, 5)
    assert {client.reply()[0] for _ in range(8)} == sent
    assert client.ended()


def test_stopping_in_mid_write_writes_nothing(door, image):
    client = door.client()
    client.request(WRITE, 0, MIB)
    client.send(b"x" * 1000)
    assert stop(door.listener, 5) < 1
    assert "write" not in image.calls


def test_stopping_hangs_up_in_time_on_a_client_that_takes_no_replies(serve):
    image = MemoryImage(8 * MIB)
    door = serve(image)
    clients = [door.client() for _ in range(3)]
    for client in clients:
        for _ in range(4):
            client.request(READ, 0, 8 * MIB)
    wait_until(lambda: image.calls.count("read") == 12, 5, "all reads")
    assert 0.3 <= stop(door.listener, 0.3) < 2


def test_stopping_hangs_up_in_time_on_a_client_that_floods(door):
    client = door.client()
    client.request(WRITE, 0, 2**32 - 1)

    def flood() -> None:
        try:
            while True:
                client.send(bytes(MIB))
        except OSError:
            pass

    thread = threading.Thread(target=flood)
    thread.start()
    assert stop(door.listener, 0.3) < 2
    thread.join(10)
    assert not thread.is_alive()


def test_stopping_twice_is_stopping(door):
    stop(door.listener, 1)
    assert stop(door.listener, 1) < 1


def test_every_client_is_hung_up_on_in_time_though_the_image_holds_another_one(serve, stack):
    image = MemoryImage(8 * MIB)
    gate = image.hook = Gate("write")
    door = serve(image)
    stack.callback(gate.open)
    held, deaf = door.client(), door.client()
    held.request(WRITE, 0, payload=b"data")
    for _ in range(4):
        deaf.request(READ, 0, 8 * MIB)
    wait_until(lambda: gate.waiting and image.calls.count("read") == 4, 5, "all requests")
    stopper = threading.Thread(target=door.listener.stop, args=(0.1,))
    stopper.start()
    poll = select.poll()
    poll.register(deaf.sock, select.POLLHUP)
    assert poll.poll(5000), "the server did not hang up"
    gate.open()
    stopper.join(10)
    assert not stopper.is_alive()


def test_stopping_returns_only_when_nobody_uses_the_image_any_more(unix, image, stack):
    gate = image.hook = Gate("write")
    stack.callback(gate.open)
    unix.client().request(WRITE, 0, payload=b"data")
    wait_until(lambda: gate.waiting, 5, "the write")
    stopper = threading.Thread(target=unix.listener.stop, args=(0,))
    stopper.start()
    stopper.join(0.2)
    assert stopper.is_alive()
    gate.open()
    stopper.join(10)
    assert not stopper.is_alive()
    assert "write" in image.calls


def test_a_unix_socket_is_open_to_its_owner_alone(tmp_path):
    with listen_unix(tmp_path / "s"):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_a_unix_socket_is_removed_at_the_end(tmp_path):
    with listen_unix(tmp_path / "s"):
        pass
    assert not (tmp_path / "s").exists()


def test_a_unix_socket_that_nobody_listens_on_is_replaced(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
    with listen_unix(tmp_path / "s"):
        pass


def test_a_unix_socket_that_another_server_listens_on_is_left_alone(tmp_path):
    with listen_unix(tmp_path / "s"):
        with pytest.raises(RbdnbdError, match="another server is listening there") as caught:
            enter(listen_unix(tmp_path / "s"))
        assert caught.value.errno == errno.EADDRINUSE
        assert (tmp_path / "s").is_socket()


def test_a_file_in_the_way_of_a_unix_socket_is_left_alone(tmp_path):
    (tmp_path / "s").write_text("precious")
    with pytest.raises(RbdnbdError, match="a file of that name exists"):
        enter(listen_unix(tmp_path / "s"))
    assert (tmp_path / "s").read_text() == "precious"


@pytest.mark.parametrize("path", [Path("x" * 200), Path("no/such/folder/s")], ids=["long", "gone"])
def test_a_path_that_no_socket_can_have_is_one_sentence(tmp_path, path):
    with pytest.raises(RbdnbdError, match=r"^cannot listen on .*") as caught:
        enter(listen_unix(tmp_path / path))
    assert caught.value.errno


def test_a_tcp_port_in_use_is_one_sentence():
    with listen_tcp("127.0.0.1", 0) as sock, pytest.raises(RbdnbdError, match="in use") as caught:
        enter(listen_tcp("127.0.0.1", sock.getsockname()[1]))
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("host", ["not a host", "x" * 70 + ".example", "192.0.2.1"])
def test_a_host_that_cannot_be_listened_on_is_one_sentence(host):
    with pytest.raises(RbdnbdError, match=r"^cannot listen on .*"):
        enter(listen_tcp(host, 0))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:10810", ("127.0.0.1", 10810)),
        ("localhost", ("localhost", 10809)),
        (":10810", ("127.0.0.1", 10810)),
        ("", ("127.0.0.1", 10809)),
        ("[::1]:10810", ("::1", 10810)),
        ("[::1]", ("::1", 10809)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("host:65535", ("host", 65535)),
    ],
)
def test_an_address_is_read(address, expected):
    assert parse_address(address) == expected


@pytest.mark.parametrize("address", ["host:", "host:nbd", "host:65536", "host:-1", "::1"])
def test_an_address_that_is_none_is_a_usage_error(address):
    with pytest.raises(UsageError, match="invalid address"):
        parse_address(address)


@pytest.mark.parametrize("name", ["rbd/image", "", "/", "a b?c#d%e&f=g", "größe", "rbd/ns/img@s"])
def test_the_uri_leads_a_client_to_the_export(tmp_path, name):
    with listen_unix(tmp_path / "a b&c.sock") as sock:
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        image = MemoryImage(512)
        listener = Listener(sock, image, export_of(image), threads(image))
        listener.start()
        handle.connect_uri(uri(sock, name))
        assert handle.get_export_name() == name
        handle.opt_abort()
        listener.stop(1)


def test_listening_to_the_world_is_logged_and_listening_to_oneself_is_not(caplog):
    enter(listen_tcp("127.0.0.1", 0))
    assert caplog.messages == []
    enter(listen_tcp("0.0.0.0", 0))
    (message,) = caplog.messages
    assert "whoever reaches 0.0.0.0" in message


def test_the_uri_of_a_tcp_socket_has_its_address():
    with listen_tcp("127.0.0.1", 0) as sock:
        assert uri(sock, NAME) == f"nbd://127.0.0.1:{sock.getsockname()[1]}/rbd/image"


def test_a_client_that_says_goodbye_leaves_nothing_in_the_log(unix, caplog):
    caplog.set_level(logging.INFO)
    with unix.client() as client:
        client.request(DISC)
        assert client.ended()
    stop(unix.listener, 1)
    assert caplog.messages == []
