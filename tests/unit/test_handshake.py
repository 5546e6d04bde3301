"""The handshake over literals: each option, each way to get it wrong, and garbage."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rbdnbd import handshake
from rbdnbd.wire import Export, ProtocolError

IHAVEOPT = b"IHAVEOPT"
FIXED, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED_REPLY = 1, 2, 3, 4, 5, 6, 7, 8
ACK, SERVER, REP_INFO = 1, 2, 3
UNSUP, INVALID, UNKNOWN, TOO_BIG = (2**31 + n for n in (1, 3, 6, 9))
EXPORT = Export("rbd/image", 5 << 40, 0x16D, minimum_block=512, preferred_block=1 << 22)
NAME = b"rbd/image"
INFOS = [
    (REP_INFO, struct.pack(">HQH", 0, 5 << 40, 0x16D)),
    (REP_INFO, struct.pack(">HIII", 3, 512, 1 << 22, 32 << 20)),
]

patient = settings(deadline=None)


@dataclass
class Talk:
    """What a conversation came to: `ended` is None while it asks for more than it was given."""

    ended: bool | None = None
    error: str = ""
    sent: bytes = b""
    asked: list[int] = field(default_factory=list)
    left: bytes = b""


def talk(data: bytes, export: Export = EXPORT) -> Talk:
    """Feed a conversation from `data` until it ends, fails or wants more."""
    result = Talk(left=data)
    conversation = handshake.negotiate(export)
    try:
        step = next(conversation)
        while True:
            if isinstance(step, bytes):
                result.sent += step
                step = conversation.send(b"")
            else:
                result.asked.append(step)
                if len(result.left) < step:
                    conversation.close()
                    return result
                answer, result.left = result.left[:step], result.left[step:]
                step = conversation.send(answer)
    except StopIteration as end:
        result.ended = end.value
    except ProtocolError as error:
        result.error = str(error)
    return result


def flags(value: int = FIXED | NO_ZEROES) -> bytes:
    return struct.pack(">I", value)


def option(number: int, data: bytes = b"") -> bytes:
    return IHAVEOPT + struct.pack(">II", number, len(data)) + data


def info(name: bytes, *requests: int) -> bytes:
    """The data of INFO and GO."""
    head = struct.pack(">I", len(name)) + name + struct.pack(">H", len(requests))
    return head + b"".join(struct.pack(">H", request) for request in requests)


def replies(sent: bytes, to: int) -> list[tuple[int, bytes]]:
    """Split what was sent after the greeting into replies, each checked to answer that option."""
    found, sent = [], sent[18:]
    while sent:
        magic, number, kind, length = struct.unpack_from(">QIII", sent)
        assert (magic, number) == (0x3E889045565A9, to)
        assert len(sent) >= 20 + length
        found.append((kind, sent[20 : 20 + length]))
        sent = sent[20 + length :]
    return found


def answer(number: int, data: bytes = b"", export: Export = EXPORT) -> list[tuple[int, bytes]]:
    return replies(talk(flags() + option(number, data), export).sent, number)


def kinds(number: int, data: bytes = b"") -> list[int]:
    return [kind for kind, _ in answer(number, data)]


def test_the_server_greets_with_fixed_newstyle_and_no_zeroes():
    assert talk(b"").sent == b"NBDMAGIC" + IHAVEOPT + b"\0\3"


def test_the_client_flags_are_read_after_the_greeting():
    assert talk(b"").asked == [4]


@pytest.mark.parametrize("value", [0, FIXED, NO_ZEROES, FIXED | NO_ZEROES])
def test_known_client_flags_are_accepted(value):
    assert talk(flags(value)).error == ""


@pytest.mark.parametrize("value", [4, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_conversation(value):
    assert "unknown client flags" in talk(flags(value)).error


def test_an_option_without_its_magic_ends_the_conversation():
    assert "expected option magic" in talk(flags() + b"IHAVEOPS" + bytes(8)).error


def test_an_option_too_long_to_be_meant_is_not_read():
    result = talk(flags() + IHAVEOPT + struct.pack(">II", LIST, handshake.MAX_OPTION + 1))
    assert "bytes, at most" in result.error
    assert max(result.asked) == 16


def test_an_unknown_option_of_the_greatest_length_is_read_and_answered():
    assert kinds(77, bytes(handshake.MAX_OPTION)) == [UNSUP]


@pytest.mark.parametrize("number", [0, PEEK, STARTTLS, STRUCTURED_REPLY, 9, 10, 11, 2**32 - 1])
def test_an_option_that_is_not_supported_is_answered_so_and_the_conversation_goes_on(number):
    result = talk(flags() + option(number, b"whatever"))
    assert [kind for kind, _ in replies(result.sent, number)] == [UNSUP]
    assert result.ended is None and result.asked[-1] == 16


@pytest.mark.parametrize("name", [NAME, b""], ids=["its_name", "no_name"])
def test_export_name_without_no_zeroes_is_answered_with_124_bytes_of_padding(name):
    result = talk(flags(FIXED) + option(EXPORT_NAME, name))
    assert result.sent[18:] == struct.pack(">QH", 5 << 40, 0x16D) + bytes(124)
    assert result.ended is True


def test_export_name_with_no_zeroes_is_answered_with_10_bytes():
    result = talk(flags() + option(EXPORT_NAME, NAME))
    assert result.sent[18:] == struct.pack(">QH", 5 << 40, 0x16D)
    assert result.ended is True


def test_export_name_of_another_export_ends_the_conversation_without_an_answer():
    result = talk(flags() + option(EXPORT_NAME, b"rbd/other"))
    assert "unknown export 'rbd/other'" in result.error
    assert len(result.sent) == 18


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize("name", [NAME, b""], ids=["its_name", "no_name"])
@pytest.mark.parametrize("requests", [(), (3,), (0, 1, 2, 3, 999)])
def test_info_and_go_tell_size_flags_and_block_sizes(number, name, requests):
    assert answer(number, info(name, *requests)) == [*INFOS, (ACK, b"")]


def test_go_ends_the_conversation_with_an_export():
    result = talk(flags() + option(GO, info(NAME)) + b"the next bytes")
    assert result.ended is True
    assert result.left == b"the next bytes"


def test_info_goes_on_with_the_conversation():
    assert talk(flags() + option(INFO, info(NAME))).ended is None


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize("name", [b"rbd/other", b"rbd/imag", b"rbd/image\0", b"\xff\xfe"])
def test_an_unknown_export_is_refused_and_the_conversation_goes_on(number, name):
    result = talk(flags() + option(number, info(name)))
    assert [kind for kind, _ in replies(result.sent, number)] == [UNKNOWN]
    assert result.ended is None and not result.error


def test_the_message_about_an_unknown_export_is_short_and_utf_8_whatever_was_asked_for():
    ((_, message),) = answer(GO, info(b"\xff" * handshake.MAX_NAME))
    assert len(message) <= 4096
    assert message.decode().startswith("unknown export")


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0\0",
        struct.pack(">IH", 1, 0),
        struct.pack(">IH", 100, 0) + NAME,
        info(NAME) + b"\0",
        info(NAME, 3)[:-1],
        info(NAME)[:-2] + b"\0\2\0\3",
        info(NAME)[:-2] + b"\xff\xff",
    ],
    ids=lambda data: data.hex() or "nothing",
)
def test_lengths_that_do_not_add_up_are_invalid_and_the_conversation_goes_on(number, data):
    result = talk(flags() + option(number, data))
    assert [kind for kind, _ in replies(result.sent, number)] == [INVALID]
    assert result.ended is None and not result.error


@pytest.mark.parametrize("number", [INFO, GO])
def test_a_name_longer_than_names_can_be_is_too_big(number):
    assert kinds(number, info(bytes(handshake.MAX_NAME + 1))) == [TOO_BIG]
    assert kinds(number, struct.pack(">IH", 2**32 - 1, 0)) == [TOO_BIG]


def test_a_name_of_the_greatest_length_can_be_exported():
    export = Export("x" * handshake.MAX_NAME, 1, 1)
    assert answer(GO, info(export.name.encode()), export)[-1] == (ACK, b"")


def test_a_name_beyond_ascii_is_compared_in_utf_8():
    export = Export("rbd/größe", 1, 1)
    assert answer(GO, info("rbd/größe".encode()), export)[-1] == (ACK, b"")


def test_list_names_the_export():
    assert answer(LIST) == [(SERVER, struct.pack(">I", len(NAME)) + NAME), (ACK, b"")]


def test_list_with_data_is_invalid():
    assert kinds(LIST, b"x") == [INVALID]


@pytest.mark.parametrize("data", [b"", b"bye"])
def test_abort_is_acknowledged_and_ends_the_conversation_without_an_export(data):
    result = talk(flags() + option(ABORT, data))
    assert replies(result.sent, ABORT) == [(ACK, b"")]
    assert result.ended is False


def test_a_refused_go_can_be_followed_by_a_good_one():
    result = talk(flags() + option(GO, info(b"no")) + option(GO) + option(GO, info(NAME)))
    assert [kind for kind, _ in replies(result.sent, GO)] == [UNKNOWN, INVALID, 3, 3, ACK]
    assert result.ended is True


options = st.builds(
    option,
    st.sampled_from([*range(12), 2**32 - 1]),
    st.binary(max_size=40)
    | st.builds(info, st.sampled_from([NAME, b"", b"no"]), st.integers(0, 4)),
)
conversations = st.builds(
    lambda flags, options, rest: struct.pack(">I", flags) + b"".join(options) + rest,
    st.integers(0, 4),
    st.lists(options, max_size=5),
    st.binary(max_size=40),
)


@patient
@given(st.binary(max_size=200) | conversations)
@example(flags() + IHAVEOPT + b"\xff" * 8)
def test_whatever_is_sent_ends_or_asks_for_more_or_is_a_protocol_error(data):
    result = talk(data)
    assert result.ended is not None or result.error or result.asked[-1] > len(result.left)


@patient
@given(st.binary(max_size=200) | conversations)
def test_no_read_is_longer_than_an_option_may_be_and_none_is_empty(data):
    assert all(0 < length <= handshake.MAX_OPTION for length in talk(data).asked)


@patient
@given(conversations, st.data())
def test_a_conversation_cut_anywhere_has_sent_the_beginning_of_what_the_whole_one_sends(data, draw):
    cut = draw.draw(st.integers(0, len(data)))
    assert talk(data).sent.startswith(talk(data[:cut]).sent)
