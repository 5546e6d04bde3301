"""The transmission phase as numbers: parsing, the validation table, error numbers."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbdnbd import wire
from rbdnbd.wire import (
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    Export,
    ProtocolError,
    Request,
)

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SIZE = 100 * MIB
WRITABLE = Export("image", SIZE, wire.transmission_flags(read_only=False))
READ_ONLY = Export("image", SIZE, wire.transmission_flags(read_only=True))
BIG = Export("image", 5 * TIB, wire.transmission_flags(read_only=False))
BARE = Export("image", SIZE, wire.FLAG_HAS_FLAGS)

OK, EPERM, EINVAL, ENOSPC = 0, 1, 22, 28
RANGED = (CMD_READ, CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES)
PAST_THE_END = {CMD_READ: EINVAL, CMD_WRITE: ENOSPC, CMD_TRIM: EINVAL, CMD_WRITE_ZEROES: ENOSPC}
KNOWN = (*RANGED, CMD_FLUSH)

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
requests = st.builds(Request, u16, u16, u64, u64, u32)

patient = settings(deadline=None)


def validate(
    command: int, offset: int = 0, length: int = 0, flags: int = 0, export: Export = WRITABLE
) -> int:
    return wire.validate(Request(flags, command, 1, offset, length), export)


def test_a_request_is_laid_out_as_the_specification_says():
    assert wire.pack_request(Request(1, 6, 0x1122334455667788, 0x99, 0xAA)) == bytes.fromhex(
        "25609513 0001 0006 1122334455667788 0000000000000099 000000aa"
    )


def test_a_simple_reply_is_laid_out_as_the_specification_says():
    assert wire.simple_reply(0x1122334455667788, 28) == bytes.fromhex(
        "67446698 0000001c 1122334455667788"
    )


@patient
@given(requests)
def test_a_packed_request_is_parsed_back_unchanged(request):
    assert wire.parse_request(wire.pack_request(request)) == request


@patient
@given(u64, u32)
def test_a_packed_reply_is_parsed_back_unchanged(cookie, error):
    assert wire.parse_simple_reply(wire.simple_reply(cookie, error)) == (cookie, error)


@patient
@given(
    st.binary(min_size=28, max_size=28)
    | st.binary(min_size=24, max_size=24).map(bytes.fromhex("25609513").__add__)
)
def test_any_28_bytes_are_a_request_or_a_protocol_error(header):
    try:
        request = wire.parse_request(header)
    except ProtocolError:
        assert header[:4] != bytes.fromhex("25609513")
    else:
        assert wire.pack_request(request) == header


@patient
@given(st.binary(min_size=16, max_size=16))
def test_any_16_bytes_are_a_reply_or_a_protocol_error(header):
    try:
        cookie, error = wire.parse_simple_reply(header)
    except ProtocolError:
        assert header[:4] != bytes.fromhex("67446698")
    else:
        assert wire.simple_reply(cookie, error) == header


@patient
@given(requests, st.integers(0, 2**63), u16)
def test_every_request_is_valid_or_has_one_of_three_errors(request, size, flags):
    assert wire.validate(request, Export("x", size, flags)) in (OK, EPERM, EINVAL, ENOSPC)


@patient
@given(requests, st.integers(0, 2**63), u16)
def test_what_is_valid_lies_within_the_export(request, size, flags):
    if wire.validate(request, Export("x", size, flags)) == OK:
        assert request.offset + request.length <= size


@pytest.mark.parametrize("command", RANGED)
def test_a_range_that_ends_where_the_export_ends_is_valid(command):
    assert validate(command, SIZE - 512, 512) == OK


@pytest.mark.parametrize("command", RANGED)
def test_a_range_one_byte_past_the_end_is_refused(command):
    assert validate(command, SIZE - 512, 513) == PAST_THE_END[command]
    assert validate(command, SIZE - 511, 512) == PAST_THE_END[command]


@pytest.mark.parametrize("command", RANGED)
def test_a_range_that_begins_at_the_end_is_refused(command):
    assert validate(command, SIZE, 1) == PAST_THE_END[command]


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize("offset", [2**64 - 1, 2**64 - 512, 2**64 - SIZE, 2**63, 2**63 - 512])
def test_an_offset_whose_end_would_wrap_around_is_refused(command, offset):
    assert validate(command, offset, 512) == PAST_THE_END[command]


@pytest.mark.parametrize("command", RANGED)
def test_an_empty_range_is_refused(command):
    assert validate(command, 0, 0) == EINVAL


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE])
def test_a_payload_of_32_mib_is_valid(command):
    assert validate(command, 0, 32 * MIB) == OK


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE])
def test_a_payload_of_one_byte_more_than_32_mib_is_refused(command):
    assert validate(command, 0, 32 * MIB + 1) == EINVAL


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE])
def test_a_payload_too_long_is_refused_as_such_wherever_it_lies(command):
    assert validate(command, SIZE, 2**32 - 1) == EINVAL


@pytest.mark.parametrize("command", [CMD_TRIM, CMD_WRITE_ZEROES])
@pytest.mark.parametrize("length", [4294966784, 2**32 - 1])
def test_trims_and_zeroes_of_nearly_4_gib_are_valid(command, length):
    assert validate(command, 4 * TIB, length, export=BIG) == OK


@pytest.mark.parametrize("command", RANGED)
def test_an_export_of_five_tib_is_addressed_to_its_last_byte(command):
    assert validate(command, 5 * TIB - 1, 1, export=BIG) == OK
    assert validate(command, 5 * TIB - 1, 2, export=BIG) == PAST_THE_END[command]


@pytest.mark.parametrize("command", RANGED)
def test_an_export_of_no_bytes_takes_no_range(command):
    assert validate(command, 0, 1, export=Export("x", 0, WRITABLE.flags))


@pytest.mark.parametrize("command", [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES])
def test_a_read_only_export_takes_no_writes_of_any_kind(command):
    assert validate(command, 0, 512, export=READ_ONLY) == EPERM


@pytest.mark.parametrize("command", [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES])
def test_writes_to_a_read_only_export_are_refused_as_such_whatever_else_is_wrong(command):
    assert validate(command, SIZE, 0, flags=0xFFFF, export=READ_ONLY) == EPERM


def test_a_read_only_export_can_be_read_and_flushed():
    assert validate(CMD_READ, 0, 512, export=READ_ONLY) == OK
    assert validate(CMD_FLUSH, export=READ_ONLY) == OK


@pytest.mark.parametrize("command", RANGED)
def test_fua_is_legal_on_every_command_with_a_range(command):
    assert validate(command, 0, 512, CMD_FLAG_FUA) == OK


def test_fua_is_legal_on_a_flush():
    assert validate(CMD_FLUSH, flags=CMD_FLAG_FUA) == OK


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE])
def test_fua_that_was_not_advertised_is_refused(command):
    assert validate(command, 0, 512, CMD_FLAG_FUA, BARE) == EINVAL


def test_no_hole_is_legal_on_write_zeroes_alone_and_with_fua():
    assert validate(CMD_WRITE_ZEROES, 0, 512, CMD_FLAG_NO_HOLE) == OK
    assert validate(CMD_WRITE_ZEROES, 0, 512, CMD_FLAG_NO_HOLE | CMD_FLAG_FUA) == OK


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE, CMD_TRIM])
def test_no_hole_is_refused_on_any_other_command_with_a_range(command):
    assert validate(command, 0, 512, CMD_FLAG_NO_HOLE) == EINVAL


def test_no_hole_is_refused_on_a_flush():
    assert validate(CMD_FLUSH, flags=CMD_FLAG_NO_HOLE) == EINVAL


@pytest.mark.parametrize("command", KNOWN)
@pytest.mark.parametrize("bit", range(2, 16))
def test_an_unknown_flag_is_refused(command, bit):
    assert validate(command, 0, 0 if command == CMD_FLUSH else 512, 1 << bit) == EINVAL


@pytest.mark.parametrize("command", [CMD_DISC, 5, 7, 8, 0x8000, 0xFFFF])
@pytest.mark.parametrize("export", [WRITABLE, READ_ONLY], ids=["writable", "read_only"])
def test_an_unknown_command_is_refused(command, export):
    assert validate(command, 0, 512, export=export) == EINVAL


@pytest.mark.parametrize("command", [CMD_TRIM, CMD_WRITE_ZEROES, CMD_FLUSH])
def test_a_command_that_was_not_advertised_is_refused(command):
    assert validate(command, 0, 0 if command == CMD_FLUSH else 512, export=BARE) == EINVAL


def test_reads_and_writes_need_not_be_advertised():
    assert validate(CMD_READ, 0, 512, export=BARE) == OK
    assert validate(CMD_WRITE, 0, 512, export=BARE) == OK


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1), (2**64 - 1, 2**32 - 1)])
def test_a_flush_of_a_range_is_refused(offset, length):
    assert validate(CMD_FLUSH, offset, length) == EINVAL


def test_a_flush_without_a_range_is_valid():
    assert validate(CMD_FLUSH) == OK


def test_a_writable_export_advertises_every_command_it_takes():
    assert wire.transmission_flags(read_only=False) == 0b1101101


def test_a_read_only_export_says_so_and_advertises_no_trim_or_zeroes():
    assert wire.transmission_flags(read_only=True) == 0b1111
    assert READ_ONLY.read_only
    assert not WRITABLE.read_only


def test_several_connections_are_advertised_only_when_asked_for():
    assert wire.transmission_flags(read_only=True, multi_conn=True) == 0b100001111


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EPERM, 1),
        (errno.EROFS, 1),
        (errno.EACCES, 1),
        (errno.EIO, 5),
        (errno.ENOMEM, 12),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.ESHUTDOWN, 5),
        (errno.EOVERFLOW, 5),
        (errno.EOPNOTSUPP, 5),
        (errno.EBUSY, 5),
        (errno.ETIMEDOUT, 5),
        (errno.ENOENT, 5),
    ],
    ids=lambda number: errno.errorcode[number],
)
def test_an_errno_becomes_the_nearest_error_of_the_protocol(number, expected):
    assert wire.nbd_error(number) == expected


@pytest.mark.parametrize("number", [0, -1, -errno.EINVAL, 10_000])
def test_what_is_no_errno_at_all_is_an_input_output_error_never_success(number):
    assert wire.nbd_error(number) == 5


@patient
@given(st.sampled_from(sorted(errno.errorcode)))
def test_every_errno_becomes_an_error_that_the_protocol_knows(number):
    assert wire.nbd_error(number) in {1, 5, 12, 22, 28, 75, 95, 108}, os.strerror(number)


def test_a_request_names_its_command_in_words():
    assert Request(0, CMD_WRITE_ZEROES, 0, 0, 0).name == "write_zeroes"
    assert Request(0, 77, 0, 0, 0).name == "command 77"
