"""Attach an image to the device of a process that is gone.

The kernel has kept the device for its cookie. Before the first request is served it is made sure
that the image is the one that the device is of, and that the last process can write no more.
"""

from __future__ import annotations

import errno
import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rbdnbd import daemon
from rbdnbd.control import RUN_DIR
from rbdnbd.devices import NbdDevices
from rbdnbd.errors import Busy, CookieMismatch, NotMapped, RbdnbdError
from rbdnbd.fencing import fence
from rbdnbd.handover import Offer
from rbdnbd.holdings import Fate, opened, without_cache
from rbdnbd.image import RbdImage
from rbdnbd.kernel import Attachment, NbdDriver
from rbdnbd.life import Life
from rbdnbd.live import Bind, Ready, live
from rbdnbd.mapped import detach, on_device
from rbdnbd.pressure import endure
from rbdnbd.record import Ownership, Record, find
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions
from rbdnbd.wire import Export

log = logging.getLogger(__name__)


def run_attach(
    spec: ImageSpec | None,
    cluster: ClusterOptions,
    options: MapOptions,
    ready: Ready,
    run_dir: Path = RUN_DIR,
    *,
    take_from_living: bool = False,
) -> None:
    """Serve a device, `options.device`, whose process is gone, until it is released or detached.

    Without `spec`, all but the trace is as the device's record says. A predecessor that was killed
    is fenced; one that lives is refused, or, with `take_from_living`, ended when our image is open:
    the device waits for a moment. Main thread. Raises as `run_mapping`, the device as it was.
    """
    endure()
    life, driver = Life(), NbdDriver()
    assert options.device is not None
    device, index = options.device, driver.devices.index(options.device)
    cookie = _cookie_on(index, driver.devices, options)
    known = find(cookie, run_dir)
    predecessor = on_device(index, driver.devices, run_dir)
    if predecessor and not take_from_living:
        raise Busy(f"{device} has process {predecessor['id']} connected", errno.EBUSY)
    if spec is None:
        spec, cluster, options = _as_recorded(known, options)
    options = replace(options, cookie=cookie, connections=_connections(known, options))
    without_lock = replace(options, exclusive=False)
    with Fate() as fate, ExitStack() as stack:
        image, trace = opened(stack, life, spec, without_cache(cluster, options), without_lock)
        if predecessor:
            detach(device, cluster, say=log.info, driver=driver, run_dir=run_dir)
        fate.owner = Ownership(cookie, run_dir)
        _succeed(fate.owner.record, image, device)
        if options.exclusive:  # only now: a dead owner is waited for until it is fenced
            life.during(image.lock)
        fate.record(image, cluster, options)
        bind = _reattaching(driver, index, options)
        live(stack, life, fate, image, trace, options, bind, ready, new=False)


def _reattaching(driver: NbdDriver, index: int, options: MapOptions) -> Bind:
    def bind(offer: Offer, export: Export, block_size: int) -> Attachment:
        return driver.reattach(
            index,
            offer,
            options.connections,
            size=export.size - export.size % block_size,
            timeout=options.io_timeout,
            reattach_timeout=options.reattach_timeout,
            cookie=options.cookie,
        )

    return bind


def _cookie_on(index: int, devices: NbdDevices, options: MapOptions) -> str:
    """Return the cookie of a device that is to be attached again."""
    device = devices.path(index)
    if devices.connected(index) is None:
        raise NotMapped(f"{device} is not mapped", errno.ENODEV)
    cookie = devices.backend(index)
    if cookie is None:
        raise RbdnbdError(f"{device} has no cookie: only what netlink attached can be taken over")
    if options.cookie and options.cookie != cookie:
        raise CookieMismatch(f"cookie mismatch: {device} has another one", errno.EINVAL)
    return cookie


def _connections(record: Record | None, options: MapOptions) -> int:
    """Return how many connections a device has, which is settled when it is mapped."""
    if record is None:
        return options.connections or 1
    has = int(record.options.get("connections", 1))
    if options.connections not in (0, has):
        had = f"{options.device} was mapped with --connections {has}"
        raise RbdnbdError(f"{had}, and keeps that number")
    return has


def _as_recorded(
    record: Record | None, options: MapOptions
) -> tuple[ImageSpec, ClusterOptions, MapOptions]:
    """Return what a device was mapped with; the trace is this process's own."""
    if record is None:
        raise RbdnbdError(f"nothing is recorded of {options.device}: name the image that it is of")
    layers = tuple((form, file) for form, file in record.options["encryption"])
    queue = tuple((key, value) for key, value in record.options.get("queue", ()))
    own = {"device": options.device, "trace": options.trace, "trace_data": options.trace_data}
    known = MapOptions(**record.options | {"encryption": layers, "queue": queue} | own)
    return record.spec, record.cluster, known


def _succeed(record: Record | None, image: RbdImage, device: str) -> None:
    """Make sure that the image is the device's, and that its last process cannot write any more."""
    if record is None:
        log.warning("nothing is known of the last process of %s: it is not fenced", device)
        return
    if record.image_id != image.image_id or record.spec.snap != image.spec.snap:
        raise RbdnbdError(f"{device} is a mapping of {record.spec}, not of {image.spec}")
    if not record.detached and not image.read_only:
        daemon.notify(STATUS=f"fencing the last process of {device}")
        fence(image, record.address)
