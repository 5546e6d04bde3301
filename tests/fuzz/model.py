"""What a server has to answer, said once more and as plainly as can be.

Written from NetworkBlockDevice/nbd, doc/proto.md ("Transmission phase"), not from rbdnbd's modules.
"""

from __future__ import annotations

import struct

SIZE = 1024
BROKEN = 13
"""The image fails with EIO whatever begins at this offset."""
READ, WRITE, DISC, FLUSH, TRIM, ZERO = 0, 1, 2, 3, 4, 6
EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28
LARGEST = 32 << 20


def answer(data: bytes, *, read_only: bool) -> tuple[list[bytes], bytes, bytes]:
    """Return the replies to a stream of requests, one more that may be sent, and the image's end.

    A request that is refused whatever its payload is may be answered before that has come, so even
    if it never does.
    """
    image, replies = bytearray(range(256)) * (SIZE // 256), []
    while len(data) >= 28:
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", data[:28])
        if magic != 0x25609513 or command == DISC:
            break
        data = data[28:]
        payload = b""
        if command == WRITE:
            payload, data = data[:length], data[length:]
        error = _error(flags, command, offset, length, read_only)
        if command == WRITE and len(payload) < length:
            refused = struct.pack(">IIQ", 0x67446698, error, cookie)
            return replies, refused if length > LARGEST else b"", bytes(image)
        reply = b""
        if not error and offset == BROKEN and command != FLUSH:
            error = EIO
        if not error and command == READ:
            reply = bytes(image[offset : offset + length])
        elif not error and command != FLUSH:
            image[offset : offset + length] = payload if command == WRITE else bytes(length)
        replies.append(struct.pack(">IIQ", 0x67446698, error, cookie) + reply)
    return replies, b"", bytes(image)


def check(sent: bytes, replies: list[bytes], early: bytes) -> None:
    """Hold what was sent to the replies that are owed, in any order, and the one that may be."""
    left = sorted([*replies, early], key=len, reverse=True)
    while sent:
        found = next((reply for reply in left if sent.startswith(reply or b"none")), None)
        assert found is not None, f"no reply that is owed begins with {sent[:16]!r}"
        left.remove(found)
        sent = sent[len(found) :]
    assert left in ([], [early]), f"{len(left)} replies are missing"


def _error(flags: int, command: int, offset: int, length: int, read_only: bool) -> int:
    if command not in (READ, WRITE, FLUSH, TRIM, ZERO):
        return EINVAL
    if read_only and command in (WRITE, TRIM, ZERO):
        return EPERM
    if flags & ~(3 if command == ZERO else 1):
        return EINVAL
    if command == FLUSH:
        return EINVAL if offset or length else 0
    if not length or (command in (READ, WRITE) and length > LARGEST):
        return EINVAL
    if offset + length > SIZE:
        return ENOSPC if command in (WRITE, ZERO) else EINVAL
    return 0
