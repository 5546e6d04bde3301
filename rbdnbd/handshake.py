"""The fixed-newstyle handshake as a conversation: a generator without a socket in it.

`negotiate` yields an `int` to read that many bytes and `bytes` to send them, and returns whether
the client chose to enter the transmission phase. Whoever drives it (`rbdnbd.listener.converse` over
a socket, a test over a literal) decides about time limits and what a short read means. The states
of the negotiation are lines of code: the greeting, then one option after the other until
EXPORT_NAME or GO picks the export, ABORT says goodbye, or a `ProtocolError` ends it.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Fixed newstyle negotiation" and "Option types".
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Final, NamedTuple

from rbdnbd.wire import MAX_PAYLOAD, Export, ProtocolError

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
REPLY_MAGIC: Final = 0x3E889045565A9

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_INFO: Final = 6
OPT_GO: Final = 7

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_ERR_UNSUP: Final = (1 << 31) + 1
REP_ERR_INVALID: Final = (1 << 31) + 3
REP_ERR_UNKNOWN: Final = (1 << 31) + 6
REP_ERR_TOO_BIG: Final = (1 << 31) + 9

INFO_EXPORT: Final = 0
INFO_BLOCK_SIZE: Final = 3

MAX_OPTION: Final = 64 << 10
"""Bytes of option data that are read before the client is taken for a hostile one."""
MAX_NAME: Final = 4096
"""Bytes of an export's name ("Values", strings)."""

Conversation = Generator[int | bytes, bytes, bool]


class _Reply(NamedTuple):
    kind: int
    data: bytes = b""


def negotiate(export: Export) -> Conversation:
    """Offer one export, under its own name and under the empty (default) name.

    Returns True when the client picked the export and the transmission phase begins, False when it
    left with ABORT. Raises `ProtocolError` on what cannot be answered.
    """
    server_flags = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES
    yield struct.pack(">QQH", NBDMAGIC, IHAVEOPT, server_flags)
    (client_flags,) = struct.unpack(">I", (yield 4))
    if client_flags & ~server_flags:
        raise ProtocolError(f"unknown client flags {client_flags:#x}")
    while True:
        magic, option, length = struct.unpack(">QII", (yield 16))
        if magic != IHAVEOPT:
            raise ProtocolError(f"expected option magic {IHAVEOPT:#x}, got {magic:#x}")
        if length > MAX_OPTION:
            raise ProtocolError(f"option {option} with {length} bytes, at most {MAX_OPTION}")
        data = (yield length) if length else b""
        if option == OPT_EXPORT_NAME:
            yield _export_name(export, data, zeroes=not client_flags & FLAG_NO_ZEROES)
            return True
        replies = _answer(export, option, data)
        yield b"".join(_pack(option, kind, answer) for kind, answer in replies)
        if option == OPT_ABORT:
            return False
        if option == OPT_GO and replies[-1].kind == REP_ACK:
            return True


def _export_name(export: Export, data: bytes, *, zeroes: bool) -> bytes:
    """Answer EXPORT_NAME, the one option that has no way to refuse but to hang up."""
    if not _is_ours(export, data):
        raise ProtocolError(f"unknown export {_shown(data)}")
    return struct.pack(">QH", export.size, export.flags) + bytes(124 if zeroes else 0)


def _answer(export: Export, option: int, data: bytes) -> list[_Reply]:
    """Answer one option; the last reply is an ACK or an error ("Option reply types")."""
    if option == OPT_LIST:
        return _list(export, data)
    if option in (OPT_INFO, OPT_GO):
        return _info(export, data)
    if option == OPT_ABORT:
        return [_Reply(REP_ACK)]
    return [_Reply(REP_ERR_UNSUP, b"this option is not supported")]


def _list(export: Export, data: bytes) -> list[_Reply]:
    if data:
        return [_Reply(REP_ERR_INVALID, b"LIST takes no data")]
    name = export.name.encode()
    return [_Reply(REP_SERVER, struct.pack(">I", len(name)) + name), _Reply(REP_ACK)]


def _info(export: Export, data: bytes) -> list[_Reply]:
    """Answer INFO and GO: the size and flags, and the block sizes whether asked for or not."""
    if len(data) < 6:
        return [_Reply(REP_ERR_INVALID, b"the option's data is too short")]
    (name_length,) = struct.unpack_from(">I", data)
    if name_length > MAX_NAME:
        return [_Reply(REP_ERR_TOO_BIG, b"the export's name is too long")]
    name, rest = data[4 : 4 + name_length], data[4 + name_length :]
    if len(rest) < 2 or len(rest) != 2 + 2 * struct.unpack_from(">H", rest)[0]:
        return [_Reply(REP_ERR_INVALID, b"the option's lengths do not add up")]
    if not _is_ours(export, name):
        return [_Reply(REP_ERR_UNKNOWN, b"unknown export " + _shown(name).encode())]
    sizes = (export.minimum_block, export.preferred_block, MAX_PAYLOAD)
    return [
        _Reply(REP_INFO, struct.pack(">HQH", INFO_EXPORT, export.size, export.flags)),
        _Reply(REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, *sizes)),
        _Reply(REP_ACK),
    ]


def _is_ours(export: Export, name: bytes) -> bool:
    return name in (b"", export.name.encode())


def _shown(name: bytes) -> str:
    return repr(name[:100].decode(errors="backslashreplace"))


def _pack(option: int, kind: int, data: bytes) -> bytes:
    return struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data)) + data
