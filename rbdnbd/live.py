"""The life of one mapping, from serving its image to closing it.

Everything is put together here, and taken apart in reverse: record, image, connection, device,
control socket. A mapping ends in one of two ways. Released: the device's page cache is written out
and the device disconnected, which makes the kernel send NBD_CMD_DISC. Detached: the kernel keeps
the device, and whatever is asked of it, until a successor attaches or its patience is over
(reattach_timeout). Either way what has been sent to us is answered, and the image is flushed and
closed, so that neither a lock nor a watcher is left behind.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Final

from rbdnbd import daemon
from rbdnbd.blockqueue import expect_successor, tune
from rbdnbd.control import Control, Document
from rbdnbd.devices import NbdDevices
from rbdnbd.engines import engine
from rbdnbd.errors import RbdnbdError
from rbdnbd.header import watching
from rbdnbd.holdings import Fate
from rbdnbd.image import RbdImage
from rbdnbd.kernel import Attachment
from rbdnbd.life import Life
from rbdnbd.names import announce
from rbdnbd.resize import following
from rbdnbd.spec import MapOptions
from rbdnbd.trace import Trace
from rbdnbd.transmission import Transmission
from rbdnbd.wire import FLAG_SEND_TRIM, Export, transmission_flags

log = logging.getLogger(__name__)

DRAIN_SECONDS: Final = 30.0
"""Time for the kernel to take the replies that are owed to it when a mapping ends."""
_RELEASE_SECONDS: Final = 2.0

Ready = Callable[[str, str], None]
"""Told the device and its cookie once it is live."""
Bind = Callable[[socket.socket, Export, int], Attachment]
"""Hands the kernel's end of a socket pair over, for an export with a block size in bytes."""


def live(
    stack: ExitStack,
    life: Life,
    fate: Fate,
    image: RbdImage,
    trace: Trace | None,
    options: MapOptions,
    bind: Bind,
    ready: Ready,
) -> None:
    """Serve the image to the kernel until the mapping ends, one way or the other."""
    flags = transmission_flags(read_only=image.read_only)
    if options.no_trim:
        flags &= ~FLAG_SEND_TRIM
    ours, kernels = socket.socketpair()
    connect = stack.enter_context(engine(image, trace))
    connection = connect(ours, Export(str(image.spec), image.size(), flags))
    goodbye = stack.enter_context(_serving(connection, life))
    daemon.notify(STATUS="attaching the device")
    block_size = options.block_size or (4096 if options.encryption else 512)
    attachment = bind(kernels, connection.export, block_size)
    fate.device_is_ours()
    stack.callback(leave_if_gone, image, fate)
    stack.callback(_let_go, attachment, connection, goodbye, fate, image)
    stack.enter_context(watching(image, lambda: life.ended(image.gone)))
    _accompany(stack, image, connection, attachment, options, block_size)
    log.info("%s is mapped to %s by %s", image.spec, attachment.device, attachment.method)
    ready(attachment.device, options.cookie)
    number = await_end(life, f"{image.spec} on {attachment.device}", image)
    fate.detached = (
        number in (signal.SIGTERM, signal.SIGHUP)
        and attachment.method == "netlink"
        and options.reattach_timeout > 0
    )


def _accompany(
    stack: ExitStack,
    image: RbdImage,
    connection: Transmission,
    attachment: Attachment,
    options: MapOptions,
    block_size: int,
) -> None:
    """Start what goes on beside the requests: size, snapshots, questions."""
    devices = NbdDevices()
    tune(devices, attachment.index, image.object_size())
    if attachment.method == "netlink" and options.reattach_timeout and not options.io_timeout:
        expect_successor(devices, attachment.index)
    if options.quiesce_hook:
        from rbdnbd.hook import quiescing

        stack.enter_context(quiescing(image, attachment.device, options.quiesce_hook))

    def resize_device(size: int) -> None:
        attachment.resize(size - size % block_size)

    size = connection.export.size
    stack.enter_context(following(image.size, size, resize_device, connection.resize))
    stack.enter_context(Control(_describer(image, connection, attachment, options)))
    announce(attachment.index, devices)


@contextmanager
def _serving(connection: Transmission, life: Life) -> Iterator[threading.Event]:
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
        connection.stop(DRAIN_SECONDS)
        thread.join(DRAIN_SECONDS)
        connection.abort()
        thread.join()


def _let_go(
    attachment: Attachment,
    connection: Transmission,
    goodbye: threading.Event,
    fate: Fate,
    image: RbdImage,
) -> None:
    """Leave the device to a successor, or disconnect it, unless somebody has done so.

    What the kernel has cached is written first, however long that takes; nothing can be written
    any more if the connection has ended, or the image is gone.
    """
    if goodbye.is_set():
        attachment.wait_released(_RELEASE_SECONDS)
    elif fate.detached:
        log.info("%s waits for a successor", attachment.device)
    else:
        attachment.disconnect(flush_limit=0.0 if connection.ended() or image.gone else None)


def leave_if_gone(image: RbdImage, fate: Fate | None = None) -> None:
    """End the process here if the image was removed: no call of librbd need ever return now."""
    if not image.gone:
        return
    if fate is not None and fate.owner is not None:
        fate.owner.remove()
    log.error("%s", image.gone)
    daemon.notify(STATUS=image.gone, ERRNO=errno.ENOENT)
    logging.shutdown()
    os._exit(1)


def await_end(life: Life, what: str, image: RbdImage) -> int:
    """Return the number of a signal, or 0 when the client says goodbye.

    Raises `RbdnbdError` if it hangs up, or the image is gone.
    """
    ending = life.wait()
    if image.gone:
        raise RbdnbdError(image.gone, errno.ENOENT)
    if isinstance(ending, str) and ending:
        raise RbdnbdError(f"the kernel has dropped {what}: {ending}")
    log.info("stopping %s", what)
    daemon.notify(STOPPING=1, STATUS="draining")
    return ending if isinstance(ending, int) else 0


def _describer(
    image: RbdImage, connection: Transmission, attachment: Attachment, options: MapOptions
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
        export = connection.export
        return {
            "id": os.getpid(),
            "pool": spec.pool,
            "namespace": spec.namespace,
            "image": spec.image,
            "snap": spec.snap,
            "snap_id": spec.snap_id,
            "device": attachment.device,
            "cookie": options.cookie,
            "size": export.size,
            "read_only": export.read_only,
            "attached_by": attachment.method,
            "reattach_timeout": options.reattach_timeout,
            "since": since,
            "stats": connection.stats.as_dict(),
            "in_flight": in_flight,
        }

    return describe
