"""Open an RBD image, or say in words what is missing; close it in good order."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rbdnbd.cluster import connect, one_io_thread, open_pool
from rbdnbd.errors import RbdnbdError, UsageError
from rbdnbd.image import RbdImage
from rbdnbd.spec import ClusterOptions, ImageSpec

if TYPE_CHECKING:
    import rados
    import rbd

    from rbdnbd.polled import PolledImage


@contextmanager
def open_image(
    spec: ImageSpec,
    options: ClusterOptions,
    *,
    read_only: bool,
    say: Callable[[str], None],
    exclusive: bool = False,
    encryption: Sequence[tuple[str, str]] = (),
    polled: bool = False,
) -> Iterator[RbdImage]:
    """Connect to the cluster and open an image; at the end it is flushed and closed.

    A snapshot is opened read-only. With `exclusive` the image is locked before anything else
    (`RbdImage.lock`). `encryption` is a row of (format, passphrase file), the image's own first,
    then its ancestors'. `say` is told what is being waited for. Raises `RbdnbdError`.
    `polled` is for the event loop.
    """
    if spec.snap and spec.snap_id is not None:
        raise UsageError("use either snapname or snapid, not both")
    with ExitStack() as stack:
        say("connecting to the cluster")
        client = connect(options)
        stack.callback(client.shutdown)
        spec = spec.in_pool(client.conf_get("rbd_default_pool"))
        read_only = read_only or bool(spec.snap) or spec.snap_id is not None
        say(f"opening {spec}")
        ioctx = open_pool(client, spec)
        stack.callback(ioctx.close)
        image = _open(client, ioctx, spec, options, read_only=read_only, polled=polled)
        stack.callback(_close, image, spec)
        opened = RbdImage(image, client, spec, options, read_only=read_only)
        if exclusive:
            say(f"waiting for the exclusive lock of {spec}")
            opened.lock()
        if encryption:
            from rbdnbd.encryption import load_encryption

            say(f"loading the encryption of {spec}")
            load_encryption(image, spec, encryption)
        yield opened


def _open(
    client: rados.Rados,
    ioctx: rados.Ioctx,
    spec: ImageSpec,
    options: ClusterOptions,
    *,
    read_only: bool,
    polled: bool,
) -> rbd.Image | PolledImage:
    import rbd

    image: rbd.Image | PolledImage
    try:
        if polled:
            from rbdnbd.polled import PolledImage

            image = PolledImage(spec, one_io_thread(client, options), read_only=read_only)
        else:
            image = rbd.Image(ioctx, spec.image, snapshot=spec.snap or None, read_only=read_only)
        if spec.snap_id is not None:
            try:
                image.set_snap_by_id(spec.snap_id)
            except rbd.Error:
                image.close()
                raise
        return image
    except rbd.ImageNotFound as error:
        try:
            message = _why_not_found(ioctx, spec)
        except rbd.Error:  # who may open an image need not be allowed to look around
            message = f"image {spec} does not exist"
        raise RbdnbdError(message, errno.ENOENT) from error
    except rbd.PermissionError as error:
        wanted = "read" if read_only else "write"
        message = f"{options.name} may not {wanted} {spec}: its capabilities do not allow it"
        hint = "" if read_only else " (--read-only needs less)"
        raise RbdnbdError(message + hint, errno.EPERM) from error
    except rbd.Error as error:
        number = getattr(error, "errno", None) or 0
        raise RbdnbdError(f"cannot open {spec}: {error}", number) from error


def _close(image: rbd.Image | PolledImage, spec: ImageSpec) -> None:
    import rbd

    try:
        image.close()
    except rbd.Error as error:
        number = getattr(error, "errno", None) or 0
        raise RbdnbdError(f"cannot close {spec} in good order: {error}", number) from error


def _why_not_found(ioctx: rados.Ioctx, spec: ImageSpec) -> str:
    """Say which part of the spec does not exist."""
    import rbd

    if spec.namespace:
        namespace, pool = spec.namespace, spec.pool
        ioctx.set_namespace("")
        if not rbd.RBD().namespace_exists(ioctx, namespace):
            return f"namespace {namespace} does not exist in pool {pool}"
        ioctx.set_namespace(namespace)
    image = ImageSpec(spec.pool, spec.namespace, spec.image)
    if spec.snap or spec.snap_id is not None:
        try:
            rbd.Image(ioctx, spec.image, read_only=True).close()
        except rbd.ImageNotFound:
            return f"image {image} does not exist"
        which = spec.snap or f"with the id {spec.snap_id}"
        return f"image {image} has no snapshot {which}"
    return f"image {image} does not exist"
