"""libnbd as the client: every option and every command, by a stranger's hand."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import nbd
import pytest

from tests.support.memory import MemoryImage, failing
from tests.support.serving import NAME, Door

KIB, MIB = 1 << 10, 1 << 20


def refused(call: Callable[..., object], *args: object) -> str:
    """Return the errno, as a word, that libnbd says a call has failed with."""
    with pytest.raises(nbd.Error) as caught:
        call(*args)
    assert caught.value.errno is not None
    return str(caught.value.errno)


@pytest.fixture
def handle(door: Door) -> nbd.NBD:
    return door.libnbd()


@pytest.fixture
def loose(door: Door) -> nbd.NBD:
    """A handle that sends what the server would have to refuse."""
    return door.libnbd(strict=False)


def options(door: Door) -> nbd.NBD:
    """Return a handle that is left in the negotiation."""
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(door.uri)
    return handle


def test_an_export_is_reached_by_its_uri(handle):
    assert handle.get_protocol() == "newstyle-fixed"
    assert handle.get_size() == 4 * MIB


def test_an_export_is_reached_on_a_socket_by_the_default_name(unix):
    handle = nbd.NBD()
    handle.connect_unix(unix.address)
    assert handle.get_size() == 4 * MIB


def test_the_transmission_flags_tell_what_the_server_can(handle):
    assert handle.can_flush() and handle.can_fua() and handle.can_multi_conn()
    assert handle.can_trim() and handle.can_zero()
    assert not handle.is_read_only()
    assert not handle.can_cache() and not handle.can_df() and not handle.can_fast_zero()


def test_the_block_sizes_are_told(handle):
    assert handle.get_block_size(nbd.SIZE_MINIMUM) == 1
    assert handle.get_block_size(nbd.SIZE_PREFERRED) == 4096
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MIB


def test_structured_replies_and_tls_are_declined_and_the_session_goes_on(door):
    handle = nbd.NBD()
    handle.set_request_structured_replies(True)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_tls(nbd.TLS_ALLOW)
    handle.connect_uri(door.uri)
    assert not handle.get_structured_replies_negotiated()
    assert not handle.get_tls_negotiated()
    assert handle.pread(512, 0) == bytes(512)


def test_a_client_that_requires_tls_is_left_without_it(unix):
    handle = nbd.NBD()
    handle.set_tls(nbd.TLS_REQUIRE)
    with pytest.raises(nbd.Error):
        handle.connect_unix(unix.address)


def test_the_export_is_listed(door):
    found = []
    handle = options(door)
    assert handle.opt_list(lambda name, description: found.append((name, description)) or 0) == 1
    assert found == [(NAME, "")]
    handle.opt_abort()


def test_info_tells_the_size_and_leaves_the_negotiation_open(door):
    handle = options(door)
    handle.set_export_name(NAME)
    handle.opt_info()
    assert handle.get_size() == 4 * MIB
    handle.opt_go()
    assert handle.pread(1, 0) == b"\0"


def test_an_unknown_export_is_refused_and_a_known_one_can_be_chosen_after_it(door):
    handle = options(door)
    handle.set_export_name("rbd/other")
    assert refused(handle.opt_info) == "ENOENT"
    assert refused(handle.opt_go) == "ENOENT"
    handle.set_export_name("")
    handle.opt_go()
    assert handle.get_size() == 4 * MIB


def test_an_export_name_that_is_unknown_cannot_be_connected_to(door):
    handle = nbd.NBD()
    assert refused(handle.connect_uri, door.uri.replace("image", "other")) == "ENOENT"


@pytest.mark.parametrize(
    ("flags", "protocol"),
    [
        (nbd.HANDSHAKE_FLAG_MASK, "newstyle-fixed"),
        (nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, "newstyle-fixed"),
        (nbd.HANDSHAKE_FLAG_NO_ZEROES, "newstyle"),
        (0, "newstyle"),
    ],
)
def test_a_client_of_any_handshake_flags_gets_its_export(door, flags, protocol):
    """Without FIXED_NEWSTYLE libnbd knows EXPORT_NAME only, with its zeroes or without them."""
    handle = nbd.NBD()
    handle.set_handshake_flags(flags)
    handle.connect_uri(door.uri)
    assert handle.get_protocol() == protocol
    assert handle.get_size() == 4 * MIB
    assert handle.pread(512, 4 * MIB - 512) == bytes(512)


def test_what_is_written_is_read_back(handle, image):
    data = os.urandom(64 * KIB)
    handle.pwrite(data, 12_345)
    assert handle.pread(len(data), 12_345) == data
    assert image.read(12_345, len(data)) == data


def test_the_last_byte_can_be_written_and_read(handle):
    handle.pwrite(b"!", 4 * MIB - 1)
    assert handle.pread(2, 4 * MIB - 2) == b"\0!"


def test_a_write_with_fua_is_stable_before_it_is_answered(handle, image):
    handle.pwrite(b"data", 0, nbd.CMD_FLAG_FUA)
    assert image.calls == ["write", "flush"]


def test_a_write_without_fua_flushes_nothing(handle, image):
    handle.pwrite(b"data", 0)
    assert image.calls == ["write"]


def test_a_flush_flushes_the_image(handle, image):
    handle.pwrite(b"data", 0)
    handle.flush()
    assert image.calls == ["write", "flush"]


def test_a_trim_discards(handle, image):
    image.write(0, b"x" * 1024)
    handle.trim(512, 512)
    assert handle.pread(1024, 0) == b"x" * 512 + bytes(512)
    assert "discard" in image.calls


def test_a_trim_with_fua_is_followed_by_a_flush(handle, image):
    handle.trim(512, 0, nbd.CMD_FLAG_FUA)
    assert image.calls == ["discard", "flush"]


def test_zeroes_are_written(handle, image):
    image.write(0, b"x" * 1024)
    handle.zero(512, 512)
    assert handle.pread(1024, 0) == b"x" * 512 + bytes(512)
    assert "write_zeroes" in image.calls


def test_zeroes_without_a_hole_are_told_apart(handle, image):
    handle.zero(512, 0, nbd.CMD_FLAG_NO_HOLE)
    assert image.calls == ["write_zeroes_no_hole"]


def test_zeroes_with_fua_are_followed_by_a_flush(handle, image):
    handle.zero(512, 0, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
    assert image.calls == ["write_zeroes_no_hole", "flush"]


def test_a_flush_with_fua_flushes_once(loose, image):
    loose.flush(nbd.CMD_FLAG_FUA)
    assert image.calls == ["flush"]


def test_a_read_with_fua_is_a_read(loose, image):
    assert loose.pread(512, 0, nbd.CMD_FLAG_FUA) == bytes(512)
    assert image.calls == ["read"]


def test_past_the_end_writes_have_no_space_and_the_rest_is_invalid(loose, image):
    assert refused(loose.pread, 513, 4 * MIB - 512) == "EINVAL"
    assert refused(loose.pwrite, bytes(513), 4 * MIB - 512) == "ENOSPC"
    assert refused(loose.trim, 513, 4 * MIB - 512) == "EINVAL"
    assert refused(loose.zero, 513, 4 * MIB - 512) == "ENOSPC"
    assert image.calls == []
    assert loose.pread(512, 4 * MIB - 512) == bytes(512)


def test_empty_ranges_are_invalid(loose, image):
    assert refused(loose.pread, 0, 0) == "EINVAL"
    assert refused(loose.pwrite, b"", 0) == "EINVAL"
    assert refused(loose.trim, 0, 0) == "EINVAL"
    assert refused(loose.zero, 0, 0) == "EINVAL"
    assert image.calls == []


def test_commands_that_are_not_offered_are_invalid(loose):
    assert refused(loose.cache, 512, 0) == "EINVAL"
    assert loose.pread(512, 0) == bytes(512)


def test_flags_that_are_not_offered_are_invalid(loose, image):
    assert refused(loose.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO) == "EINVAL"
    assert refused(loose.pread, 512, 0, nbd.CMD_FLAG_DF) == "EINVAL"
    assert refused(loose.pwrite, bytes(512), 0, nbd.CMD_FLAG_NO_HOLE) == "EINVAL"
    assert image.calls == []


def test_a_read_only_export_is_read_and_nothing_else(serve, image):
    handle = serve(image, read_only=True).libnbd(strict=False)
    assert handle.is_read_only()
    assert refused(handle.pwrite, b"data", 0) == "EPERM"
    assert refused(handle.trim, 512, 0) == "EPERM"
    assert refused(handle.zero, 512, 0) == "EPERM"
    assert handle.pread(512, 0) == bytes(512)
    assert image.calls == ["read"]


def test_32_mib_are_written_and_read_in_one_request(serve):
    image = MemoryImage(33 * MIB)
    handle = serve(image).libnbd()
    data = os.urandom(32 * MIB)
    handle.pwrite(data, MIB)
    assert handle.pread(32 * MIB, MIB) == data
    assert image.calls == ["write", "read"]


def test_many_commands_in_flight_are_all_answered(handle):
    def done(error: object) -> int:
        errors.append(error.value)
        return 1  # libnbd need not keep the command any longer

    def wait() -> None:
        while handle.aio_in_flight():
            handle.poll(-1)

    errors: list[int] = []
    blocks = {offset: os.urandom(4 * KIB) for offset in range(0, MIB, 4 * KIB)}
    for offset, block in blocks.items():
        handle.aio_pwrite(block, offset, completion=done)
    wait()
    buffers = {offset: nbd.Buffer(4 * KIB) for offset in blocks}
    for offset in reversed(buffers):
        handle.aio_pread(buffers[offset], offset, completion=done)
    wait()
    assert errors == [0] * 512
    assert {offset: bytes(buffer.to_bytearray()) for offset, buffer in buffers.items()} == blocks


def test_what_one_client_has_written_and_flushed_another_one_reads(door):
    one, other = door.libnbd(), door.libnbd()
    one.pwrite(b"mine", 0)
    one.flush()
    assert other.pread(4, 0) == b"mine"


def test_a_flush_of_one_client_covers_the_writes_of_all(door, image):
    one, other = door.libnbd(), door.libnbd()
    one.pwrite(b"mine", 0)
    other.flush()
    assert image.calls == ["write", "flush"]


def test_several_clients_at_once_each_keep_their_own_blocks(door):
    def work(number: int) -> None:
        handle = door.libnbd()
        for round_ in range(30):
            offset, block = (round_ * 8 + number) * KIB, os.urandom(KIB)
            handle.pwrite(block, offset)
            assert handle.pread(KIB, offset) == block
        handle.shutdown()
        finished.append(number)

    finished: list[int] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(finished) == list(range(8))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(5, "broken"), "EIO"),
        (OSError(28, "full"), "ENOSPC"),
        (OSError(122, "over quota"), "ENOSPC"),
        (OSError(30, "read-only"), "EPERM"),
        (OSError(16, "busy"), "EIO"),
        (OSError("without a number"), "EIO"),
        (OSError(0, "success?"), "EIO"),
        (OSError(-5, "the wrong sign"), "EIO"),
        (MemoryError(), "ENOMEM"),
        (ZeroDivisionError("a bug"), "EIO"),
    ],
    ids=repr,
)
def test_a_failure_of_the_image_is_told_and_the_connection_lives(unix, image, error, expected):
    handle = unix.libnbd()
    image.hook = failing(error)
    assert refused(handle.pread, 512, 0) == expected
    assert refused(handle.pwrite, b"data", 0) == expected
    assert refused(handle.flush) == expected
    assert refused(handle.trim, 512, 0) == expected
    assert refused(handle.zero, 512, 0) == expected
    image.hook = failing(error, "none")
    assert handle.pread(4, 0) == bytes(4)


def test_a_write_with_fua_fails_when_its_flush_fails(unix, image):
    image.hook = failing(OSError(28, "full"), "flush")
    handle = unix.libnbd()
    assert refused(handle.pwrite, b"data", 0, nbd.CMD_FLAG_FUA) == "ENOSPC"


@pytest.mark.parametrize("length", [0, 511, 513])
def test_a_read_that_returns_another_length_is_an_error(unix, image, monkeypatch, length):
    monkeypatch.setattr(image, "read", lambda offset, _: bytes(length))
    handle = unix.libnbd()
    assert refused(handle.pread, 512, 0) == "EIO"
    handle.flush()


def test_a_failure_is_logged_with_what_failed_and_where(unix, image, caplog):
    image.hook = failing(OSError(5, "osd.3 is on fire"), "write")
    refused(unix.libnbd().pwrite, b"data", 4096)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "write of 4 bytes at 4096 failed: [Errno 5] osd.3 is on fire"
