"""What is mapped on this host, and how to end it: the commands that speak of other processes.

A mapping is what its own process says it is, over its control socket, as long as the kernel still
has the device connected; neither alone is believed. A device whose process is gone is known by the
record that its cookie leads to.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from rbdnbd import daemon
from rbdnbd.cluster import default_pool
from rbdnbd.control import RUN_DIR, Document, mappings
from rbdnbd.devices import NbdDevices
from rbdnbd.errors import Busy, NoProcess, NotFlushed, NotMapped, RbdnbdError
from rbdnbd.kernel import NbdDriver
from rbdnbd.record import Ownership, Record, find, owned
from rbdnbd.spec import ClusterOptions, ImageSpec

Say = Callable[[str], None]

EXIT_SECONDS: Final = 120.0
"""Time for an unmapped or detached image's process to answer, flush and close."""
FORCED_FLUSH_SECONDS: Final = 3.0
"""Time for a device that is taken by force to write what is not written yet."""
FORCED_SECONDS: Final = 5.0
"""Time for all of that and for the process to end, which is killed then."""
_KILL_SECONDS: Final = 10.0
_LEAST_SECONDS: Final = 0.5
_HANGS_AFTER: Final = 2.0
SETTLE_SECONDS: Final = 10.0
"""Time for a process that is attaching or leaving a device to answer, or to be gone."""
_SAY_AFTER: Final = 3.0
_POLL_SECONDS: Final = 0.05


def mapped(devices: NbdDevices, run_dir: Path = RUN_DIR) -> list[Document]:
    """Return the document of every live mapping, in the order of the device numbers."""
    return [document for document in mappings(run_dir) if _has_device(document, devices)]


def on_device(index: int, devices: NbdDevices, run_dir: Path = RUN_DIR) -> Document | None:
    """Return the document of the live mapping that has a device."""
    device = str(devices.path(index))
    found = [each for each in mapped(devices, run_dir) if each["device"] == device]
    return found[0] if found else None


def recorded(index: int, devices: NbdDevices, run_dir: Path = RUN_DIR) -> Record | None:
    """Return the record of a device that a process of ours has, has left or was killed on."""
    cookie = devices.backend(index) if devices.connected(index) is not None else None
    return None if cookie is None else find(cookie, run_dir)


def left_behind(
    spec: ImageSpec, cluster: ClusterOptions, devices: NbdDevices, run_dir: Path = RUN_DIR
) -> str | None:
    """Return the device of an image that has lost its process; None if there is none.

    Raises `Busy` if a living process has the image mapped, `RbdnbdError` for several devices.
    """
    try:
        index = _index_of(spec, cluster, devices, run_dir)
    except NotMapped:
        return None
    if document := on_device(index, devices, run_dir):
        raise Busy(f"{spec} is mapped to {devices.path(index)} by process {document['id']}")
    return str(devices.path(index))


def spec_of(document: Document) -> ImageSpec:
    """Return the image that a mapping is of."""
    parts = ("pool", "namespace", "image", "snap", "snap_id")
    return ImageSpec(*(document[part] for part in parts))


def unmap(
    target: str | ImageSpec,
    cluster: ClusterOptions,
    *,
    force: bool,
    say: Say,
    driver: NbdDriver,
    run_dir: Path = RUN_DIR,
) -> None:
    """End the mapping of a device or image; return when the device is free and its process gone.

    Without `force` a device is refused that is mounted or otherwise held, or cannot be written out,
    unless it never can be, because its client was blocklisted. With it a cluster that does not
    answer is not waited for: the process is killed. `say` is told what takes long, and what is
    lost. Raises `RbdnbdError`.
    """
    deadline = time.monotonic() + FORCED_SECONDS
    index = _index_of(target, cluster, driver.devices, run_dir)
    document, owner = _whose(index, driver.devices, run_dir, anyones=force)
    with ExitStack() as stack:
        if document:
            gone = stack.enter_context(daemon.watching(document["id"]))
        limit = FORCED_FLUSH_SECONDS if force else None
        if owner or (force and document and _hangs(document)):
            limit = 0.0  # nobody is there to write to
        if owner:
            stack.enter_context(_removed_at_the_end(owner))
        release = partial(driver.release, index, force=force, flush_limit=limit)
        try:
            _said_if_slow(release, say, f"writing out what {driver.devices.path(index)} caches")
        except NotFlushed:
            if not _blocklisted(index, driver.devices, run_dir):
                raise
            say("this client was blocklisted: what is not written yet is lost")
            driver.release(index, flush_limit=0.0)
        if document and force:
            _end_by_force(document, gone, deadline, say, run_dir)
        elif document:
            _await_exit(document, gone, say, "is free")


def _said_if_slow(action: Callable[[], None], say: Say, what: str) -> None:
    slow = threading.Timer(_SAY_AFTER, say, [what])
    slow.start()
    try:
        action()
    finally:
        slow.cancel()


def _blocklisted(index: int, devices: NbdDevices, run_dir: Path) -> bool:
    """Tell whether the mapping of a device can write nothing any more, however long one waits."""
    document = on_device(index, devices, run_dir)
    return document is not None and document.get("blocklisted", False)


def _hangs(document: Document) -> bool:
    """Tell whether a mapping waits for the cluster."""
    return any(each["seconds"] > _HANGS_AFTER for each in document["in_flight"])


def _end_by_force(
    document: Document, gone: Callable[[float], bool], deadline: float, say: Say, run_dir: Path
) -> None:
    """Kill the process of a device that is free, unless it ends by itself before the deadline."""
    if gone(max(_LEAST_SECONDS, deadline - time.monotonic())):
        return
    pid, spec = document["id"], spec_of(document)
    say(f"process {pid} cannot flush and close {spec}: it is killed, its newest writes may be lost")
    os.kill(pid, signal.SIGKILL)
    if not gone(_KILL_SECONDS):
        raise RbdnbdError(f"{document['device']} is free, but process {pid} cannot be killed")
    Ownership(document["cookie"], run_dir).remove()


def detach(
    target: str | ImageSpec,
    cluster: ClusterOptions,
    *,
    say: Say,
    driver: NbdDriver,
    run_dir: Path = RUN_DIR,
) -> None:
    """End the process of a mapping in good order and leave the device to a successor.

    The kernel keeps what is asked of the device, for as long as `reattach_timeout` said when it was
    mapped. Returns when the process is gone. Raises `RbdnbdError`.
    """
    devices = driver.devices
    index = _index_of(target, cluster, devices, run_dir)
    document = on_device(index, devices, run_dir)
    if document is None:
        raise NoProcess(f"no process attached to {devices.path(index)} found")
    if document["attached_by"] != "netlink":
        raise RbdnbdError(
            f"{document['device']} was attached by ioctl, which ends with its process"
        )
    if not document["reattach_timeout"]:
        raise RbdnbdError(f"{document['device']} does not wait for a successor: unmap it")
    with daemon.watching(document["id"]) as gone:
        os.kill(document["id"], signal.SIGTERM)
        _await_exit(document, gone, say, "waits for a successor")


def _has_device(document: Document, devices: NbdDevices) -> bool:
    """Tell whether a mapping still has its device, which may be a successor's by now."""
    index = devices.index(document["device"])
    cookie = devices.backend(index)
    return devices.connected(index) is not None and cookie in (None, document["cookie"])


def _await_exit(
    document: Document, gone: Callable[[float], bool], say: Say, state_of_device: str
) -> None:
    if gone(_SAY_AFTER):
        return
    pid, spec = document["id"], spec_of(document)
    say(f"waiting for process {pid} to flush and close {spec}")
    if not gone(EXIT_SECONDS):
        raise RbdnbdError(
            f"{document['device']} {state_of_device}, but after {EXIT_SECONDS:.0f} s process {pid} "
            f"still has {spec} open (are the OSDs up?)"
        )


def _index_of(
    target: str | ImageSpec, cluster: ClusterOptions, devices: NbdDevices, run_dir: Path
) -> int:
    """Return the number of the device that a device path or an image's name stands for."""
    if isinstance(target, str) and target.startswith(f"{devices.dev}/"):
        return devices.index(target)
    spec = ImageSpec.parse(target) if isinstance(target, str) else target
    if not spec.pool:
        spec = spec.in_pool(default_pool(cluster))
    living = {
        devices.index(each["device"]) for each in mapped(devices, run_dir) if spec_of(each) == spec
    }
    known = {
        index
        for index in devices.indexes()
        if (record := recorded(index, devices, run_dir)) and record.spec == spec
    }
    found = sorted(living | known)
    shown = str(spec) if spec.snap_id is None else f"{spec}@{spec.snap_id}"
    if not found:
        raise NotMapped(f"{shown} is not mapped")
    if len(found) > 1:
        names = " and ".join(str(devices.path(index)) for index in found)
        raise RbdnbdError(f"{shown} is mapped to {names}: name the device")
    return found[0]


def _whose(
    index: int, devices: NbdDevices, run_dir: Path, *, anyones: bool
) -> tuple[Document | None, Ownership | None]:
    """Return the live mapping of a device, or what a dead one's has left; refuse a stranger's.

    A process that has the device but does not answer, because it is just attaching or leaving it,
    is waited for, unless it is to be `anyones`.
    """
    device, deadline = devices.path(index), time.monotonic() + SETTLE_SECONDS
    while (pid := devices.connected(index)) is not None:
        if document := on_device(index, devices, run_dir):
            return document, None
        cookie = devices.backend(index)
        if cookie is not None and (owner := _inherited(cookie, run_dir)):
            return None, owner
        if anyones:
            return None, None
        if cookie is None or not owned(cookie, run_dir) or time.monotonic() > deadline:
            raise RbdnbdError(
                f"{device} is connected, but no rbdnbd process answers for it (process {pid} "
                "attached it): --force disconnects it all the same"
            )
        time.sleep(_POLL_SECONDS)
    raise NotMapped(f"{device} is not mapped")


def _inherited(cookie: str, run_dir: Path) -> Ownership | None:
    """Own the record of a process that is gone, so that nobody attaches its device meanwhile."""
    if find(cookie, run_dir) is None:
        return None
    try:
        owner = Ownership(cookie, run_dir)
    except Busy:
        return None
    if owner.record is None:  # removed just now, and made anew by us
        owner.remove()
        return None
    return owner


@contextmanager
def _removed_at_the_end(owner: Ownership) -> Iterator[None]:
    """Remove a record when its device is free, and leave it if it cannot be freed."""
    try:
        yield
    except BaseException:
        owner.give_up()
        raise
    owner.remove()
