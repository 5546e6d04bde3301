"""The life of one mapping, from serving its image to closing it.

Everything is put together here, and taken apart in reverse: record, image, connections, device,
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
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Final

from rbdnbd import daemon
from rbdnbd.blockqueue import (
    KERNELS_MILLISECONDS,
    NEVER_MILLISECONDS,
    SIBLINGS_MILLISECONDS,
    SUCCESSOR_MILLISECONDS,
    set_timer,
    tune,
)
from rbdnbd.connections import DRAIN_SECONDS, Connections
from rbdnbd.control import Control, Document
from rbdnbd.devices import NbdDevices
from rbdnbd.engines import engine
from rbdnbd.errors import RbdnbdError
from rbdnbd.handover import Offer
from rbdnbd.header import watching
from rbdnbd.holdings import Fate
from rbdnbd.image import RbdImage
from rbdnbd.kernel import Attachment
from rbdnbd.life import Life
from rbdnbd.names import announce
from rbdnbd.resize import following
from rbdnbd.spec import MapOptions
from rbdnbd.trace import Trace
from rbdnbd.wire import FLAG_SEND_TRIM, Export, transmission_flags

log = logging.getLogger(__name__)

_RELEASE_SECONDS: Final = 2.0

Ready = Callable[[str, str], None]
"""Told the device and its cookie once it is live."""
Bind = Callable[[Offer, Export, int], Attachment]
"""Hands the kernel's ends of connections over, for an export with a block size in bytes."""


def live(
    stack: ExitStack,
    life: Life,
    fate: Fate,
    image: RbdImage,
    trace: Trace | None,
    options: MapOptions,
    bind: Bind,
    ready: Ready,
    *,
    new: bool,
) -> None:
    """Serve the image to the kernel until the mapping ends, one way or the other.

    `new` is false for a device that is in use already.
    """
    export = _export(image, options)
    connect = stack.enter_context(engine(image, trace))
    several = options.connections > 1
    connections = Connections(connect, export, life.ended, several=several)
    stack.enter_context(connections)
    daemon.notify(STATUS="attaching the device")
    block_size = options.block_size or (4096 if options.encryption else 512)
    attachment = bind(connections.offer, export, block_size)
    fate.device_is_ours()
    stack.callback(leave_if_gone, image, fate.forget)
    stack.callback(_let_go, attachment, connections, options, fate, image)
    stack.enter_context(watching(image, lambda: life.ended(image.gone)))
    connections.attached(attachment.replace if several else None)
    _set_queue(image, attachment, options, new=new)
    _set_timer(attachment, options)
    _accompany(stack, image, connections, attachment, options, block_size)
    log.info("%s is mapped to %s by %s", image.spec, attachment.device, attachment.method)
    ready(attachment.device, options.cookie)
    number = await_end(life, f"{image.spec} on {attachment.device}", image)
    fate.detached = (
        number in (signal.SIGTERM, signal.SIGHUP)
        and attachment.method == "netlink"
        and options.reattach_timeout > 0
    )


def _export(image: RbdImage, options: MapOptions) -> Export:
    """Return what the kernel is told of the image."""
    several = options.connections > 1
    flags = transmission_flags(read_only=image.read_only, multi_conn=several)
    if options.no_trim:
        flags &= ~FLAG_SEND_TRIM
    return Export(str(image.spec), image.size(), flags)


def _set_queue(image: RbdImage, attachment: Attachment, options: MapOptions, *, new: bool) -> None:
    """Set the device's queue; who uses a device already keeps it, whatever the kernel refuses."""
    try:
        tune(NbdDevices(), attachment.index, image.object_size(), options.queue)
    except RbdnbdError as error:
        if new:
            raise
        log.warning("%s", error)


def _set_timer(attachment: Attachment, options: MapOptions) -> None:
    """Have the driver send to a successor what this process leaves unanswered."""
    if options.io_timeout:
        return
    milliseconds = KERNELS_MILLISECONDS
    if options.connections > 1:
        milliseconds = SIBLINGS_MILLISECONDS if options.reattach_timeout else NEVER_MILLISECONDS
    elif attachment.method == "netlink" and options.reattach_timeout:
        milliseconds = SUCCESSOR_MILLISECONDS
    set_timer(NbdDevices(), attachment.index, milliseconds)


def _accompany(
    stack: ExitStack,
    image: RbdImage,
    connections: Connections,
    attachment: Attachment,
    options: MapOptions,
    block_size: int,
) -> None:
    """Start what goes on beside the requests: size, snapshots, questions."""
    if options.quiesce_hook:
        from rbdnbd.hook import quiescing

        stack.enter_context(quiescing(image, attachment.device, options.quiesce_hook))

    def resize_device(size: int) -> None:
        attachment.resize(size - size % block_size)
        _set_queue(image, attachment, options, new=False)  # the driver puts discard back

    size = connections.export.size
    stack.enter_context(following(image.size, size, resize_device, connections.resize))
    stack.enter_context(Control(_describer(image, connections, attachment, options)))
    announce(attachment.index, NbdDevices())


def _let_go(
    attachment: Attachment,
    connections: Connections,
    options: MapOptions,
    fate: Fate,
    image: RbdImage,
) -> None:
    """Leave the device to a successor, or disconnect it, unless somebody has done so.

    What the kernel has cached is written first, however long that takes; nothing can be written
    any more if the connections have ended, or the image is gone.
    """
    if connections.goodbye.is_set():
        attachment.wait_released(_RELEASE_SECONDS)
    elif fate.detached:
        if options.connections > 1:  # nothing that is left unread may have the long timer
            set_timer(NbdDevices(), attachment.index, SUCCESSOR_MILLISECONDS)
            connections.answer_what_was_sent(DRAIN_SECONDS)
        log.info("%s waits for a successor", attachment.device)
    else:
        attachment.disconnect(flush_limit=0.0 if connections.ended() or image.gone else None)


def leave_if_gone(image: RbdImage, undo: Callable[[], None]) -> None:
    """End the process here if the image was removed: no call of librbd need ever return now.

    `undo` removes what would be left of it.
    """
    if not image.gone:
        return
    undo()
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
    image: RbdImage, connections: Connections, attachment: Attachment, options: MapOptions
) -> Callable[[], Document]:
    """Return the function that describes a mapping, for the control socket."""
    spec, since = image.spec, datetime.now(UTC).isoformat(timespec="seconds")

    def describe() -> Document:
        now = time.monotonic()
        in_flight = [
            {"command": request.name, "offset": request.offset, "length": request.length}
            | {"seconds": round(now - started, 3)}
            for request, started in connections.in_flight()
        ]
        export = connections.export
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
            "connections": options.connections,
            "since": since,
            "blocklisted": connections.blocklisted(),
            "stats": connections.stats().as_dict(),
            "in_flight": in_flight,
        }

    return describe
