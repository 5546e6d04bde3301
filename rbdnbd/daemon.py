"""Start in the background, and report readiness or the reason of failure.

One mechanism serves both systemd and our own parent: sd_notify's datagrams (sd_notify(3)). The
parent listens on a private socket, starts the command anew in the foreground of a session of its
own, and waits for READY=1, an ERRNO with its STATUS sentence, or the end of the process. There is
no fork without exec: librados' threads would not survive it.

Until it is ready the child inherits stderr; then it lets go of stderr and of the working directory,
so that a caller that reads to EOF gets there and no mount is kept busy.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rbdnbd.errors import RbdnbdError

START_SECONDS: Final = 120.0
_END_SECONDS: Final = 60.0
_SAY_EVERY: Final = 5.0
_BACKGROUND: Final = "RBDNBD_BACKGROUND"


def notify(**fields: str | int) -> None:
    """Tell whoever started this process, with sd_notify's fields, if anyone still listens."""
    with contextlib.suppress(OSError):
        _send(fields)


def _send(fields: Mapping[str, str | int]) -> bool:
    """Send one datagram if there is an address for it; return whether there is."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    lines = (f"{name}={str(value).replace(chr(10), ' ')}" for name, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto("\n".join(lines).encode(errors="replace"), address)
    return True


def in_background() -> bool:
    """Whether this process was started by `start`."""
    return _BACKGROUND in os.environ


def ready(**fields: str | int) -> None:
    """Report readiness; a background process then lets go of stderr and its directory.

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


def failed(message: str, errno: int) -> bool:
    """Report the reason of a failure; return whether a parent waits for it and will tell it."""
    try:
        return _send({"ERRNO": errno, "STATUS": message}) and in_background()
    except OSError:
        return False


def start(
    arguments: Sequence[str],
    say: Callable[[str], None],
    seconds: float = START_SECONDS,
    module: str = "rbdnbd",
    inherited: Collection[int] = (),
) -> dict[str, str]:
    """Run a command of ours in the background and return the fields it reported when ready.

    The command is that of `python3 -m MODULE ARGUMENTS`, which has the descriptors `inherited` too.

    `say` is told every few seconds what the child is waiting for. Raises `RbdnbdError` with the
    child's own sentence, or when it ends or is not ready after `seconds`; the child is gone then.
    """
    with _notify_socket() as (sock, address):
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=inherited,
            env=os.environ | {"NOTIFY_SOCKET": address, _BACKGROUND: "1"},
        )
        try:
            return _await_ready(child, sock, say, seconds)
        except BaseException:
            _end(child, say)
            raise


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
        with selectors.DefaultSelector() as selector:
            selector.register(process, selectors.EVENT_READ)
            yield lambda seconds: bool(selector.select(seconds))
    finally:
        os.close(process)


@contextmanager
def _notify_socket() -> Iterator[tuple[socket.socket, str]]:
    with (
        tempfile.TemporaryDirectory(prefix="rbdnbd-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        path = Path(directory, "notify")
        sock.bind(str(path))
        yield sock, str(path)


def _await_ready(
    child: subprocess.Popen[bytes],
    sock: socket.socket,
    say: Callable[[str], None],
    seconds: float,
) -> dict[str, str]:
    begin = time.monotonic()
    doing = "starting"
    process = os.pidfd_open(child.pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            selector.register(process, selectors.EVENT_READ)
            while (left := begin + seconds - time.monotonic()) > 0:
                events = selector.select(min(left, _SAY_EVERY))
                if not events:
                    say(f"still {doing} ({time.monotonic() - begin:.0f} s)")
                elif all(key.fileobj != sock for key, _ in events):
                    raise RbdnbdError(f"the process {_how_it_ended(child)} while {doing}")
                else:
                    fields = _fields(sock.recv(65536))
                    if "ERRNO" in fields:
                        raise RbdnbdError(fields["STATUS"], int(fields["ERRNO"]))
                    if "READY" in fields:
                        return fields
                    doing = fields.get("STATUS", doing)
    finally:
        os.close(process)
    raise RbdnbdError(f"gave up after {seconds:.0f} s of {doing}")


def _fields(message: bytes) -> dict[str, str]:
    lines = (line.partition("=") for line in message.decode().split("\n"))
    return {name: value for name, _, value in lines}


def _how_it_ended(child: subprocess.Popen[bytes]) -> str:
    status = child.wait()
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"exited with status {status}"


def _end(child: subprocess.Popen[bytes], say: Callable[[str], None]) -> None:
    """End a child that is not ready, in its own way unless that takes too long."""
    child.terminate()
    try:
        child.wait(_SAY_EVERY)
    except subprocess.TimeoutExpired:
        say(f"waiting for process {child.pid} to undo what it has done")
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_END_SECONDS)
        finally:
            child.kill()
            child.wait()
