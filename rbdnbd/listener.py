"""The door for NBD clients other than the kernel: a listening socket and its connections.

Each client has a thread that drives the handshake over the socket, within a time limit, and then
gives the socket to the engine and waits for its end. All clients share one image, so that a flush
by any of them covers the writes of all (CAN_MULTI_CONN). A client that breaks the protocol, or
leaves in the middle of a request, ends its own connection and nothing else; one that does not go
on with what it has begun is hung up on (`rbdnbd.distrust`).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from dataclasses import replace
from typing import Final

from rbdnbd.distrust import Distrust
from rbdnbd.handshake import Conversation, negotiate
from rbdnbd.stats import Stats, total
from rbdnbd.transmission import Engine, Image, Transmission
from rbdnbd.wire import Export, ProtocolError

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS: Final = 10.0
CLIENTS: Final = 1024
"""Connections at once; a further client waits in the listening socket's backlog."""
_SAY_SECONDS: Final = 60.0
_WATCH_SECONDS: Final = 1.0
_LINES: Final = 30
"""About clients' ends, in `_SAY_SECONDS`: whoever comes again and again fills no log."""


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
        distrust: Distrust | None = None,
    ) -> None:
        self._sock = sock
        self._image = image
        self._export = export
        self._engine = engine
        self._handshake_seconds = handshake_seconds
        self._distrust = distrust or Distrust()
        self._most = clients
        self._places = threading.BoundedSemaphore(clients)
        self._said = self._since = -_SAY_SECONDS
        self._lines = 0
        self._lock = threading.Lock()
        self._clients: dict[threading.Thread, socket.socket | Transmission] = {}
        self._past = Stats()
        self._stopping = False
        self._stopped = threading.Event()
        self._acceptor = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="nbd-watch", daemon=True)

    def start(self) -> None:
        """Accept clients in threads of its own from now on."""
        self._acceptor.start()
        self._watcher.start()

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
        self._stopped.set()
        self._watcher.join()
        self._sock.close()

    def resize(self, size: int) -> None:
        """Hold requests against a new size, in bytes, which clients that come are told."""
        with self._lock:
            self._export = replace(self._export, size=size)
            for client in self._clients.values():
                if not isinstance(client, socket.socket):
                    client.resize(size)

    def stats(self) -> Stats:
        """Return the figures of all connections, past and present."""
        with self._lock:
            clients = self._clients.values()
            present = [each.stats for each in clients if not isinstance(each, socket.socket)]
            return total([self._past, *present])

    def _accept(self) -> None:
        while True:
            self._await_place()
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

    def _await_place(self) -> None:
        """Wait until a further client may be accepted, and say so, but not too often."""
        if self._places.acquire(blocking=False):
            return
        if time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            log.warning("%d clients are connected: further ones have to wait", self._most)
        self._places.acquire()

    def _watch(self) -> None:
        """Hang up on clients that do not end in time what they have begun."""
        while not self._stopped.wait(min(_WATCH_SECONDS, self._distrust.seconds / 4)):
            with self._lock:
                clients = list(self._clients.values())
            now = time.monotonic()
            for client in clients:
                if not isinstance(client, socket.socket):
                    client.hang_up_if_overdue(now)

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
            connection.distrust(self._distrust)
            with self._lock:
                self._clients[this] = connection
                connection.resize(self._export.size)  # if it has changed meanwhile
                if self._stopping:
                    return
            if reason := connection.serve():
                self._tell("a client's connection ended: %s", reason)
            self._settle()
        except (OSError, EOFError, ProtocolError) as error:
            self._tell("a client did not get through the handshake: %s", error)
        finally:
            sock.close()
            with self._lock:
                del self._clients[this]
                if connection:
                    self._past.add(connection.stats)
            self._places.release()

    def _tell(self, text: str, why: object) -> None:
        """Log what became of a client, and what is left out, if there are too many of them."""
        with self._lock:
            if time.monotonic() - self._since > _SAY_SECONDS:
                more, self._lines, self._since = self._lines - _LINES, 0, time.monotonic()
                if more > 0:
                    log.info("%d more clients ended like that", more)
            self._lines += 1
            if self._lines <= _LINES:
                log.info(text, why)

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


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the peer may have left, or the thread closed it, before us
        sock.shutdown(socket.SHUT_RDWR)
