"""The NBD protocol's transmission phase as numbers and bytes: no socket, no thread, no image.

A request is 28 bytes, for a WRITE followed by `length` bytes of payload; a simple reply is 16
bytes, for a successful READ followed by the data. Replies carry the request's cookie and may come
in any order. `validate` decides whether a request may be performed at all; the error number it
returns is the one that goes back on the wire.

Names and numbers: NetworkBlockDevice/nbd, doc/proto.md ("Transmission phase", "Values").
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_WRITE_ZEROES: Final = 6
COMMAND_NAMES: Final = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_WRITE_ZEROES: "write_zeroes",
}

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_CAN_MULTI_CONN: Final = 1 << 8

NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28

MAX_PAYLOAD: Final = 32 << 20
"""Bytes that one READ or WRITE may carry, as the specification wants ("Block size constraints")."""

_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE_REPLY: Final = struct.Struct(">IIQ")
REQUEST_SIZE: Final = _REQUEST.size

_WRITES: Final = frozenset({CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES})
_NEEDS: Final = {
    CMD_READ: 0,
    CMD_WRITE: 0,
    CMD_FLUSH: FLAG_SEND_FLUSH,
    CMD_TRIM: FLAG_SEND_TRIM,
    CMD_WRITE_ZEROES: FLAG_SEND_WRITE_ZEROES,
}
_ERRORS: Final = {
    errno.EPERM: NBD_EPERM,
    errno.EROFS: NBD_EPERM,
    errno.EACCES: NBD_EPERM,
    errno.ENOMEM: NBD_ENOMEM,
    errno.EINVAL: NBD_EINVAL,
    errno.ENOSPC: NBD_ENOSPC,
    errno.EDQUOT: NBD_ENOSPC,
    errno.EFBIG: NBD_ENOSPC,
}


class ProtocolError(Exception):
    """The peer broke the protocol; the stream cannot be trusted any more and is closed."""


@dataclass(frozen=True, slots=True)
class Export:
    """What a client is told of an image: sizes in bytes, `flags` are the transmission flags."""

    name: str
    size: int
    flags: int
    minimum_block: int = 1
    preferred_block: int = 4096

    @property
    def read_only(self) -> bool:
        """Whether writes of any kind are refused."""
        return bool(self.flags & FLAG_READ_ONLY)


class Request(NamedTuple):
    """One request: `offset` and `length` in bytes, `cookie` as opaque as the client made it."""

    flags: int
    type: int
    cookie: int
    offset: int
    length: int

    @property
    def name(self) -> str:
        """The command in words, for logs and statistics."""
        return COMMAND_NAMES.get(self.type, f"command {self.type}")


def transmission_flags(*, read_only: bool, multi_conn: bool = False) -> int:
    """Return the transmission flags of an export of ours."""
    flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA
    flags |= FLAG_READ_ONLY if read_only else FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES
    return flags | (FLAG_CAN_MULTI_CONN if multi_conn else 0)


def parse_request(data: bytes | memoryview, position: int = 0) -> Request:
    """Read the 28 bytes of a request; raise `ProtocolError` if they do not begin with its magic."""
    magic, flags, command, cookie, offset, length = _REQUEST.unpack_from(data, position)
    if magic != REQUEST_MAGIC:
        raise ProtocolError(f"expected request magic {REQUEST_MAGIC:#x}, got {magic:#x}")
    return Request._make((flags, command, cookie, offset, length))


def pack_request(request: Request) -> bytes:
    """Write a request as a client sends it."""
    flags, command, cookie, offset, length = request
    return _REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def simple_reply(cookie: int, error: int) -> bytes:
    """Write a simple reply; `error` is an NBD error number, 0 for success."""
    return _SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def parse_simple_reply(header: bytes) -> tuple[int, int]:
    """Read the 16 bytes of a simple reply as (cookie, error)."""
    magic, error, cookie = _SIMPLE_REPLY.unpack(header)
    if magic != SIMPLE_REPLY_MAGIC:
        raise ProtocolError(f"expected reply magic {SIMPLE_REPLY_MAGIC:#x}, got {magic:#x}")
    return cookie, error


def validate(request: Request, export: Export) -> int:
    """Return 0 if the request may be performed on the export, else the NBD error that answers it.

    Reads and trims past the end are EINVAL and writes ENOSPC, writes of any kind to a read-only
    export EPERM, unknown commands and flags and empty ranges EINVAL ("Error values"). FUA is legal
    on every command once it was advertised, and has no effect where nothing is written.
    """
    flags, command, _, offset, length = request
    needs = _NEEDS.get(command)
    if needs is None:
        return NBD_EINVAL
    writes = command in _WRITES
    if writes and export.flags & FLAG_READ_ONLY:
        return NBD_EPERM
    if needs & ~export.flags or (flags and flags & ~_legal_flags(command, export.flags)):
        return NBD_EINVAL
    if command == CMD_FLUSH:
        return NBD_EINVAL if offset or length else 0
    if not length or (length > MAX_PAYLOAD and command <= CMD_WRITE):
        return NBD_EINVAL
    if offset + length > export.size:
        return NBD_ENOSPC if writes and command != CMD_TRIM else NBD_EINVAL
    return 0


def _legal_flags(command: int, export_flags: int) -> int:
    legal = CMD_FLAG_FUA if export_flags & FLAG_SEND_FUA else 0
    return legal | CMD_FLAG_NO_HOLE if command == CMD_WRITE_ZEROES else legal


def nbd_error(number: int) -> int:
    """Translate an errno into an error number for the wire; any that is not listed is EIO.

    EOVERFLOW, ENOTSUP and ESHUTDOWN exist on the wire, but mean what an image's never do: a reply
    that DF forbids to cut, FAST_ZERO that is not fast, a server that shuts down in good order.
    """
    return _ERRORS.get(number, NBD_EIO)
