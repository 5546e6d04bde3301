"""RBD images through librbd: what the server reads and writes, and their lock.

`RbdImage` is the server's `Image` on a real cluster. Every call blocks, releases the GIL while
librbd works, and may be made from any thread. What librbd raises is translated here, once,
into the builtin `OSError` that the server puts on the wire (`rbd.OSError` is not one); by `lock`
into an `RbdnbdError` that says in words why not.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, cast

from rbdnbd.cluster import client_address
from rbdnbd.errors import RbdnbdError, image_error
from rbdnbd.spec import ClusterOptions, ImageSpec

if TYPE_CHECKING:
    import rados
    import rbd

    from rbdnbd.polled import PolledImage

_AT_ONCE: Final = 1 << 30


class RbdImage:
    """One open RBD image; `opening.open_image` makes and closes it.

    `cluster` are the options that it was opened with, `image_id` what stays the same when it is
    renamed, `address` this process's own as a client of the cluster, for a successor's `fence`.
    `gone` says so when the image, or its snapshot, was removed (`header.watching`).
    An image that was opened for the event loop has `polled`, which takes its requests: the blocking
    calls for reading and changing data are not there.
    """

    def __init__(
        self,
        image: rbd.Image | PolledImage,
        client: rados.Rados,
        spec: ImageSpec,
        cluster: ClusterOptions,
        *,
        read_only: bool,
    ) -> None:
        import rbd

        self.spec = spec
        self.cluster = cluster
        self.read_only = read_only
        self.image_id = image.id()
        self.polled = None if isinstance(image, rbd.Image) else image
        self.address = client_address(self.polled.addresses if self.polled else client.get_addrs())
        self.handle = self._image = cast("rbd.Image", image)
        self.client = client
        self.gone = ""
        self._opened_size, self._lost = image.size(), 0  # as the header has it, encrypted or not
        self._failure = rbd.Error
        self._thick = rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION

    def size(self) -> int:
        """Return the size in bytes as it is now, also after a resize by another client.

        Of a read-only image, librbd sees no resize: it shrinks when `shrink_to` is told, and never
        grows.
        """
        try:
            return self._image.size() - self._lost
        except self._failure as error:
            raise _as_oserror(error) from error

    def shrink_to(self, size: int | None) -> None:
        """Hear the size in bytes that the header has; None for a snapshot's, which never changes.

        What lies beyond is gone, and librbd would read zeroes there.
        """
        if self.read_only and size is not None:
            self._lost = max(0, self._opened_size - size)

    def snap_id(self) -> int | None:
        """Return the id of the snapshot that was opened; None for the image itself."""
        if self.spec.snap_id is not None or not self.spec.snap:
            return self.spec.snap_id
        try:
            return self._image.snap_get_id(self.spec.snap)
        except self._failure as error:
            raise _as_oserror(error) from error

    def object_size(self) -> int:
        """Return the size in bytes of the objects that the image is stored in."""
        try:
            return self._image.stat()["obj_size"]
        except self._failure as error:
            raise _as_oserror(error) from error

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes."""
        try:
            return self._image.read(offset, length)
        except self._failure as error:
            raise _as_oserror(error) from error

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`, perhaps into librbd's cache only."""
        try:
            self._image.write(data, offset)
        except self._failure as error:
            raise _as_oserror(error) from error

    def flush(self) -> None:
        """Return when every write that has returned before is stable on the OSDs."""
        try:
            self._image.flush()
        except self._failure as error:
            raise _as_oserror(error) from error

    def discard(self, offset: int, length: int) -> None:
        """Give space back; librbd keeps ranges shorter than rbd_discard_granularity_bytes."""
        try:
            for start, count in pieces(offset, length):
                self._image.discard(start, count)
        except self._failure as error:
            raise _as_oserror(error) from error

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        """Make the range read as zeroes; with `no_hole` its objects stay allocated."""
        try:
            for start, count in pieces(offset, length):
                self._image.write_zeroes(start, count, self._thick if no_hole else 0)
        except self._failure as error:
            raise _as_oserror(error) from error

    def lock(self) -> None:
        """Take the exclusive lock and keep it until the image is closed: others' writes then fail.

        A living client that does not keep its lock gives it up; a dead one's is waited for, up to
        the time-out of its watch (30 s), unless `fence` has freed it. Raises `RbdnbdError`.
        """
        import rbd

        try:
            self._image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        except self._failure as error:
            number = getattr(error, "errno", None) or 0
            why = self._why_not_locked(number)
            raise RbdnbdError(f"failed to acquire exclusive lock: {why}", number) from error

    def _why_not_locked(self, number: int) -> str:
        if self.read_only:
            return f"{self.spec} is opened read-only"
        if not lockable(self._image):
            return f"{self.spec} has no feature exclusive-lock"
        if number == errno.EROFS:
            return f"another client keeps it ({', '.join(owners(self._image)) or 'gone by now'})"
        return os.strerror(number)


def lockable(image: rbd.Image) -> bool:
    """Tell whether an image has the feature exclusive-lock."""
    import rbd

    return bool(image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK)


def owners(image: rbd.Image) -> list[str]:
    """Return the addresses of the clients that hold the lock of a lockable image."""
    return [each["owner"] for each in image.lock_get_owners()]


def pieces(offset: int, length: int, at_once: int = _AT_ONCE) -> Iterator[tuple[int, int]]:
    """Cut a range into (offset, length) at the multiples of `at_once` bytes.

    rbd_discard and rbd_write_zeroes return the length as a C int: 2 GiB and more are seen as an
    error (librbd 16.2, EINVAL or a nonsensical errno).
    """
    end = offset + length
    while offset < end:
        count = min(end - offset, at_once - offset % at_once)
        yield offset, count
        offset += count


def _as_oserror(error: rbd.Error) -> OSError:
    return image_error(getattr(error, "errno", None) or errno.EIO, str(error))
