"""The engine that was asked for, for an image that was opened for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rbdnbd.events import EventConnection
from rbdnbd.image import RbdImage
from rbdnbd.loop import Loop
from rbdnbd.server import threads
from rbdnbd.transmission import Engine


@contextmanager
def engine(image: RbdImage) -> Iterator[Engine]:
    """Serve the image's connections, which end before the `with` does."""
    if image.polled is None:
        yield threads(image)
        return
    with Loop(image.polled) as loop:
        yield partial(EventConnection, loop)
