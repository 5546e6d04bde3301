"""One unix socket for each mapping, and the list of all mappings.

A mapping listens in the run directory (/run/rbdnbd, mode 0700). Whoever connects is given one JSON
document, what the mapping is and what it has done, and then EOF. To list the mappings is to ask
every socket there: there are no state files that could be stale, and a socket that nobody listens
on any more is the only trace of a process that was killed. The answering thread shares nothing with
the data path, so that it answers while requests hang, which is when one wants to ask.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from rbdnbd.errors import RbdnbdError

log = logging.getLogger(__name__)

RUN_DIR: Final = Path("/run/rbdnbd")
_ANSWER_SECONDS: Final = 2.0
_RETRY_SECONDS: Final = 0.1

Document = dict[str, Any]


class Control:
    """Answer for one mapping, on a socket of its own, from entering to leaving the context.

    `describe` is called in this room's thread for every question; it must not block.
    """

    def __init__(self, describe: Callable[[], Document], run_dir: Path = RUN_DIR) -> None:
        self._describe = describe
        self._path = run_dir / f"{os.getpid()}-{os.urandom(4).hex()}.sock"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._leaving = False
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)

    def __enter__(self) -> Control:
        # Under this name nobody asks: before listen() it would be taken for a dead one's.
        bound = self._path.with_suffix("")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sock.bind(str(bound))
            self._sock.listen()
            bound.rename(self._path)
        except OSError as error:
            self._sock.close()
            with suppress(OSError):
                bound.unlink()
            message = f"cannot listen in {self._path.parent}: {error.strerror or error}"
            raise RbdnbdError(message, error.errno or 0) from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving = True
        self._path.unlink(missing_ok=True)
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._sock.accept()
            except OSError as error:
                if self._leaving:
                    return
                log.warning("a question was not heard: %s", error)
                threading.Event().wait(_RETRY_SECONDS)  # no file is free, perhaps
                continue
            with client:
                try:
                    client.settimeout(_ANSWER_SECONDS)
                    client.sendall(json.dumps(self._describe()).encode())
                except Exception as error:  # the next one who asks is to get an answer
                    log.warning("a question was not answered: %r", error)


def mappings(run_dir: Path = RUN_DIR) -> list[Document]:
    """Ask every mapping of this host what it is, in the order of their device numbers.

    The sockets of processes that are gone are removed. Raises `RbdnbdError` without permission.
    """
    try:
        paths = [path for path in run_dir.iterdir() if path.suffix == ".sock"]
    except FileNotFoundError:
        return []
    except OSError as error:
        message = f"cannot read {run_dir}: {error.strerror} (mappings belong to root)"
        raise RbdnbdError(message, error.errno or 0) from error
    with ExitStack() as stack:
        asked = [(path, sock) for path in paths if (sock := _ask(path, stack)) is not None]
        deadline = time.monotonic() + _ANSWER_SECONDS  # for all of them together
        answers = [_answer(path, sock, deadline) for path, sock in asked]
    documents = [document for document in answers if document is not None]
    return sorted(documents, key=lambda document: (len(document["device"]), document["device"]))


def _ask(path: Path, stack: ExitStack) -> socket.socket | None:
    """Connect, which is the question; None when nobody is there any more."""
    sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    sock.settimeout(_ANSWER_SECONDS)
    try:
        sock.connect(str(path))
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return None
    except OSError as error:
        _complain(path, error)
        return None
    return sock


def _answer(path: Path, sock: socket.socket, deadline: float) -> Document | None:
    received = b""
    try:
        while True:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            data = sock.recv(65536)
            if not data:
                return dict(json.loads(received))
            received += data
    except (OSError, ValueError) as error:
        _complain(path, error)
        return None


def _complain(path: Path, error: Exception) -> None:
    """Say that a mapping does not answer, unless it has just left."""
    if path.exists():
        log.warning("no answer from the process behind %s: %s", path, error)
