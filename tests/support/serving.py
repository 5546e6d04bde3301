"""The real server on real sockets, in the process of the test."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field

import nbd

from rbdnbd.listener import Listener
from rbdnbd.transmission import Transmission
from rbdnbd.wire import Export, transmission_flags
from tests.support.client import RawClient
from tests.support.memory import MemoryImage

NAME = "rbd/image"


@dataclass
class Door:
    """A listener that is serving, and ways to come in."""

    listener: Listener
    sock: socket.socket
    uri: str
    stack: ExitStack

    def connect(self) -> RawClient:
        """Connect, and negotiate nothing yet."""
        sock = self.stack.enter_context(socket.socket(self.sock.family, socket.SOCK_STREAM))
        client = RawClient(sock)
        sock.connect(self.address)
        return client

    def client(self) -> RawClient:
        """Connect and negotiate: a client in the transmission phase."""
        return self.connect().go()

    def libnbd(self, *, strict: bool = True) -> nbd.NBD:
        """Return a libnbd handle that is connected, by URI."""
        handle = nbd.NBD()
        if not strict:
            handle.set_strict_mode(0)
        handle.connect_uri(self.uri)
        return handle

    def __post_init__(self) -> None:
        self.address = self.sock.getsockname()


@dataclass
class Pair:
    """One connection of the server on a socketpair, no listener, served in a thread of its own."""

    connection: Transmission
    client: RawClient
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=lambda: self.reasons.append(self.connection.serve()))
        self.thread.start()

    def ended(self) -> str:
        """Wait for the end of `serve`; return the reason it gave."""
        self.thread.join(20)
        (reason,) = self.reasons
        return reason


def export_of(image: MemoryImage, *, read_only: bool = False) -> Export:
    """Describe an image as a gateway would."""
    return Export(NAME, image.size, transmission_flags(read_only=read_only, multi_conn=True))
