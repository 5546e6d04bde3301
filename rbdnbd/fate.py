"""What becomes of a mapping's record, whichever way the mapping ends or fails."""

from __future__ import annotations

from dataclasses import asdict

from rbdnbd.image import RbdImage
from rbdnbd.record import Ownership, Record
from rbdnbd.spec import ClusterOptions, MapOptions


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
