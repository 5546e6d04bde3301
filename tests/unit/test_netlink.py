"""The messages of the family "nbd", byte for byte; pyroute2 gives the second opinion."""

from __future__ import annotations

import errno
import struct
from collections import deque
from typing import Any

import pytest
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla

from rbdnbd import netlink
from rbdnbd.netlink import Connect, FamilyNotFoundError, NbdFamily, Reconfigure

FAMILY = 0x1D
CAPPED, TLVS = 0x100, 0x200


class NbdMessage(genlmsg):
    """linux/nbd-netlink.h as pyroute2 would have it."""

    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "Sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "none"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class Sockets(nla):
        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "Item"))

        class Item(nla):
            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))


def as_pyroute2_encodes(command: int, *attributes: tuple[str, Any]) -> bytes:
    message = NbdMessage()
    message["cmd"], message["version"] = command, 1
    message["attrs"] = [(f"NBD_ATTR_{name}", value) for name, value in attributes]
    message["header"].update(type=FAMILY, flags=NLM_F_REQUEST | NLM_F_ACK, sequence_number=7, pid=0)
    message.encode()
    return bytes(message.data)


def sockets(*fds: int) -> dict[str, Any]:
    return {
        "attrs": [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", fd)]}) for fd in fds],
    }


def connect_message(request: Connect) -> bytes:
    return netlink.encode_message(FAMILY, netlink.NBD_CMD_CONNECT, request.encode(), 7)


def test_a_full_connect_message_equals_pyroute2s():
    request = Connect(
        sockets=[5, 6],
        size=3 << 40,
        block_size=4096,
        flags=0x16D,
        index=9,
        timeout=0,
        dead_conn_timeout=30,
        backend_identifier="pool/ein Bild",
    )
    assert connect_message(request) == as_pyroute2_encodes(
        1,
        ("INDEX", 9),
        ("SIZE_BYTES", 3 << 40),
        ("BLOCK_SIZE_BYTES", 4096),
        ("TIMEOUT", 0),
        ("SERVER_FLAGS", 0x16D),
        ("SOCKETS", sockets(5, 6)),
        ("DEAD_CONN_TIMEOUT", 30),
        ("BACKEND_IDENTIFIER", "pool/ein Bild"),
    )


def test_what_is_none_is_not_in_a_connect_message():
    request = Connect(sockets=[5], size=1 << 20, block_size=512, flags=1)
    assert connect_message(request) == as_pyroute2_encodes(
        1,
        ("SIZE_BYTES", 1 << 20),
        ("BLOCK_SIZE_BYTES", 512),
        ("SERVER_FLAGS", 1),
        ("SOCKETS", sockets(5)),
    )


def reconfigure_message(request: Reconfigure) -> bytes:
    return netlink.encode_message(FAMILY, netlink.NBD_CMD_RECONFIGURE, request.encode(), 7)


def test_a_full_reconfigure_message_equals_pyroute2s():
    request = Reconfigure(
        index=9,
        backend_identifier="ein Keks",
        sockets=[5],
        size=3 << 40,
        timeout=0,
        dead_conn_timeout=0,
    )
    assert reconfigure_message(request) == as_pyroute2_encodes(
        3,
        ("INDEX", 9),
        ("SIZE_BYTES", 3 << 40),
        ("TIMEOUT", 0),
        ("SOCKETS", sockets(5)),
        ("DEAD_CONN_TIMEOUT", 0),
        ("BACKEND_IDENTIFIER", "ein Keks"),
    )


def test_what_is_none_or_empty_is_not_in_a_reconfigure_message():
    request = Reconfigure(index=0, backend_identifier=None)
    assert reconfigure_message(request) == as_pyroute2_encodes(3, ("INDEX", 0))


@pytest.mark.parametrize("length", range(9))
def test_an_attribute_is_padded_to_four_bytes_and_its_length_does_not_say_so(length):
    encoded = netlink.encode_attribute(1, b"x" * length)
    assert len(encoded) == 4 + (length + 3) // 4 * 4
    assert struct.unpack_from("=HH", encoded) == (4 + length, 1)


def test_attributes_of_any_length_are_read_back():
    attributes = [(kind, b"x" * kind) for kind in range(9)]
    encoded = b"".join(netlink.encode_attribute(*each) for each in attributes)
    assert list(netlink.decode_attributes(encoded)) == attributes


def test_the_flag_of_a_nested_attribute_is_not_part_of_its_type():
    assert list(netlink.decode_attributes(netlink.encode_attribute(0x8007, b""))) == [(7, b"")]


def test_several_messages_of_one_receive_are_told_apart():
    bodies = [b"a", b"bcde", b""]
    data = b"".join(
        struct.pack("=IHHII", 16 + len(body), 2, 0, number, 0) + body + bytes(-len(body) % 4)
        for number, body in enumerate(bodies)
    )
    assert [each[2:] for each in netlink.decode_messages(data)] == [*enumerate(bodies)]


def acknowledgement(number: int, words: bytes = b"", *, flags: int = 0, sequence: int) -> bytes:
    request = struct.pack("=IHHII", 20, FAMILY, 5, sequence, 0)
    body = struct.pack("=i", -number) + request
    if words:
        body += netlink.encode_attribute(1, words + b"\0")
    return struct.pack("=IHHII", 16 + len(body), 2, flags, sequence, 0) + body


def answer(attributes: bytes, sequence: int) -> bytes:
    return (
        struct.pack("=IHHIIBBH", 20 + len(attributes), FAMILY, 0, sequence, 0, 1, 1, 0) + attributes
    )


class KernelSocket:
    """A netlink socket whose kernel knows the family and then gives the scripted answers."""

    def __init__(self, *script: bytes) -> None:
        name = netlink.encode_attribute(2, b"nbd\0")
        family = netlink.encode_attribute(1, struct.pack("=H", FAMILY))
        self.answers = deque([answer(name + family, 1), acknowledgement(0, sequence=1), *script])
        self.sent: list[bytes] = []
        self.closed = False

    def __call__(self, *_: object) -> KernelSocket:
        return self

    def setsockopt(self, *_: object) -> None:
        pass

    def sendto(self, data: bytes, address: object) -> None:
        self.sent.append(data)

    def recv(self, size: int) -> bytes:
        return self.answers.popleft()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def kernel(monkeypatch):
    def answering(*script: bytes) -> KernelSocket:
        kernel = KernelSocket(*script)
        monkeypatch.setattr(netlink.socket, "socket", kernel)
        return kernel

    return answering


REQUEST = Connect(sockets=[5], size=1 << 20, block_size=512, flags=1)


def test_connect_asks_the_resolved_family_and_returns_the_index(kernel):
    index = netlink.encode_attribute(1, struct.pack("=I", 12))
    socket = kernel(answer(index, 2), acknowledgement(0, flags=CAPPED, sequence=2))
    with NbdFamily() as family:
        assert family.connect(REQUEST) == 12
    assert socket.sent[-1] == netlink.encode_message(FAMILY, 1, REQUEST.encode(), 2)
    assert socket.closed


def test_disconnect_names_the_index(kernel):
    socket = kernel(acknowledgement(0, sequence=2))
    with NbdFamily() as family:
        family.disconnect(3)
    index = netlink.encode_attribute(1, struct.pack("=I", 3))
    assert socket.sent[-1] == netlink.encode_message(FAMILY, 2, index, 2)


def test_reconfigure_asks_the_resolved_family(kernel):
    request = Reconfigure(index=3, backend_identifier="c", size=1 << 20)
    socket = kernel(acknowledgement(0, sequence=2))
    with NbdFamily() as family:
        family.reconfigure(request)
    assert socket.sent[-1] == netlink.encode_message(FAMILY, 3, request.encode(), 2)


def test_a_refusal_is_an_oserror_with_the_kernels_errno(kernel):
    kernel(acknowledgement(errno.EBUSY, flags=CAPPED, sequence=2))
    with NbdFamily() as family, pytest.raises(OSError) as refused:
        family.connect(REQUEST)
    assert (refused.value.errno, refused.value.strerror) == (
        errno.EBUSY,
        "Device or resource busy",
    )


def test_the_kernels_own_words_are_the_errors_words(kernel):
    words = b"Attribute failed policy validation"
    kernel(acknowledgement(errno.ERANGE, words, flags=CAPPED | TLVS, sequence=2))
    with NbdFamily() as family, pytest.raises(OSError) as refused:
        family.connect(REQUEST)
    assert (refused.value.errno, refused.value.strerror) == (errno.ERANGE, words.decode())


def test_what_answers_an_earlier_command_is_passed_over(kernel):
    late = acknowledgement(errno.EIO, sequence=1)
    kernel(late, acknowledgement(0, sequence=2))
    with NbdFamily() as family:
        family.disconnect(3)


def test_an_unknown_family_is_an_error_of_its_own(kernel):
    socket = kernel()
    socket.answers = deque([acknowledgement(errno.ENOENT, sequence=1)])
    with pytest.raises(FamilyNotFoundError):
        NbdFamily()
    assert socket.closed
