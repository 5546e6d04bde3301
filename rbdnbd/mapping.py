"""Map an image to a device, or attach it to the device of a process that is gone.

Both end in the same life (`rbdnbd.live`); they differ in how the device is had. A map takes a free
one. An attach takes over one that the kernel has kept for its cookie: it makes sure that the image
is the one that the device is of, and that the last process can write no more, before the first
request is served.
"""

from __future__ import annotations

import errno
import logging
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rbdnbd import daemon
from rbdnbd.control import RUN_DIR
from rbdnbd.devices import NbdDevices
from rbdnbd.errors import Busy, CookieMismatch, NotMapped, RbdnbdError
from rbdnbd.fate import Fate
from rbdnbd.fencing import fence
from rbdnbd.handover import Offer
from rbdnbd.image import RbdImage
from rbdnbd.kernel import Attachment, NbdDriver
from rbdnbd.life import Life
from rbdnbd.live import Bind, Ready, live, opened
from rbdnbd.mapped import detach, left_behind, on_device
from rbdnbd.pressure import endure
from rbdnbd.record import Ownership, Record, find
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions
from rbdnbd.wire import Export

log = logging.getLogger(__name__)


def run_mapping(
    spec: ImageSpec,
    cluster: ClusterOptions,
    options: MapOptions,
    ready: Ready,
    run_dir: Path = RUN_DIR,
) -> None:
    """Map an image, tell `ready` once the device is live, and return when it is released.

    Main thread. Raises `RbdnbdError` and `Interrupted`, with everything undone.
    """
    driver = NbdDriver()
    driver.load(options.nbds_max, options.max_part)
    endure()
    life = Life()
    cookie = options.cookie or str(uuid.uuid4())
    options = replace(options, cookie=cookie, connections=options.connections or 1)
    with ExitStack() as stack:
        fate = stack.enter_context(Fate(Ownership(options.cookie, run_dir)))
        fate.device_is_ours()
        image = opened(stack, life, spec, without_cache(cluster, options), options)
        fate.record(image, cluster, options)
        live(stack, life, fate, image, options, _attaching(driver, options), ready, new=True)


def run_mapping_or_attach(
    spec: ImageSpec,
    cluster: ClusterOptions,
    options: MapOptions,
    ready: Ready,
    run_dir: Path = RUN_DIR,
) -> None:
    """Go on with the device that a process of ours has left of the image; else map it.

    So a service that is started again after a crash, or to be upgraded, does not map a second
    device. It goes on with the options that the device was mapped with. Main thread. Raises
    as `run_attach` and `run_mapping` do, and `Busy` if a living process has the image mapped.
    """
    device = left_behind(spec, cluster, NbdDevices(), run_dir)
    if device is None:
        run_mapping(spec, cluster, options, ready, run_dir)
        return
    if options.device not in (None, device):
        raise RbdnbdError(f"{spec} has been left on {device}, not on {options.device}")
    log.info("%s has been left on %s: going on there", spec, device)
    run_attach(None, cluster, replace(options, device=device), ready, run_dir)


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

    Without `spec`, all is as the device's record says. A predecessor that was killed is fenced; one
    that lives is refused, or, with `take_from_living`, ended when our image is open, so that
    the device waits for a moment only. Main thread. Raises as `run_mapping` does; the device is
    left as it was.
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
        spec, cluster, options = _as_recorded(known, device)
    options = replace(options, cookie=cookie, connections=_connections(known, device, options))
    without_lock = replace(options, exclusive=False)
    with Fate() as fate, ExitStack() as stack:
        image = opened(stack, life, spec, without_cache(cluster, options), without_lock)
        if predecessor:
            detach(device, cluster, say=log.info, driver=driver, run_dir=run_dir)
        fate.owner = Ownership(cookie, run_dir)
        _succeed(fate.owner.record, image, device)
        if options.exclusive:  # only now: a dead owner is waited for until it is fenced
            life.during(image.lock)
        fate.record(image, cluster, options)
        bind = _reattaching(driver, index, options)
        live(stack, life, fate, image, options, bind, ready, new=False)


def without_cache(cluster: ClusterOptions, options: MapOptions) -> ClusterOptions:
    """Keep librbd from answering writes that only this process has yet, if it may have a successor.

    The kernel does not repeat what has been answered. A write that only librbd's cache had would be
    lost with a killed process, and the successor's next flush would say that it is stored. An
    rbd_cache that was asked for on the command line stays.
    """
    if options.use_ioctl or not options.reattach_timeout:
        return cluster
    return replace(cluster, settings=(("rbd_cache", "false"), *cluster.settings))


def _attaching(driver: NbdDriver, options: MapOptions) -> Bind:
    def bind(offer: Offer, export: Export, block_size: int) -> Attachment:
        return driver.attach(
            *(offer() for _ in range(options.connections)),
            size=export.size,
            block_size=block_size,
            flags=export.flags,
            device=options.device,
            timeout=options.io_timeout,
            reattach_timeout=options.reattach_timeout,
            cookie=options.cookie,
            use_ioctl=options.use_ioctl,
        )

    return bind


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


def _connections(record: Record | None, device: str, options: MapOptions) -> int:
    """Return how many connections a device has, which is settled when it is mapped."""
    if record is None:
        return options.connections or 1
    has = int(record.options.get("connections", 1))
    if options.connections not in (0, has):
        raise RbdnbdError(f"{device} was mapped with --connections {has}, and keeps that number")
    return has


def _as_recorded(
    record: Record | None, device: str
) -> tuple[ImageSpec, ClusterOptions, MapOptions]:
    """Return what a device was mapped with."""
    if record is None:
        raise RbdnbdError(f"nothing is recorded of {device}: name the image that it is of")
    layers = tuple((form, file) for form, file in record.options["encryption"])
    queue = tuple((key, value) for key, value in record.options.get("queue", ()))
    lists = {"encryption": layers, "queue": queue}
    known = MapOptions(**record.options | lists | {"device": device})
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
