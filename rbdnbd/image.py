"""RBD images through librbd: the only room that knows rados and rbd.

`RbdImage` is the server's `Image` on a real cluster. Every call blocks, releases the GIL while
librbd works, and may be made from any thread. What librados and librbd raise is translated here,
once: while opening, into an `RbdnbdError` that says in words what is missing; afterwards into the
builtin `OSError` that the server puts on the wire (`rbd.OSError` is not one).

The bindings come with Ceph (python3-rados, python3-rbd), not from PyPI, and are imported when they
are needed first, so that everything else works without them.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from rbdnbd.errors import RbdnbdError
from rbdnbd.spec import ClusterOptions, ImageSpec

if TYPE_CHECKING:
    import rados
    import rbd

MONITOR_SECONDS: Final = 30
"""Time for a monitor to answer, unless the configuration says otherwise (client_mount_timeout)."""

_CEPHS_MONITOR_SECONDS: Final = 300
_AT_ONCE: Final = 1 << 30


class RbdImage:
    """One open RBD image; `open_image` makes and closes it."""

    def __init__(self, image: rbd.Image, spec: ImageSpec, *, read_only: bool) -> None:
        import rbd

        self.spec = spec
        self.read_only = read_only
        self._image = image
        self._failure = rbd.Error
        self._thick = rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION

    def size(self) -> int:
        """Return the size in bytes as it is now, also after a resize by another client."""
        try:
            return self._image.size()
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
    number = getattr(error, "errno", None) or errno.EIO
    blocklisted = number == errno.ESHUTDOWN  # librados.hpp calls it EBLOCKLISTED
    return OSError(number, f"this client is blocklisted: {error}" if blocklisted else str(error))


@contextmanager
def open_image(
    spec: ImageSpec, options: ClusterOptions, *, read_only: bool, say: Callable[[str], None]
) -> Iterator[RbdImage]:
    """Connect to the cluster and open an image; at the end it is flushed and closed.

    A snapshot is opened read-only. `say` is told what is being waited for. Raises `RbdnbdError`.
    """
    with ExitStack() as stack:
        say("connecting to the cluster")
        client = _connect(options)
        stack.callback(client.shutdown)
        spec = spec.in_pool(client.conf_get("rbd_default_pool"))
        read_only = read_only or bool(spec.snap)
        say(f"opening {spec}")
        ioctx = _open_pool(client, spec)
        stack.callback(ioctx.close)
        image = _open(ioctx, spec, options, read_only=read_only)
        stack.callback(_close, image, spec)
        yield RbdImage(image, spec, read_only=read_only)


def default_pool(options: ClusterOptions) -> str:
    """Return the pool of a spec that names none, without asking the cluster.

    A pool that is set in the monitors' own configuration only is not seen by this.
    """
    return _client(options).conf_get("rbd_default_pool")


def _require_bindings() -> None:
    try:
        import rados  # noqa: F401
        import rbd  # noqa: F401
    except ImportError as error:
        message = (
            f"Ceph's Python bindings are missing for {sys.executable} ({error}): install "
            "python3-rados and python3-rbd, which come with Ceph, not from PyPI, and fit the "
            "distribution's own Python only"
        )
        raise RbdnbdError(message, errno.ENOENT) from error


def _client(options: ClusterOptions) -> rados.Rados:
    """Return an unconnected cluster handle with its configuration read."""
    _require_bindings()
    import rados

    try:
        client = rados.Rados(
            name=options.name, clustername=options.cluster, conf=options.overrides()
        )
    except rados.Error as error:
        message = f"invalid client name {options.name!r}, expected TYPE.ID as in client.admin"
        raise RbdnbdError(f"{message} ({error})", errno.EINVAL) from error
    try:
        client.conf_read_file(options.conf or None)
    except rados.ObjectNotFound as error:
        if options.conf or os.environ.get("CEPH_CONF"):
            path = options.conf or os.environ["CEPH_CONF"]
            raise RbdnbdError(f"cannot read {path}: it does not exist", errno.ENOENT) from error
    except rados.Error as error:
        path = options.conf or os.environ.get("CEPH_CONF") or "Ceph's configuration"
        raise RbdnbdError(f"cannot read {path}: {error}", error.errno or 0) from error
    if client.conf_get("client_mount_timeout") == str(_CEPHS_MONITOR_SECONDS):
        client.conf_set("client_mount_timeout", str(MONITOR_SECONDS))
    return client


def _connect(options: ClusterOptions) -> rados.Rados:
    client = _client(options)
    import rados

    try:
        with _quiet_stderr():
            client.connect()
    except rados.Error as error:
        number = getattr(error, "errno", None) or errno.EIO
        raise RbdnbdError(_why_not_connected(client, options, number, error), number) from error
    return client


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep off stderr what librados prints there itself, whatever its options say.

    It does so of monitors' names that cannot be resolved (MonMap::init_with_hosts and others). For
    the time that it takes to connect, nobody else has anything to say there.
    """
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _why_not_connected(
    client: rados.Rados, options: ClusterOptions, number: int, error: Exception
) -> str:
    """Say what a failed rados_connect is about, which its errno alone does not tell."""
    mons = client.conf_get("mon_host")
    if number == errno.ETIMEDOUT:
        seconds = client.conf_get("client_mount_timeout")
        return f"no monitor answered within {seconds} s (mon_host = {mons or 'from DNS'})"
    if number == errno.ENOENT and not mons:
        return "no monitor is known: there is no ceph.conf with mon_host and none was given (-m)"
    if number == errno.ENOENT:
        keyrings = [path for path in client.conf_get("keyring").split(",") if path]
        return f"no key for {options.name} can be read from {' or '.join(keyrings)}"
    if number in (errno.EACCES, errno.EPERM):
        return f"the cluster refused {options.name}: it does not exist there or its key is wrong"
    if number == errno.EINVAL:
        return f"the monitors' addresses or the key cannot be read (mon_host = {mons}): {error}"
    return f"cannot connect to the cluster as {options.name}: {error}"


def _open_pool(client: rados.Rados, spec: ImageSpec) -> rados.Ioctx:
    import rados

    try:
        ioctx = client.open_ioctx(spec.pool)
    except rados.ObjectNotFound as error:
        raise RbdnbdError(f"pool {spec.pool} does not exist", errno.ENOENT) from error
    except rados.Error as error:
        raise RbdnbdError(f"cannot open pool {spec.pool}: {error}", error.errno or 0) from error
    ioctx.set_namespace(spec.namespace)
    return ioctx


def _open(
    ioctx: rados.Ioctx, spec: ImageSpec, options: ClusterOptions, *, read_only: bool
) -> rbd.Image:
    import rbd

    try:
        return rbd.Image(ioctx, spec.image, snapshot=spec.snap or None, read_only=read_only)
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


def _close(image: rbd.Image, spec: ImageSpec) -> None:
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
    if spec.snap:
        try:
            rbd.Image(ioctx, spec.image, read_only=True).close()
        except rbd.ImageNotFound:
            return f"image {image} does not exist"
        return f"image {image} has no snapshot {spec.snap}"
    return f"image {image} does not exist"
