"""Serve an image to NBD clients other than the kernel: no device, no root, no record."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Final

from rbdnbd.engines import engine
from rbdnbd.header import watching
from rbdnbd.holdings import opened
from rbdnbd.life import Life
from rbdnbd.listener import Listener
from rbdnbd.live import await_end, leave_if_gone
from rbdnbd.pressure import raise_file_limit
from rbdnbd.resize import following
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions
from rbdnbd.wire import Export, transmission_flags

log = logging.getLogger(__name__)

DRAIN_SECONDS: Final = 30.0
"""Time for clients to take the replies that are owed to them when a server stops."""


def run_server(
    spec: ImageSpec,
    cluster: ClusterOptions,
    listen: Callable[[], AbstractContextManager[socket.socket]],
    ready: Callable[[socket.socket, str], None],
    options: MapOptions,
) -> None:
    """Serve an image to NBD clients on the socket that `listen` opens, until a signal comes.

    `ready` is told the socket and the export's name. Main thread. Raises as `run_mapping` does.
    """
    raise_file_limit()
    life = Life()
    with ExitStack() as stack:
        image, trace = opened(stack, life, spec, cluster, options)
        flags = transmission_flags(read_only=image.read_only, multi_conn=True)
        export = Export(str(image.spec), image.size(), flags)
        listening = stack.enter_context(ExitStack())
        sock = listening.enter_context(listen())
        connect = stack.enter_context(engine(image, trace))
        listener = Listener(sock, image, export, connect)
        listener.start()
        stack.callback(listener.stop, DRAIN_SECONDS)
        stack.enter_context(following(image.size, export.size, lambda size: None, listener.resize))
        stack.callback(leave_if_gone, image, listening.close)
        stack.enter_context(watching(image, lambda: life.ended(image.gone)))
        log.info("%s is served on %s", image.spec, sock.getsockname())
        ready(sock, export.name)
        await_end(life, str(image.spec), image)
