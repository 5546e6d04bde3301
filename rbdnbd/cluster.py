"""Connections to a Ceph cluster: find it, reach it, and say in words why it cannot be reached.

What librados raises while connecting is translated here, once, into an `RbdnbdError` that says what
is missing: an errno alone does not tell. The bindings come with Ceph (python3-rados, python3-rbd),
not from PyPI, and are imported when they are needed first, so that everything else works without
them.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from rbdnbd.errors import RbdnbdError
from rbdnbd.spec import ClusterOptions, ImageSpec

if TYPE_CHECKING:
    import rados

MONITOR_SECONDS: Final = 30
"""Time for a monitor to answer, unless the configuration says otherwise (client_mount_timeout)."""

_CEPHS_MONITOR_SECONDS: Final = 300
_CEPHS_IO_THREADS: Final = "2"
_CLIENT: Final = re.compile(r"(?:(?:any|v1|v2):)?(\S+:\d+/[1-9]\d*)")


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


def one_io_thread(client: rados.Rados, options: ClusterOptions) -> ClusterOptions:
    """Have librados complete requests in one thread, unless another number was asked for.

    Beside an event loop, which takes all that is finished at once, Ceph's two only wake each other.
    """
    if client.conf_get("librados_thread_count") != _CEPHS_IO_THREADS:
        return options
    return replace(options, settings=(("librados_thread_count", "1"), *options.settings))


def connect(options: ClusterOptions) -> rados.Rados:
    """Return a connected client, for the caller to shut down. Raises `RbdnbdError`."""
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


def open_pool(client: rados.Rados, spec: ImageSpec) -> rados.Ioctx:
    """Open the pool and namespace of an image, for the caller to close. Raises `RbdnbdError`."""
    import rados

    try:
        ioctx = client.open_ioctx(spec.pool)
    except rados.ObjectNotFound as error:
        raise RbdnbdError(f"pool {spec.pool} does not exist", errno.ENOENT) from error
    except rados.Error as error:
        raise RbdnbdError(f"cannot open pool {spec.pool}: {error}", error.errno or 0) from error
    ioctx.set_namespace(spec.namespace)
    return ioctx


def client_address(text: str) -> str:
    """Return the address of one client, ADDRESS:PORT/NONCE, as blocklists and lock owners have it.

    The nonce tells one client of a host from another, and one of 0 would stand for all of them:
    `RbdnbdError` for that and for whatever else is not the address of exactly one client.
    """
    match = _CLIENT.fullmatch(text)
    if not match:
        raise RbdnbdError(f"{text!r} is not the address of one Ceph client", errno.EINVAL)
    return match[1]


def blocklist(client: rados.Rados, address: str) -> None:
    """Refuse from now on whatever the client at `address` sends, and return when that holds.

    What it had sent before either has been done or never will be: an OSD that answers us after this
    call knows the new map (librados: wait_for_latest_osdmap). The monitors' own limit applies
    (mon_osd_blocklist_default_expire, 1 h). To do it again changes nothing. The capability
    "profile rbd" allows it. Raises `RbdnbdError`.
    """
    import rados

    try:
        client.blocklist_add(address)
        client.wait_for_latest_osdmap()
    except rados.Error as error:
        message = f"cannot blocklist the client at {address}: {error}"
        raise RbdnbdError(message, getattr(error, "errno", None) or 0) from error
