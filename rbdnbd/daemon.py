"""What a process of ours tells whoever started it: that it is ready, or why it failed.

One set of words serves both systemd and our own parent: sd_notify's fields (sd_notify(3)), READY=1,
or ERRNO with a STATUS sentence. systemd is sent them as datagrams, and our parent as packets on the
pipe that it left us (`background`), which nobody else has.

Until it is ready a process in the background has its parent's stderr; then it lets go of stderr and
of the working directory, so that a caller that reads to EOF gets there and no mount is kept busy.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rbdnbd.background import VARIABLE, readable
from rbdnbd.errors import RbdnbdError


def notify(**fields: str | int) -> None:
    """Tell whoever started this process, with sd_notify's fields, if anyone still listens."""
    with contextlib.suppress(OSError):
        _send(fields)


def _send(fields: Mapping[str, str | int]) -> bool:
    """Send one message if there is somebody to send it to; return whether there is."""
    lines = (f"{name}={str(value).replace(chr(10), ' ')}" for name, value in fields.items())
    message = "\n".join(lines).encode(errors="replace")
    if in_background():
        return _report(message)
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    import socket  # here, because a process in the background needs to start quickly

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(message, address)
    return True


def _report(message: bytes) -> bool:
    """Write one packet to the parent's pipe, unless we have let go of it."""
    pipe = os.environ[VARIABLE]
    if not pipe:
        return False
    os.set_inheritable(int(pipe), False)
    os.write(int(pipe), message[: select.PIPE_BUF])
    return True


def in_background() -> bool:
    """Whether this process was started by `background`."""
    return VARIABLE in os.environ


def ready(**fields: str | int) -> None:
    """Report readiness; a background process then lets go of all that it has of its parent's.

    Raises `RbdnbdError` when nobody waits any more: what nobody knows of is undone.
    """
    try:
        _send({"READY": 1, **fields})
    except OSError as error:
        message = f"nobody waits for this process to be ready any more: {error.strerror}"
        raise RbdnbdError(message, error.errno or 0) from error
    if in_background():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
        os.chdir("/")
        if pipe := os.environ[VARIABLE]:
            os.environ[VARIABLE] = ""
            os.close(int(pipe))


def failed(message: str, errno: int, exit_status: int = 1) -> bool:
    """Report the reason of a failure; return whether a parent waits for it and will tell it."""
    fields: dict[str, str | int] = {
        "ERRNO": errno,
        "X_RBDNBD_EXIT_STATUS": exit_status,
        "STATUS": message,
    }
    try:
        return _send(fields) and in_background()
    except OSError:
        return False


@contextmanager
def watching(pid: int) -> Iterator[Callable[[float], bool]]:
    """Watch a process that is alive, so that its number's next owner is not taken for it.

    Yields a function that waits for its end, for at most so many seconds, and tells whether it has
    come.
    """
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        yield lambda seconds: True
        return
    try:
        yield lambda seconds: readable(process, seconds)
    finally:
        os.close(process)
