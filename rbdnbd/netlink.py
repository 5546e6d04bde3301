"""The generic-netlink family "nbd", spoken by hand.

A message is `struct nlmsghdr` (length, type, flags, sequence, port) with the family's id as its
type, `struct genlmsghdr` (command, version), then attributes: a 16-bit length and a 16-bit type,
the value, and zeros up to a multiple of four; all in the host's byte order. The id is not fixed:
the family "nlctrl" tells it by name, or answers ENOENT where the driver is not loaded and in every
network namespace but the initial one.

The kernel carries a command out inside sendto(2), so its answers wait in the socket afterwards: for
CONNECT a message with the index, and for every command an acknowledgement, NLMSG_ERROR, with an
errno (0: done) and sometimes words of its own (an extended acknowledgement).
Numbers: linux/netlink.h, linux/genetlink.h, linux/nbd-netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NETLINK_GENERIC = 16
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
NLM_F_ACK_TLVS = 0x200
NLMSG_ERROR = 2
NLMSGERR_ATTR_MSG = 1

GENL_ID_CTRL, CTRL_CMD_GETFAMILY = 0x10, 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 1, 2

NBD_CMD_CONNECT, NBD_CMD_DISCONNECT, NBD_CMD_RECONFIGURE = 1, 2, 3
NBD_ATTR_INDEX, NBD_ATTR_SIZE_BYTES, NBD_ATTR_BLOCK_SIZE_BYTES = 1, 2, 3
NBD_ATTR_TIMEOUT, NBD_ATTR_SERVER_FLAGS = 4, 5
NBD_ATTR_SOCKETS, NBD_SOCK_ITEM, NBD_SOCK_FD = 7, 1, 1
NBD_ATTR_DEAD_CONN_TIMEOUT, NBD_ATTR_BACKEND_IDENTIFIER = 8, 10

_VERSION = 1
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_GENERIC_HEADER = struct.Struct("=BBH")  # genlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # nlattr
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_RECEIVE_SIZE = 65536


class FamilyNotFoundError(OSError):
    """The kernel knows no family "nbd" here: attach by ioctl instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """What NBD_CMD_CONNECT is to do; what is None is not said.

    `sockets` are file descriptors, `size` and `block_size` bytes (a block: a power of two from 512
    to the page size), `flags` the transmission flags, both timeouts seconds. Without `index` the
    kernel takes the first unused device, and makes one when all are in use. `backend_identifier`
    shows up in /sys/block/nbdN/backend from Linux 5.14 on (6497ef8df568) and is ignored before.
    """

    sockets: Sequence[int]
    size: int
    block_size: int
    flags: int
    index: int | None = None
    timeout: int | None = None
    dead_conn_timeout: int | None = None
    backend_identifier: str | None = None

    def encode(self) -> bytes:
        """Encode the attributes, in the order of their numbers."""
        return b"".join(
            (
                _number("=I", NBD_ATTR_INDEX, self.index),
                _number("=Q", NBD_ATTR_SIZE_BYTES, self.size),
                _number("=Q", NBD_ATTR_BLOCK_SIZE_BYTES, self.block_size),
                _number("=Q", NBD_ATTR_TIMEOUT, self.timeout),
                _number("=Q", NBD_ATTR_SERVER_FLAGS, self.flags),
                _sockets(self.sockets),
                _number("=Q", NBD_ATTR_DEAD_CONN_TIMEOUT, self.dead_conn_timeout),
                _name(self.backend_identifier),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconfigure:
    """What NBD_CMD_RECONFIGURE is to change on a device; what is None or empty stays as it is.

    `sockets` take the places of connections that have ended, in turn; one for which there is no
    such place is dropped without an error. `backend_identifier` must be that of the device, if it
    has one. Units as in `Connect`. A `timeout` also sets /sys/block/nbdN/queue/io_timeout, 0 to
    30 s.
    """

    index: int
    backend_identifier: str | None
    sockets: Sequence[int] = ()
    size: int | None = None
    timeout: int | None = None
    dead_conn_timeout: int | None = None

    def encode(self) -> bytes:
        """Encode the attributes, in the order of their numbers."""
        return b"".join(
            (
                _number("=I", NBD_ATTR_INDEX, self.index),
                _number("=Q", NBD_ATTR_SIZE_BYTES, self.size),
                _number("=Q", NBD_ATTR_TIMEOUT, self.timeout),
                _sockets(self.sockets),
                _number("=Q", NBD_ATTR_DEAD_CONN_TIMEOUT, self.dead_conn_timeout),
                _name(self.backend_identifier),
            )
        )


class NbdFamily:
    """A connection to the kernel's family "nbd"; a context manager.

    Every method may be called from any thread, by one at a time, and raises OSError with the
    kernel's errno and, where it gave one, its own words. CONNECT, RECONFIGURE and DISCONNECT need
    CAP_SYS_ADMIN (EPERM).
    """

    def __init__(self) -> None:
        """Open a socket and resolve the family, or raise FamilyNotFoundError."""
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._id = self._resolve(b"nbd\0")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> NbdFamily:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def connect(self, request: Connect) -> int:
        """Attach a device and return its index.

        EBUSY: that index is connected, or merely open in any process. The kernel keeps references
        of its own to the sockets. Source: nbd_genl_connect, Linux 6.1.
        """
        reply = self._command(self._id, NBD_CMD_CONNECT, request.encode())
        (index,) = struct.unpack("=I", reply[NBD_ATTR_INDEX])
        return int(index)

    def reconfigure(self, request: Reconfigure) -> None:
        """Give a device that was attached by netlink a new server, size or timeouts.

        EINVAL: no such index, not attached, attached by ioctl, or another backend identifier; the
        kernel's log says which. A new size waits, on newer kernels, for all requests in flight.
        Source: nbd_genl_reconfigure, nbd_reconnect_socket, Linux 6.1; seen on 6.12.
        """
        self._command(self._id, NBD_CMD_RECONFIGURE, request.encode())

    def disconnect(self, index: int) -> None:
        """Disconnect a device, whichever way it was attached; requests in flight fail with EIO.

        Never refuses a device that is mounted, and does nothing to one that is not connected.
        EINVAL: no such index. Source: nbd_genl_disconnect, Linux 6.1.
        """
        self._command(self._id, NBD_CMD_DISCONNECT, _number("=I", NBD_ATTR_INDEX, index))

    def _resolve(self, name: bytes) -> int:
        try:
            request = encode_attribute(CTRL_ATTR_FAMILY_NAME, name)
            reply = self._command(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, request)
        except FileNotFoundError as error:
            raise FamilyNotFoundError(errno.ENOENT, "no generic-netlink family nbd") from error
        (family,) = struct.unpack("=H", reply[CTRL_ATTR_FAMILY_ID])
        return int(family)

    def _command(self, family: int, command: int, attributes: bytes) -> dict[int, bytes]:
        """Send one command, return the attributes of its answer or raise its error."""
        self._sequence += 1
        self._socket.sendto(encode_message(family, command, attributes, self._sequence), (0, 0))
        answer: dict[int, bytes] = {}
        while True:
            for kind, flags, sequence, body in decode_messages(self._socket.recv(_RECEIVE_SIZE)):
                if sequence != self._sequence:
                    continue
                if kind == NLMSG_ERROR:
                    raise_error(flags, body)
                    return answer
                answer = dict(decode_attributes(body[_GENERIC_HEADER.size :]))


def encode_message(family: int, command: int, attributes: bytes, sequence: int) -> bytes:
    """Wrap encoded attributes into a request that asks to be acknowledged."""
    body = _GENERIC_HEADER.pack(command, _VERSION, 0) + attributes
    flags = NLM_F_REQUEST | NLM_F_ACK
    return _HEADER.pack(_HEADER.size + len(body), family, flags, sequence, 0) + body


def encode_attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute: its length counts the header but not the padding."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def decode_messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (type, flags, sequence, body) of each message in what one recv(2) gave."""
    while len(data) >= _HEADER.size:
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data)
        yield kind, flags, sequence, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def decode_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, value) of each attribute; a nested one's value is its attributes' bytes."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def raise_error(flags: int, body: bytes) -> None:
    """Raise the OSError that an acknowledgement carries; return when it says success.

    `struct nlmsgerr`: a negative errno, the header of the request (without its payload, for we
    set NETLINK_CAP_ACK), then, if `flags` has NLM_F_ACK_TLVS, attributes.
    """
    (negative,) = struct.unpack_from("=i", body)
    if negative == 0:
        return
    extended = body[4 + _HEADER.size :] if flags & NLM_F_ACK_TLVS else b""
    text = dict(decode_attributes(extended)).get(NLMSGERR_ATTR_MSG, b"")
    words = text.rstrip(b"\0").decode(errors="replace")
    raise OSError(-negative, words or os.strerror(-negative))


def _number(form: str, kind: int, value: int | None) -> bytes:
    return b"" if value is None else encode_attribute(kind, struct.pack(form, value))


def _sockets(fds: Sequence[int]) -> bytes:
    items = [encode_attribute(NBD_SOCK_ITEM, _number("=I", NBD_SOCK_FD, fd)) for fd in fds]
    return encode_attribute(NBD_ATTR_SOCKETS, b"".join(items)) if items else b""


def _name(identifier: str | None) -> bytes:
    if identifier is None:
        return b""
    return encode_attribute(NBD_ATTR_BACKEND_IDENTIFIER, identifier.encode() + b"\0")


def _aligned(length: int) -> int:
    return max(length, 1) + 3 & ~3
