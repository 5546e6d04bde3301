"""The socket of a mapping, and the list of all of them."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from rbdnbd import control
from rbdnbd.control import Control, Document, mappings
from rbdnbd.errors import RbdnbdError


@pytest.fixture
def run_dir(tmp_path_factory):
    """A directory that is not there yet, with a path short enough for a socket's."""
    return tmp_path_factory.mktemp("run") / "rbdnbd"


def answering(device: str, run_dir: Path, **more: object) -> Control:
    return Control(lambda: {"device": device, **more}, run_dir)


def devices(documents: list[Document]) -> list[str]:
    return [document["device"] for document in documents]


def bound(path: Path) -> socket.socket:
    """Return a socket that is bound but does not listen."""
    path.parent.mkdir(exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    return sock


def asker(path: Path) -> socket.socket:
    """Return a socket that has asked and not listened to the answer yet."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


def test_whoever_asks_is_told_what_the_mapping_is(run_dir):
    with answering("/dev/nbd0", run_dir, image="ein Bild", size=1 << 40):
        assert mappings(run_dir) == [
            {"device": "/dev/nbd0", "image": "ein Bild", "size": 1 << 40},
        ]


def test_every_question_is_answered_with_how_it_is_now(run_dir):
    count = iter(range(3))
    with Control(lambda: {"device": "/dev/nbd0", "n": next(count)}, run_dir):
        assert [mappings(run_dir)[0]["n"] for _ in range(3)] == [0, 1, 2]


def test_a_long_answer_arrives_whole(run_dir):
    in_flight = [{"offset": number} for number in range(100_000)]
    with answering("/dev/nbd0", run_dir, in_flight=in_flight):
        assert mappings(run_dir)[0]["in_flight"] == in_flight


def test_two_mappings_of_one_process_answer_each_for_itself(run_dir):
    with answering("/dev/nbd1", run_dir), answering("/dev/nbd0", run_dir):
        assert devices(mappings(run_dir)) == ["/dev/nbd0", "/dev/nbd1"]


def test_the_list_is_in_the_order_of_the_device_numbers(run_dir):
    with ExitStack() as stack:
        for number in (10, 2, 100, 0):
            stack.enter_context(answering(f"/dev/nbd{number}", run_dir))
        assert devices(mappings(run_dir)) == ["/dev/nbd0", "/dev/nbd2", "/dev/nbd10", "/dev/nbd100"]


def test_without_a_directory_there_is_no_mapping(run_dir):
    assert mappings(run_dir) == []


def test_the_directory_is_for_its_owner_alone(run_dir):
    with answering("/dev/nbd0", run_dir):
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700


def test_a_mapping_that_ends_leaves_nothing_in_the_directory(run_dir):
    with answering("/dev/nbd0", run_dir):
        assert [path.suffix for path in run_dir.iterdir()] == [".sock"]
    assert list(run_dir.iterdir()) == []


def test_a_mapping_that_ends_leaves_no_thread_and_no_descriptor(run_dir):
    with answering("/dev/nbd0", run_dir):
        mappings(run_dir)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with answering("/dev/nbd0", run_dir):
        mappings(run_dir)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_socket_of_a_process_that_is_gone_is_removed(run_dir):
    stale = run_dir / "1-0.sock"
    bound(stale).close()
    with answering("/dev/nbd0", run_dir):
        assert devices(mappings(run_dir)) == ["/dev/nbd0"]
    assert not stale.exists()


def test_a_mapping_is_not_taken_for_dead_between_bind_and_listen(run_dir):
    class AskedInBetween(socket.socket):
        def listen(self, *backlog: int) -> None:
            assert mappings(run_dir) == []
            super().listen(*backlog)

    starting = answering("/dev/nbd0", run_dir)
    starting._sock.close()
    starting._sock = AskedInBetween(socket.AF_UNIX, socket.SOCK_STREAM)
    with starting:
        assert devices(mappings(run_dir)) == ["/dev/nbd0"]


def test_a_socket_under_another_name_is_neither_asked_nor_removed(run_dir):
    with bound(run_dir / "1-0"):
        assert mappings(run_dir) == []
        assert (run_dir / "1-0").exists()


def test_a_mapping_that_hangs_is_left_out_and_said_and_does_not_hold_up_the_list(
    run_dir, monkeypatch, caplog
):
    monkeypatch.setattr(control, "_ANSWER_SECONDS", 0.1)
    hung = run_dir / "1-0.sock"
    begin = time.monotonic()
    with bound(hung) as sock, answering("/dev/nbd0", run_dir):
        sock.listen()
        assert devices(mappings(run_dir)) == ["/dev/nbd0"]
    assert time.monotonic() - begin < 5
    assert hung.exists()
    assert caplog.messages == [f"no answer from the process behind {hung}: timed out"]


def test_a_mapping_that_leaves_while_it_is_asked_is_no_mapping_and_no_problem(run_dir, caplog):
    path = run_dir / "1-0.sock"
    with bound(path) as sock:
        sock.listen()

        def leave() -> None:
            client, _ = sock.accept()
            path.unlink()
            client.close()

        leaving = threading.Thread(target=leave)
        leaving.start()
        assert mappings(run_dir) == []
        leaving.join()
    assert caplog.messages == []


def test_an_asker_that_does_not_listen_does_not_keep_the_next_from_being_answered(
    run_dir, monkeypatch
):
    monkeypatch.setattr(control, "_ANSWER_SECONDS", 0.1)
    with Control(lambda: {"much": "x" * (4 << 20)}, run_dir):
        (path,) = run_dir.iterdir()
        with asker(path), asker(path) as second, second.makefile("rb") as answer:
            assert json.load(answer)["much"]


def test_a_directory_that_cannot_be_made_is_said_and_leaves_no_thread(run_dir):
    run_dir.write_text("not a directory")
    threads = threading.active_count()
    with pytest.raises(RbdnbdError) as refused, answering("/dev/nbd0", run_dir):
        pass
    assert refused.value.message == f"cannot listen in {run_dir}: File exists"
    assert threading.active_count() == threads


def test_a_directory_that_cannot_be_read_is_said(run_dir):
    run_dir.write_text("not a directory")
    with pytest.raises(RbdnbdError) as refused:
        mappings(run_dir)
    assert refused.value.message == (
        f"cannot read {run_dir}: Not a directory (mappings belong to root)"
    )


def test_twenty_mappings_that_come_and_go_are_never_lost_by_those_that_ask(run_dir):
    def come_and_go(number: int) -> None:
        for _ in range(3):
            with answering(f"/dev/nbd{number}", run_dir):
                if f"/dev/nbd{number}" not in devices(mappings(run_dir)):
                    lost.append(number)

    lost: list[int] = []
    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert list(run_dir.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_description_that_fails_once_is_not_the_end_of_answering(run_dir, monkeypatch):
    monkeypatch.setattr(control, "_ANSWER_SECONDS", 0.5)
    answers = iter([None, {"device": "/dev/nbd0"}])

    def describe() -> Document:
        return dict(next(answers))  # of None: a TypeError

    with Control(describe, run_dir):
        mappings(run_dir)
        assert devices(mappings(run_dir)) == ["/dev/nbd0"]
