"""Open an image as the mapping does, and hear why it is refused."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from rbdnbd.errors import RbdnbdError
from rbdnbd.image import RbdImage
from rbdnbd.opening import open_image
from rbdnbd.spec import ClusterOptions, ImageSpec

polled = False
"""Whether images are opened for the event loop; the fixture `each_handle` sets it."""


@contextmanager
def opened(
    spec: str | ImageSpec,
    options: ClusterOptions,
    *,
    read_only: bool = False,
    exclusive: bool = False,
    encryption: Sequence[tuple[str, str]] = (),
) -> Iterator[RbdImage]:
    """Open an image and tell nobody; one for the event loop gets blocking calls as well."""
    with open_image(
        ImageSpec.parse(spec) if isinstance(spec, str) else spec,
        options,
        read_only=read_only,
        say=lambda doing: None,
        exclusive=exclusive,
        encryption=encryption,
        polled=polled,
    ) as image:
        if not polled:
            yield image
            return
        with blocking_calls(image):
            yield image


def refusal(
    spec: str | ImageSpec,
    options: ClusterOptions,
    *,
    read_only: bool = False,
    exclusive: bool = False,
    encryption: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the sentence with which opening an image fails."""
    opening = opened(spec, options, read_only=read_only, exclusive=exclusive, encryption=encryption)
    with pytest.raises(RbdnbdError) as raised, opening:
        pass
    return raised.value.message


class Pending:
    """What a blocking call has started: an operation that one thread waits for."""

    member: Any = None

    def __init__(self) -> None:
        self.future: Future[int] = Future()

    def finish(self, result: int | Exception, now: float) -> None:
        """Wake up who waits."""
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


@contextmanager
def blocking_calls(image: RbdImage) -> Iterator[None]:
    """Give an image for the event loop the calls of any other, which wait for what they start."""
    polled = image.polled
    assert polled is not None
    turn = threading.Lock()  # for calls of the handle
    end = os.eventfd(0)

    def perform(start: Callable[[Pending], None]) -> int:
        pending = Pending()
        with turn:
            start(pending)
        return pending.future.result(60)

    def pump() -> None:
        while end not in select.select([polled, end], [], [])[0]:
            os.eventfd_read(polled.fileno())
            with turn:
                finished = polled.finished()
            for pending, result in finished:
                pending.finish(result, 0.0)

    def read(offset: int, length: int) -> bytes:
        buffer = bytearray(b"\xa5") * length  # as one that was used before
        count = perform(lambda pending: polled.start_read(pending, offset, buffer))
        return bytes(buffer[:count])

    def write_zeroes(offset: int, length: int, *, no_hole: bool) -> None:
        perform(lambda each: polled.start_write_zeroes(each, offset, length, no_hole=no_hole))

    calls = {
        "read": read,
        "write": lambda offset, data: perform(lambda it: polled.start_write(it, offset, data)),
        "flush": lambda: perform(polled.start_flush),
        "discard": lambda offset, length: perform(
            lambda pending: polled.start_discard(pending, offset, length)
        ),
        "write_zeroes": write_zeroes,
    }
    pumping = threading.Thread(target=pump)
    pumping.start()
    vars(image).update(calls)
    try:
        yield
    finally:
        for name in calls:
            del vars(image)[name]
        os.eventfd_write(end, 1)
        pumping.join()
        os.close(end)
