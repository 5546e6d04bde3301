"""What a mapping has before it has a device: an open image, and a record of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from rbdnbd import daemon
from rbdnbd.errors import RbdnbdError
from rbdnbd.image import RbdImage
from rbdnbd.life import Life
from rbdnbd.opening import open_image
from rbdnbd.record import Ownership, Record
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions


def opened(
    stack: ExitStack,
    life: Life,
    spec: ImageSpec,
    cluster: ClusterOptions,
    options: MapOptions,
    meanwhile: Callable[[], object] = lambda: None,
) -> RbdImage:
    """Open the image; it is flushed and closed when the stack unwinds.

    Main thread, which does something else `meanwhile`.
    """
    opening = open_image(
        spec,
        cluster,
        read_only=options.read_only,
        say=lambda doing: daemon.notify(STATUS=doing),
        exclusive=options.exclusive,
        encryption=options.encryption,
        polled=options.io_engine == "events",
    )
    image = life.during(lambda: stack.enter_context(opening), meanwhile)
    if not image.read_only:
        stack.callback(_flush, image)
    return image


def _flush(image: RbdImage) -> None:
    try:
        image.flush()
    except OSError as error:
        message = f"{image.spec} could not be flushed, the newest writes may be lost: {error}"
        raise RbdnbdError(message, error.errno or 0) from error


class Fate:
    """What becomes of the mapping's record, decided when all the rest has been undone."""

    def __init__(self, owner: Ownership | None = None) -> None:
        self.owner = owner
        self.detached = False
        self._ours = False

    def record(self, image: RbdImage, cluster: ClusterOptions, options: MapOptions) -> None:
        """Write down what a successor needs, before the device goes live."""
        assert self.owner is not None
        if self.owner.record is None:  # begun by us, it goes if we fail: the device is a stranger's
            self._ours = True
        self.owner.write(
            Record(
                cookie=options.cookie,
                spec=image.spec,
                image_id=image.image_id,
                address=image.address,
                cluster=cluster,
                options=asdict(options),
            )
        )

    def device_is_ours(self) -> None:
        """Have the record removed at the end, unless the mapping is detached."""
        self._ours = True

    def __enter__(self) -> Fate:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.owner is None:
            return
        if self.detached and kind is None:
            self.owner.detach()
        elif self._ours and not self.detached:
            self.owner.remove()
        else:  # for the next who attaches, and fences
            self.owner.give_up()
