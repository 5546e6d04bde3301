"""The engine that was asked for, for an image that was opened for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from rbdnbd.image import RbdImage
from rbdnbd.trace import Trace
from rbdnbd.transmission import Engine, of_one_image

_SWITCH_SECONDS: Final = 0.2
"""Workers hold the interpreter for microseconds and let go of it by themselves. Those that wait for
it need not look every 5 ms, a hundred of them at once, whether its holder is to be interrupted."""


@contextmanager
def engine(image: RbdImage, trace: Trace | None) -> Iterator[Engine]:
    """Serve the image's connections, which end before the `with` does, and trace them."""
    if image.polled is None:
        from rbdnbd.server import threads

        sys.setswitchinterval(_SWITCH_SECONDS)
        yield of_one_image(threads(image), trace)
        return
    from rbdnbd.events import EventConnection
    from rbdnbd.loop import Loop

    with Loop(image.polled) as loop:
        yield of_one_image(partial(EventConnection, loop), trace)
