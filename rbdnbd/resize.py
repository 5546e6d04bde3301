"""Follow the size of an image: what anyone makes of it, the block device shows within a second.

The size is asked for, not waited for: librbd keeps it up to date by itself (a watch on the image's
header), and `image.size()` costs less than a microsecond. A callback of librbd into Python that
called the image would deadlock, and the kernel may hold a resize until every request in flight is
answered, so this is a thread that answers none.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rbdnbd.errors import RbdnbdError

log = logging.getLogger(__name__)

INTERVAL: Final = 0.5
"""Seconds between two looks."""


@contextmanager
def following(
    size_of_image: Callable[[], int],
    size: int,
    resize_device: Callable[[int], None],
    resize_export: Callable[[int], None],
) -> Iterator[None]:
    """Pass changes of the image's size on, from `size` bytes, for the time of a `with`.

    A larger image is exported before the device grows, and a device shrinks before the export, so
    that no request of the kernel's is ever past the end.
    """
    stop = threading.Event()

    def follow(known: int) -> None:
        while not stop.wait(INTERVAL):
            try:
                new = size_of_image()
                if new == known:
                    continue
                steps = (resize_export, resize_device)
                for step in steps if new > known else reversed(steps):
                    step(new)
            except (OSError, RbdnbdError) as error:
                log.warning("the new size of the image is not passed on yet: %s", error)
            else:
                log.info("the image was resized from %d to %d bytes", known, new)
                known = new

    thread = threading.Thread(target=follow, args=(size,), name="size", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(INTERVAL)  # not for a resize that waits for requests which only we can end
