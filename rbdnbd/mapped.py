"""What is mapped on this host, and how to end it: the commands that speak of other processes.

A mapping is what its own process says it is, over its control socket, as long as the kernel still
has the device connected; neither alone is believed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rbdnbd import daemon
from rbdnbd.control import RUN_DIR, Document, mappings
from rbdnbd.devices import NbdDevices
from rbdnbd.errors import RbdnbdError
from rbdnbd.image import default_pool
from rbdnbd.kernel import NbdDriver
from rbdnbd.spec import ClusterOptions, ImageSpec

EXIT_SECONDS: Final = 120.0
"""Time for an unmapped image's process to answer, flush and close."""
FORCED_FLUSH_SECONDS: Final = 10.0
"""Time for a device that is taken by force to write what is not written yet."""
_SAY_AFTER: Final = 3.0


def mapped(devices: NbdDevices, run_dir: Path = RUN_DIR) -> list[Document]:
    """Return the document of every live mapping, in the order of the device numbers."""
    return [document for document in mappings(run_dir) if _has_device(document, devices)]


def _has_device(document: Document, devices: NbdDevices) -> bool:
    """Tell whether a mapping still has its device, which may be a successor's by now."""
    index = devices.index(document["device"])
    cookie = devices.backend(index)
    return devices.connected(index) is not None and cookie in (None, document["cookie"])


def spec_of(document: Document) -> ImageSpec:
    """Return the image that a mapping is of."""
    return ImageSpec(document["pool"], document["namespace"], document["image"], document["snap"])


def unmap(
    target: str,
    cluster: ClusterOptions,
    *,
    force: bool,
    say: Callable[[str], None],
    driver: NbdDriver,
    run_dir: Path = RUN_DIR,
) -> None:
    """End the mapping of a device or an image; return when the device is free and its process gone.

    Without `force` a device that is mounted or otherwise held is refused. `say` is told what takes
    long. Raises `RbdnbdError`.
    """
    devices = driver.devices
    if target.startswith(f"{devices.dev}/"):
        index = devices.index(target)
        document = _on_device(index, driver, force=force, run_dir=run_dir)
    else:
        document = _of_image(target, cluster, devices, run_dir)
        index = devices.index(document["device"])
    with ExitStack() as stack:
        if document:
            gone = stack.enter_context(daemon.watching(document["id"]))
        slow = threading.Timer(_SAY_AFTER, say, [f"writing out what {devices.path(index)} caches"])
        slow.start()
        stack.callback(slow.cancel)
        driver.release(index, force=force, flush_limit=FORCED_FLUSH_SECONDS if force else None)
        slow.cancel()
        if document:
            _await_exit(document, gone, say)


def _await_exit(
    document: Document, gone: Callable[[float], bool], say: Callable[[str], None]
) -> None:
    if gone(_SAY_AFTER):
        return
    pid, spec = document["id"], spec_of(document)
    say(f"waiting for process {pid} to flush and close {spec}")
    if not gone(EXIT_SECONDS):
        raise RbdnbdError(
            f"{document['device']} is free, but after {EXIT_SECONDS:.0f} s process {pid} still "
            f"has {spec} open (are the OSDs up?)"
        )


def _on_device(index: int, driver: NbdDriver, *, force: bool, run_dir: Path) -> Document | None:
    devices = driver.devices
    device = str(devices.path(index))
    pid = devices.connected(index)
    if pid is None:
        raise RbdnbdError(f"{device} is not mapped")
    for document in mapped(devices, run_dir):
        if document["device"] == device:
            return document
    if force:
        return None
    raise RbdnbdError(
        f"{device} is connected, but no rbdnbd process answers for it (process {pid} attached "
        "it): --force disconnects it all the same"
    )


def _of_image(target: str, cluster: ClusterOptions, devices: NbdDevices, run_dir: Path) -> Document:
    spec = ImageSpec.parse(target)
    if not spec.pool:
        spec = spec.in_pool(default_pool(cluster))
    found = [document for document in mapped(devices, run_dir) if spec_of(document) == spec]
    if not found:
        raise RbdnbdError(f"{spec} is not mapped")
    if len(found) > 1:
        names = " and ".join(document["device"] for document in found)
        raise RbdnbdError(f"{spec} is mapped to {names}: name the device")
    return found[0]
