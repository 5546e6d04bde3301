"""The trace of both engines, as nbd-server's own tools read it."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from pathlib import Path

import pytest

from rbdnbd.errors import RbdnbdError
from rbdnbd.trace import Trace, tracing
from tests.support.client import (
    DISC,
    EINVAL,
    ENOSPC,
    FLUSH,
    FUA,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
)
from tests.support.memory import Gate, MemoryImage
from tests.support.trace import dump, records
from tests.support.waiting import wait_until

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.fixture
def trace(path: Path, stack) -> Trace:
    return stack.enter_context(tracing(str(path)))


@pytest.fixture
def data_trace(path: Path, stack) -> Trace:
    return stack.enter_context(tracing(str(path), with_data=True))


def test_every_request_and_every_reply_is_written_down_in_their_order(connect, image, trace, path):
    """Seen to fail without the FUA flag, without the goodbye, and with error 0 in each reply."""
    pair = connect(image, trace=trace)
    pair.client.write(4096, b"x" * 512, FUA)
    pair.client.call(READ, image.size, 512)
    pair.client.call(TRIM, 0, 4096)
    pair.client.request(DISC)
    pair.ended()
    assert records(path) == [
        *((">", 1, "NBD_CMD_WRITE", "FUA", 4096, 512), ("<", 1, 0)),
        *((">", 2, "NBD_CMD_READ", "NONE", image.size, 512), ("<", 2, EINVAL)),
        *((">", 3, "NBD_CMD_TRIM", "NONE", 0, 4096), ("<", 3, 0)),
        (">", 4, "NBD_CMD_DISC", "NONE", 0, 0),
    ]


def test_a_reply_stands_where_it_was_sent_and_not_behind_its_request(connect, image, trace, path):
    """Seen to fail with replies that are written down when their requests are."""
    gate = image.hook = Gate("write")
    client = connect(image, trace=trace).client
    slow = client.request(WRITE, 0, payload=b"slow")
    wait_until(lambda: gate.waiting, 5, "the write")
    client.call(FLUSH)
    gate.open()
    client.reply()
    order = [(record[0], record[1]) for record in records(path)]
    assert order == [(">", slow), (">", slow + 1), ("<", slow + 1), ("<", slow)]


def test_what_a_client_writes_is_not_in_the_trace_unless_asked_for(connect, image, trace, path):
    """Seen to fail with a trace that always holds data."""
    connect(image, trace=trace).client.write(0, b"secret" * 100)
    assert b"secret" not in path.read_bytes()


def test_a_trace_with_data_is_played_to_the_same_image(connect, image, data_trace, path, tmp_path):
    """Seen to fail with either engine's payloads left out."""
    client = connect(image, trace=data_trace).client
    client.write(0, os.urandom(512))
    client.write(MIB, os.urandom(MIB))
    client.request(WRITE_ZEROES, MIB + 4096, 8192)
    client.request(WRITE, 4096, payload=os.urandom(64 << 10))
    client.request(FLUSH)
    for _ in range(3):
        client.reply()
    copy = tmp_path / "copy"
    copy.write_bytes(bytes(image.size))
    subprocess.run(["nbd-trplay", "-i", copy, "-l", path], check=True, capture_output=True)
    assert copy.read_bytes() == image.read(0, image.size)


def test_a_write_that_is_thrown_away_leaves_a_trace_with_data_in_step(connect, data_trace, path):
    """Seen to fail with a trace that promises the data of every write."""
    client = connect(MemoryImage(4096), trace=data_trace).client
    assert client.call(WRITE, 0, payload=bytes(32 * MIB + 1))[0] == EINVAL
    assert client.call(WRITE, 4000, payload=bytes(97))[0] == ENOSPC
    client.write(0, b"x" * 512)
    assert [record[2] for record in records(path) if record[0] == "<"] == [EINVAL, ENOSPC, 0]
    assert path.read_bytes().count(b"x" * 512) == 1


def test_connections_share_a_trace_and_cut_nothing_of_each_others(connect, image, data_trace, path):
    """Seen to fail with two writes a record, header and payload, without the lock."""
    clients = [connect(image, trace=data_trace).client for _ in range(4)]

    def busy(number: int) -> None:
        for _ in range(200):
            clients[number].write(number * 4096, bytes([number]) * 1000)

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = records(path)
    assert sum(record[0] == ">" for record in found) == 800
    assert sum(record[0] == "<" for record in found) == 800


def test_a_trace_that_exists_is_continued_with_or_without_data(connect, image, path):
    """Seen to fail with a trace that says nothing when it has no data."""
    for with_data in (True, False, True):
        with tracing(str(path), with_data=with_data) as trace:
            pair = connect(image, trace=trace)
            pair.client.write(0, b"x" * 512)
            pair.client.request(DISC)
            pair.ended()
    assert len(records(path)) == 9


def test_nobody_but_the_owner_may_read_a_trace(path):
    """Seen to fail with 0644, and with a file that keeps its mode."""
    for _ in range(2):
        with tracing(str(path)):
            assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o644)


def test_a_disk_that_is_full_ends_the_trace_with_one_line_and_io_goes_on(
    connect, image, data_trace, path, caplog
):
    """Seen to fail with a trace that goes on, one that raises, and one that keeps half a record."""
    client = connect(image, trace=data_trace).client
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        for number in range(4):
            client.write(0, bytes([number]) * (MIB // 2))
            assert client.read(0, 1) == bytes([number])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.messages == [f"the trace {path} ends here: No space left on device"]
    assert dump(path).splitlines()[-1].startswith("< H=")
    assert path.stat().st_size < MIB - 4096


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none/trace", "No such file or directory"),
        (".", "Is a directory"),
        ("fifo", "No such device or address"),
        ("device", "it is not a regular file"),
    ],
)
def test_a_trace_that_cannot_be_written_is_refused_with_its_name(tmp_path, name, reason):
    """Seen to fail, or to wait for ever, with a plain open."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/null")
    with pytest.raises(RbdnbdError) as refused, tracing(str(tmp_path / name)):
        pass
    assert refused.value.message == f"cannot write the trace {tmp_path / name}: {reason}"
