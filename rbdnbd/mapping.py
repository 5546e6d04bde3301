"""The life of one mapping or server, from opening the image to closing it.

Everything is put together here, and taken apart in reverse: image, connection, device, control
socket. To stop is to write out the device's page cache, to disconnect it, which makes the kernel
send NBD_CMD_DISC, to answer what was read before that, and to flush and close the image, so that
neither a lock nor a watcher is left behind.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from rbdnbd import daemon
from rbdnbd.blockqueue import tune
from rbdnbd.control import Control, Document
from rbdnbd.errors import RbdnbdError
from rbdnbd.image import RbdImage, open_image
from rbdnbd.kernel import Attachment, NbdDriver
from rbdnbd.life import Life
from rbdnbd.listener import Listener
from rbdnbd.server import Connection
from rbdnbd.spec import ClusterOptions, ImageSpec
from rbdnbd.wire import Export, transmission_flags

log = logging.getLogger(__name__)

DRAIN_SECONDS: Final = 30.0
"""Time for clients to take the replies that are owed to them when a server stops."""
_RELEASE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """What `rbdnbd map` was asked for: `block_size` in bytes, `io_timeout` in seconds."""

    read_only: bool = False
    device: str | None = None
    block_size: int = 512
    io_timeout: int | None = None
    use_ioctl: bool = False


def run_mapping(
    spec: ImageSpec,
    cluster: ClusterOptions,
    options: MapOptions,
    ready: Callable[[str], None],
) -> None:
    """Map an image, tell `ready` its device once it is live, and return when it is unmapped.

    Main thread. Raises `RbdnbdError` and `Interrupted`, with everything undone.
    """
    life = Life()
    with ExitStack() as stack:
        image = _opened(stack, spec, cluster, life, read_only=options.read_only)
        flags = transmission_flags(read_only=image.read_only)
        export = Export(str(image.spec), image.size(), flags)
        attachment = _attached(stack, image, export, options, life)
        ready(attachment.device)
        _await_end(life, f"{image.spec} on {attachment.device}")


def run_server(
    spec: ImageSpec,
    cluster: ClusterOptions,
    listen: Callable[[], AbstractContextManager[socket.socket]],
    ready: Callable[[socket.socket, str], None],
    *,
    read_only: bool,
) -> None:
    """Serve an image to NBD clients on the socket that `listen` opens, until a signal comes.

    `ready` is told the socket and the export's name. Main thread. Raises as `run_mapping` does.
    """
    life = Life()
    with ExitStack() as stack:
        image = _opened(stack, spec, cluster, life, read_only=read_only)
        flags = transmission_flags(read_only=image.read_only, multi_conn=True)
        export = Export(str(image.spec), image.size(), flags)
        sock = stack.enter_context(listen())
        listener = Listener(sock, image, export)
        listener.start()
        stack.callback(listener.stop, DRAIN_SECONDS)
        log.info("%s is served on %s", image.spec, sock.getsockname())
        ready(sock, export.name)
        _await_end(life, str(image.spec))


def _opened(
    stack: ExitStack, spec: ImageSpec, cluster: ClusterOptions, life: Life, *, read_only: bool
) -> RbdImage:
    """Open the image; it is flushed and closed when the stack unwinds."""

    def say(doing: str) -> None:
        daemon.notify(STATUS=doing)

    image = life.during(
        lambda: stack.enter_context(open_image(spec, cluster, read_only=read_only, say=say))
    )
    if not image.read_only:
        stack.callback(_flush, image)
    return image


def _flush(image: RbdImage) -> None:
    try:
        image.flush()
    except OSError as error:
        message = f"{image.spec} could not be flushed, the newest writes may be lost: {error}"
        raise RbdnbdError(message, error.errno or 0) from error


def _attached(
    stack: ExitStack, image: RbdImage, export: Export, options: MapOptions, life: Life
) -> Attachment:
    """Serve the image on a socket pair and attach its other end to the kernel."""
    cookie = str(uuid.uuid4())
    ours, kernels = socket.socketpair()
    connection = Connection(ours, image, export)
    goodbye = stack.enter_context(_serving(connection, life))
    daemon.notify(STATUS="attaching the device")
    driver = NbdDriver()
    attachment = driver.attach(
        kernels,
        size=export.size,
        block_size=options.block_size,
        flags=export.flags,
        device=options.device,
        timeout=options.io_timeout,
        cookie=cookie,
        use_ioctl=options.use_ioctl,
    )
    stack.callback(_detach, attachment, connection, goodbye)
    tune(driver.devices, attachment.index, image.object_size())
    describe = _describer(image, export, connection, attachment, cookie)
    stack.enter_context(Control(describe))
    log.info("%s is mapped to %s by %s", image.spec, attachment.device, attachment.method)
    return attachment


@contextmanager
def _serving(connection: Connection, life: Life) -> Iterator[threading.Event]:
    """Serve the kernel in threads; the event says that it has said goodbye (NBD_CMD_DISC)."""
    goodbye = threading.Event()

    def serve() -> None:
        reason = "the server has failed"
        try:
            reason = connection.serve()
            if not reason:
                goodbye.set()
        finally:
            life.ended(reason)

    thread = threading.Thread(target=serve, name="nbd-0", daemon=True)
    thread.start()
    try:
        yield goodbye
    finally:
        connection.stop()
        thread.join(DRAIN_SECONDS)
        connection.abort()
        thread.join()


def _detach(attachment: Attachment, connection: Connection, goodbye: threading.Event) -> None:
    """Disconnect the device, unless somebody has: then it is free once that one is through.

    What the kernel has cached is written first, however long that takes; nothing can be written
    any more if the connection has ended.
    """
    if goodbye.is_set():
        attachment.wait_released(_RELEASE_SECONDS)
    else:
        attachment.disconnect(flush_limit=0.0 if connection.ended() else None)


def _await_end(life: Life, what: str) -> None:
    """Return when a signal comes or the client says goodbye; raise when it just hangs up."""
    ending = life.wait()
    if isinstance(ending, str) and ending:
        raise RbdnbdError(f"the kernel has dropped {what}: {ending}")
    log.info("stopping %s", what)
    daemon.notify(STOPPING=1, STATUS="draining")


def _describer(
    image: RbdImage, export: Export, connection: Connection, attachment: Attachment, cookie: str
) -> Callable[[], Document]:
    """Return the function that describes a mapping, for the control socket."""
    spec, since = image.spec, datetime.now(UTC).isoformat(timespec="seconds")

    def describe() -> Document:
        now = time.monotonic()
        in_flight = [
            {"command": request.name, "offset": request.offset, "length": request.length}
            | {"seconds": round(now - started, 3)}
            for request, started in connection.in_flight()
        ]
        return {
            "id": os.getpid(),
            "pool": spec.pool,
            "namespace": spec.namespace,
            "image": spec.image,
            "snap": spec.snap,
            "device": attachment.device,
            "cookie": cookie,
            "size": export.size,
            "read_only": export.read_only,
            "attached_by": attachment.method,
            "since": since,
            "stats": connection.stats.as_dict(),
            "in_flight": in_flight,
        }

    return describe
