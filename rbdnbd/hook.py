"""The quiesce hook: the program that holds still what is on the device while a snapshot is made.

One thread waits for what the watch is asked, runs `HOOK DEVICE quiesce` or `HOOK DEVICE unquiesce`,
and answers with the hook's exit status. The hook may take its time; nobody else waits for it but
the snapshot. While it runs, the filesystem that holds our temporary files may be frozen, so its
output is kept in memory until it has ended.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rbdnbd.errors import RbdnbdError
from rbdnbd.image import RbdImage
from rbdnbd.librbd import QuiesceWatch
from rbdnbd.pressure import relenting

log = logging.getLogger(__name__)

_OURS: Final = ("NOTIFY_SOCKET", "RBDNBD_BACKGROUND")
_SNAPSHOT_SECONDS: Final = 60.0
_CLOSE_SECONDS: Final = 10.0
_DEFAULT_SIGNALS: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them


@contextmanager
def quiescing(image: RbdImage, device: str, hook: str) -> Iterator[None]:
    """Run the hook around every snapshot that anybody makes of an image mapped to `device`.

    An exit status n makes the snapshot fail with errno n, a hook that cannot be run with the errno
    of that. A snapshot that is being made at the end is waited for, and the device is not left
    quiesced. An image that is open read-only is not told of snapshots, and needs no hook. Raises
    `RbdnbdError`, but not at the end: what goes wrong then is logged.
    """
    if image.read_only:
        log.info("%s is read-only: the hook %s will not be run", image.spec, hook)
        yield
        return
    quiescer = _Quiescer(image, device, hook)
    try:
        yield
    finally:
        quiescer.stop()


class _Quiescer:
    """A watch and the thread that answers it."""

    def __init__(self, image: RbdImage, device: str, hook: str) -> None:
        self._device, self._hook = device, hook
        self._asked: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        self._going_on = threading.Event()
        self._going_on.set()
        self._watch = QuiesceWatch(image.spec, image.cluster, self._ask)
        self._thread = threading.Thread(target=self._answer, name="quiesce", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop when no snapshot is being made: in the middle of one, librbd 16.2 hangs in unwatch.

        Its unwatch then waits for the end of a notification that it does not count any more.
        """
        if not self._going_on.wait(_SNAPSHOT_SECONDS):
            log.error("%s is still quiesced after %d s", self._device, _SNAPSHOT_SECONDS)
        closing = threading.Thread(target=self._close, name="unwatch", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            log.error("librbd does not stop watching for snapshots")
        self._asked.put(None)
        self._thread.join(_SNAPSHOT_SECONDS)

    def _ask(self, to_quiesce: bool) -> None:
        if to_quiesce:
            self._going_on.clear()
        self._asked.put(to_quiesce)

    def _answer(self) -> None:
        quiesced = False
        while (to_quiesce := self._asked.get()) is not None:
            quiesced = to_quiesce
            status = run_hook(self._hook, self._device, "quiesce" if quiesced else "unquiesce")
            if quiesced:
                self._watch.complete(status)
            else:
                self._going_on.set()
        if quiesced:
            run_hook(self._hook, self._device, "unquiesce")

    def _close(self) -> None:
        try:
            self._watch.close()
        except RbdnbdError as error:
            log.error("%s", error)


def run_hook(hook: str, device: str, command: str) -> int:
    """Run the hook to its end, log what it says, and return its exit status or an errno.

    It runs with none of our signals blocked and without the variables that are meant for us, in a
    process group of its own, so that a Ctrl-C meant for us does not leave a device quiesced, and
    memory that is short is its own concern (`pressure`).
    """
    output = os.memfd_create("hook")
    try:
        pid = _spawn([hook, device, command], output)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = os.pread(output, os.fstat(output).st_size, 0).decode(errors="replace")
    except OSError as error:
        log.error("the hook %s cannot be run: %s", hook, error.strerror)
        return error.errno or errno.EIO
    finally:
        os.close(output)
    for line in said.splitlines():
        log.info("%s %s: %s", hook, command, line)
    log.log(
        logging.ERROR if status else logging.INFO,
        "%s %s %s: exit status %d",
        *(hook, device, command, status),
    )
    return status if status >= 0 else errno.EIO


def _spawn(argv: list[str], output: int) -> int:
    with relenting():
        return os.posix_spawnp(
            argv[0],
            argv,
            {name: value for name, value in os.environ.items() if name not in _OURS},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ],
            setpgroup=0,
            setsigmask=(),
            setsigdef=_DEFAULT_SIGNALS,
        )
