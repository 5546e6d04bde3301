"""Where a server listens: unix sockets, TCP addresses, and the URIs that lead there."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from rbdnbd.errors import RbdnbdError, UsageError

log = logging.getLogger(__name__)

DEFAULT_PORT: Final = 10809
"""The port that IANA has assigned to nbd."""
BACKLOG: Final = 1024
"""Clients that have connected and wait to be accepted."""


@contextlib.contextmanager
def listen_unix(path: Path) -> Iterator[socket.socket]:
    """Listen on a unix socket that only its owner may connect to (mode 0600); removed at the end.

    A socket left behind by a process that is gone is replaced, anything else there refused.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _remove_stale(path)
            sock.bind(str(path))
            path.chmod(0o600)  # nobody can connect before listen()
            sock.listen(BACKLOG)
        except OSError as error:
            number = error.errno or errno.EINVAL  # "AF_UNIX path too long" comes without a number
            message = f"cannot listen on {path}: {error.strerror or error}"
            raise RbdnbdError(message, number) from error
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "a file of that name exists")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise OSError(errno.EADDRINUSE, "another server is listening there")


def parse_address(address: str) -> tuple[str, int]:
    """Read `HOST:PORT`, `[v6]:PORT`, `:PORT` or `HOST`; loopback and port 10809 where left out."""
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        host, port = address, str(DEFAULT_PORT)
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise UsageError(f"invalid address {address!r}: an IPv6 address is written [::1]:PORT")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdecimal() or int(port) > 0xFFFF:
        raise UsageError(f"invalid address {address!r}: expected HOST:PORT")
    return host or "127.0.0.1", int(port)


@contextlib.contextmanager
def listen_tcp(host: str, port: int) -> Iterator[socket.socket]:
    """Listen on a TCP address; port 0 lets the system choose one. Other than loopback is logged."""
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            sock = stack.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except (OSError, UnicodeError) as error:  # the latter is what IDNA says of a bad name
            reason = error.strerror if isinstance(error, OSError) else error
            number = error.errno or 0 if isinstance(error, OSError) else errno.EINVAL
            raise RbdnbdError(f"cannot listen on {host}:{port}: {reason}", number) from error
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            log.warning("whoever reaches %s port %d can read and write the image", host, port)
        yield sock


def uri(sock: socket.socket, export_name: str) -> str:
    """Return the NBD URI of a listening socket (NetworkBlockDevice/nbd, doc/uri.md)."""
    name = quote(export_name, safe="/")
    if sock.family == socket.AF_UNIX:
        return f"nbd+unix:///{name}?socket={quote(os.path.abspath(sock.getsockname()), safe='/')}"
    host, port = sock.getsockname()[:2]
    return f"nbd://{f'[{host}]' if ':' in host else host}:{port}/{name}"
