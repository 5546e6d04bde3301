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
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rbdnbd.errors import RbdnbdError

log = logging.getLogger(__name__)

RUN_DIR: Final = Path("/run/rbdnbd")
_ANSWER_SECONDS: Final = 2.0

Document = dict[str, Any]


class Control:
    """Answer for one mapping, on a socket of its own, from entering to leaving the context.

    `describe` is called in this room's thread for every question; it must not block.
    """

    def __init__(self, describe: Callable[[], Document], run_dir: Path = RUN_DIR) -> None:
        self._describe = describe
        self._path = run_dir / f"{os.getpid()}-{secrets.token_hex(4)}.sock"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._answer, name="control", daemon=True)

    def __enter__(self) -> Control:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            bound = self._path.with_suffix(
                ""
            )  # not asked, and not taken for stale, before listen()
            self._sock.bind(str(bound))
            self._sock.listen()
            bound.rename(self._path)
        except OSError as error:
            self._sock.close()
            message = f"cannot listen in {self._path.parent}: {error.strerror or error}"
            raise RbdnbdError(message, error.errno or 0) from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()

    def _answer(self) -> None:
        while True:
            try:
                client, _ = self._sock.accept()
            except OSError:  # shut down
                return
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
    documents = [document for path in paths if (document := _ask(path)) is not None]
    return sorted(documents, key=lambda document: (len(document["device"]), document["device"]))


def _ask(path: Path) -> Document | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_ANSWER_SECONDS)
        try:
            sock.connect(str(path))
            with sock.makefile("rb") as answer:
                document = json.load(answer)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except (OSError, ValueError) as error:  # it left, or hangs, between our question and answer
            if path.exists():
                log.warning("no answer from %s: %s", path, error)
        else:
            return dict(document)
    return None
