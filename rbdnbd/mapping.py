"""Map an image to a free device, or go on with the one that a process of ours has left.

A map is waited for: what it needs is imported when it is needed, and most of it while the cluster
answers.
"""

from __future__ import annotations

import logging
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rbdnbd.control import RUN_DIR
from rbdnbd.devices import NbdDevices
from rbdnbd.errors import RbdnbdError
from rbdnbd.holdings import Fate, opened, without_cache
from rbdnbd.life import Life
from rbdnbd.modprobe import load_driver
from rbdnbd.pressure import endure
from rbdnbd.record import Ownership
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions

if TYPE_CHECKING:
    from rbdnbd.handover import Offer
    from rbdnbd.kernel import Attachment
    from rbdnbd.live import Bind, Ready
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
    load_driver(NbdDevices(), nbds_max=options.nbds_max, max_part=options.max_part)
    endure()
    life = Life()
    cookie = options.cookie or str(uuid.uuid4())
    options = replace(options, cookie=cookie, connections=options.connections or 1)
    with ExitStack() as stack:
        fate = stack.enter_context(Fate(Ownership(options.cookie, run_dir)))
        fate.device_is_ours()
        opening = (spec, without_cache(cluster, options), options)
        image, trace = opened(stack, life, *opening, meanwhile=_import_the_rest)
        from rbdnbd.live import live

        fate.record(image, cluster, options)
        bind = _attaching(options)
        live(stack, life, fate, image, trace, options, bind, ready, new=True)


def _import_the_rest() -> None:
    """Import what a device needs, while the cluster is at work."""
    import rbdnbd.live  # noqa: F401


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
    from rbdnbd.attaching import run_attach
    from rbdnbd.mapped import left_behind

    device = left_behind(spec, cluster, NbdDevices(), run_dir)
    if device is None:
        run_mapping(spec, cluster, options, ready, run_dir)
        return
    if options.device not in (None, device):
        raise RbdnbdError(f"{spec} has been left on {device}, not on {options.device}")
    log.info("%s has been left on %s: going on there", spec, device)
    run_attach(None, cluster, replace(options, device=device), ready, run_dir)


def _attaching(options: MapOptions) -> Bind:
    from rbdnbd.kernel import NbdDriver

    def bind(offer: Offer, export: Export, block_size: int) -> Attachment:
        return NbdDriver().attach(
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
