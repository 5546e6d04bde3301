"""The door for NBD clients other than the kernel: a listening socket and its connections.

Each client has a thread that drives the handshake over the socket, within a time limit, and then
gives the socket to the engine and waits for its end. All clients share one image, so that a flush
by any of them covers the writes of all (CAN_MULTI_CONN). A client that breaks the protocol, or
leaves in the middle of a request, ends its own connection and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from rbdnbd.errors import RbdnbdError, UsageError
from rbdnbd.handshake import Conversation, negotiate
from rbdnbd.stats import Stats, total
from rbdnbd.transmission import Engine, Image, Transmission
from rbdnbd.wire import Export, ProtocolError

log = logging.getLogger(__name__)

DEFAULT_PORT: Final = 10809
"""The port that IANA has assigned to nbd."""
HANDSHAKE_SECONDS: Final = 10.0
CLIENTS: Final = 128
"""Connections at once; a further client waits in the listening socket's backlog."""


class Listener:
    """Serve one image to any number of NBD clients on a listening socket, which it closes."""

    def __init__(
        self,
        sock: socket.socket,
        image: Image,
        export: Export,
        engine: Engine,
        *,
        clients: int = CLIENTS,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self._sock = sock
        self._image = image
        self._export = export
        self._engine = engine
        self._handshake_seconds = handshake_seconds
        self._places = threading.BoundedSemaphore(clients)
        self._lock = threading.Lock()
        self._clients: dict[threading.Thread, socket.socket | Transmission] = {}
        self._past = Stats()
        self._stopping = False
        self._acceptor = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)

    def start(self) -> None:
        """Accept clients in threads of its own from now on."""
        self._acceptor.start()

    def stop(self, seconds: float) -> None:
        """Accept and read no more; answer what was read, and hang up on what is left after that."""
        deadline = time.monotonic() + seconds
        with self._lock:
            self._stopping = True
            clients = dict(self._clients)
        _hang_up(self._sock)
        for client in clients.values():
            _hang_up(client) if isinstance(client, socket.socket) else client.stop()
        for thread in clients:
            thread.join(max(0.0, deadline - time.monotonic()))
        for thread, client in clients.items():
            if thread.is_alive() and not isinstance(client, socket.socket):
                log.warning("a client does not take its replies: hanging up")
                client.abort()
        for thread in clients:
            thread.join()
        self._acceptor.join()
        self._sock.close()

    def stats(self) -> Stats:
        """Return the figures of all connections, past and present."""
        with self._lock:
            clients = self._clients.values()
            present = [each.stats for each in clients if not isinstance(each, socket.socket)]
            return total([self._past, *present])

    def _accept(self) -> None:
        while True:
            self._places.acquire()
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                self._places.release()
                if self._stopping:
                    return
                log.warning("a client could not be accepted: %s", error.strerror)
                threading.Event().wait(0.1)  # no file is free: let connections end before asking
                continue
            thread = threading.Thread(target=self._client, args=(sock,), daemon=True)
            with self._lock:
                if self._stopping:
                    sock.close()
                    return
                self._clients[thread] = sock
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads to be had
                    log.warning("a client could not be served: %s", error)
                    del self._clients[thread]
                    sock.close()
                    self._places.release()

    def _client(self, sock: socket.socket) -> None:
        """Shake hands with one client and serve it to its end."""
        this = threading.current_thread()
        connection = None
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if not converse(sock, negotiate(self._export), self._handshake_seconds):
                return
            connection = self._engine(sock, self._export)
            with self._lock:
                self._clients[this] = connection
                if self._stopping:
                    return
            if reason := connection.serve():
                log.info("a client's connection ended: %s", reason)
            self._settle()
        except (OSError, EOFError, ProtocolError) as error:
            log.info("a client did not get through the handshake: %s", error)
        finally:
            sock.close()
            with self._lock:
                del self._clients[this]
                if connection:
                    self._past.add(connection.stats)
            self._places.release()

    def _settle(self) -> None:
        """Make stable what a client that is gone has written."""
        try:
            if not self._export.read_only:
                self._image.flush()
        except OSError as error:
            log.error("flush after a client's end failed: %s", error)


def converse(sock: socket.socket, conversation: Conversation, seconds: float) -> bool:
    """Drive a handshake over a socket; return what it returns, whether transmission begins.

    Raises `TimeoutError` after `seconds` in all, `EOFError` when the client hangs up.
    """
    deadline = time.monotonic() + seconds
    answer = b""
    try:
        step = next(conversation)
        while True:
            sock.settimeout(_left(deadline))
            if isinstance(step, bytes):
                sock.sendall(step)
                answer = b""
            else:
                answer = _receive(sock, step, deadline)
            step = conversation.send(answer)
    except StopIteration as end:
        sock.settimeout(None)
        return bool(end.value)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for it is over")
    return left


def _receive(sock: socket.socket, length: int, deadline: float) -> bytes:
    received = b""
    while len(received) < length:
        sock.settimeout(_left(deadline))
        data = sock.recv(length - len(received))
        if not data:
            raise EOFError("the client hung up")
        received += data
    return received


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
            sock.listen()
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
            sock.listen()
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


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the peer may have left, or the thread closed it, before us
        sock.shutdown(socket.SHUT_RDWR)
