"""An image in memory behind the real server, on real sockets, in this process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rbdnbd.addresses import listen_tcp, listen_unix, uri
from rbdnbd.listener import Listener
from rbdnbd.trace import Trace
from rbdnbd.transmission import WORKERS, of_one_image
from tests.support.client import RawClient
from tests.support.memory import MemoryImage
from tests.support.polled import ENGINES, engine
from tests.support.serving import NAME, Door, Pair, export_of

MIB = 1 << 20


@pytest.fixture
def image() -> MemoryImage:
    return MemoryImage(4 * MIB)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    return str(request.param)


@pytest.fixture
def serve(tmp_path: Path, stack: ExitStack, engine_name: str) -> Callable[..., Door]:
    """Serve an image by a listener; what is left of it is stopped after the test."""

    def serve(
        image: MemoryImage, family: str = "unix", *, read_only: bool = False, **options: Any
    ) -> Door:
        path = tmp_path / "nbd.sock"
        listen = listen_unix(path) if family == "unix" else listen_tcp("127.0.0.1", 0)
        sock = stack.enter_context(listen)
        connect = stack.enter_context(engine(engine_name, image))
        export = export_of(image, read_only=read_only)
        listener = Listener(sock, image, export, connect, **options)
        listener.start()
        stack.callback(listener.stop, 2.0)
        return Door(listener, sock, uri(sock, NAME), stack)

    return serve


@pytest.fixture(params=["unix", "tcp"])
def door(request: pytest.FixtureRequest, serve: Callable[..., Door], image: MemoryImage) -> Door:
    """The image, served on a unix socket and then on TCP."""
    return serve(image, request.param)


@pytest.fixture
def unix(serve: Callable[..., Door], image: MemoryImage) -> Door:
    """The image, served on a unix socket."""
    return serve(image)


@pytest.fixture
def connect(stack: ExitStack, engine_name: str) -> Callable[..., Pair]:
    """Serve one connection of an image over a socketpair."""

    def connect(
        image: MemoryImage,
        *,
        read_only: bool = False,
        workers: int = WORKERS,
        trace: Trace | None = None,
    ) -> Pair:
        ours, theirs = socket.socketpair()
        connect = of_one_image(stack.enter_context(engine(engine_name, image, workers)), trace)
        connection = connect(ours, export_of(image, read_only=read_only))
        pair = Pair(connection, stack.enter_context(RawClient(theirs)))
        stack.callback(pair.ended)
        stack.callback(connection.abort)
        return pair

    return connect
