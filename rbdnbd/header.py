"""Whether the image is still there: its header object, asked for beside the requests.

librbd does not mind (16.2, 18.2): what it reads of an image that was removed are zeroes, and its
writes wait for ever or make objects that nobody will find. Its watch keeps `rbd rm` away from an
image that is open for writing, as long as the cluster can be reached; one that is open read-only,
and its snapshots, have no watch: anyone may remove or shrink them, and librbd does not notice. So
once a second one request reads the keys of the header that tell.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rbdnbd.cluster import open_pool
from rbdnbd.image import RbdImage

if TYPE_CHECKING:
    import rados

log = logging.getLogger(__name__)

INTERVAL: Final = 1.0
"""Seconds between two looks; one that is waiting for the cluster is not repeated."""


@contextmanager
def watching(image: RbdImage, gone: Callable[[], None]) -> Iterator[None]:
    """Look for the image, or its snapshot, in a thread for the time of a `with`.

    When it is gone, `image.gone` says so, and `gone` is called, once. A read-only image that has
    become smaller has its new size: `RbdImage.size`. A look that fails is logged once.
    """
    stop = threading.Event()
    snap_id = image.snap_id()
    ioctx = open_pool(image.client, image.spec)

    def look_on() -> None:
        failed = False
        while not stop.wait(INTERVAL):
            try:
                size = _size(ioctx, image.image_id, snap_id)
            except LookupError as error:
                image.gone = f"{image.spec} is gone: {error.args[0]}"
                gone()
                return
            except Exception as error:
                if not failed and not stop.is_set():
                    log.warning("cannot see whether %s is still there: %s", image.spec, error)
                failed = True
            else:
                image.shrink_to(size)

    thread = threading.Thread(target=look_on, name="header", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(INTERVAL)
        if not thread.is_alive():  # or it waits for a cluster that does not answer
            ioctx.close()


def _size(ioctx: rados.Ioctx, image_id: str, snap_id: int | None) -> int | None:
    """Return the size of the image in bytes, None of a snapshot, which keeps its own.

    Raises `LookupError` with the reason when the image, or the snapshot, was removed. Source:
    cls_rbd.cc, "size" and RBD_SNAP_KEY_PREFIX.
    """
    import rados

    key = "size" if snap_id is None else f"snapshot_{snap_id:016x}"
    try:
        with rados.ReadOpCtx() as read:
            found, _ = ioctx.get_omap_vals_by_keys(read, (key,))
            ioctx.operate_read_op(read, f"rbd_header.{image_id}")
            values = dict(found)
    except rados.ObjectNotFound as error:
        raise LookupError("the image was removed") from error
    if key not in values:
        raise LookupError("the snapshot was removed")
    return int(struct.unpack("<Q", values[key])[0]) if snap_id is None else None
