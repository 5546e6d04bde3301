"""Fencing: a dead predecessor on a device never writes again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from rbdnbd.cluster import blocklist, client_address
from rbdnbd.errors import RbdnbdError
from rbdnbd.image import RbdImage, lockable, owners


def fence(image: RbdImage, address: str) -> None:
    """Make sure that a dead client of this image, our own predecessor, can never write again.

    `address` is what its `RbdImage.address` was; no other client is touched. When this returns,
    whatever it had sent either has been done or never will be, and a lock that it held is free: the
    next write need not wait for its watch to time out. To do it again changes nothing. Any thread.
    Raises `RbdnbdError`.
    """
    address = client_address(address)
    if address == image.address:
        raise RbdnbdError(f"{address} is this process itself, which is not to be fenced")
    # To break the lock is to blocklist once more: at the same time, for a monitor makes about one
    # new map a second (paxos_propose_interval).
    with ThreadPoolExecutor(1) as breaking:
        broken = breaking.submit(_break_lock, image, address)
        blocklist(image.client, address)
        broken.result()
    if image.polled:
        image.polled.wait_for_latest_osdmap()


def _break_lock(image: RbdImage, address: str) -> None:
    """Break the lock of an image that is open for writing, if the client at `address` has it."""
    import rbd

    handle = image.handle
    if image.read_only or not lockable(handle):
        return
    try:
        if address in owners(handle):
            handle.lock_break(rbd.RBD_LOCK_MODE_EXCLUSIVE, address)
    except rbd.Error as error:
        if address in owners(handle):  # and nobody else has been quicker
            message = f"cannot break the lock that {address} has on {image.spec}: {error}"
            raise RbdnbdError(message, getattr(error, "errno", None) or 0) from error
