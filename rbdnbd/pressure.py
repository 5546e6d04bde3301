"""Stay able to serve when memory is short: the server must not wait for its own device.

When memory runs out the kernel writes dirty pages, to our device among others, and only then has
memory to give. If we wait for that memory, both wait for ever. So a process that serves a device
of the kernel's is an IO flusher: what the kernel allocates for it never waits for IO, and its own
writes are not slowed down for others' dirty pages (prctl(2), Linux 5.6). Its pages stay in memory
once they have been touched (mlockall(2)), because reading them back could need what it serves, and
it is the last to be killed (proc(5)). An IO flusher's threads are IO flushers too, if they are
started later.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

# linux/prctl.h, asm-generic/mman.h, linux/oom.h, linux/capability.h
_PR_SET_IO_FLUSHER: Final = 57
_PR_GET_IO_FLUSHER: Final = 58
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_OOM_SCORE_ADJ_MIN: Final = -1000
_CAP_IPC_LOCK: Final = 14

_PROC: Final = Path("/proc/self")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
_libc.mlockall.argtypes = (ctypes.c_int,)


def endure(proc: Path = _PROC) -> None:
    """Prepare this process for serving while memory is short; what is refused is logged.

    Main thread, before any other is started. Needs CAP_SYS_RESOURCE and CAP_IPC_LOCK.
    """
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("may wait for the writing of dirty pages", lambda: _set_io_flusher(True)),
        ("may be paged out", lambda: _lock_memory(proc)),
        ("may be killed when memory is short", lambda: _write_score(proc, _OOM_SCORE_ADJ_MIN)),
    )
    for what, prepare in steps:
        try:
            prepare()
        except OSError as error:
            log.warning("this process %s: %s", what, error.strerror)


@contextmanager
def relenting(proc: Path = _PROC) -> Iterator[None]:
    """Start another program: a child gets none of what `endure` did to this process.

    Memory locks end with an exec, the rest is inherited. The score is the whole process's, so
    for the moment that a child takes to start this process can be killed like any other; being an
    IO flusher is the calling thread's own.
    """
    flusher = _prctl(_PR_GET_IO_FLUSHER) == 1
    score = _read_score(proc)
    try:
        if flusher:
            _set_io_flusher(False)
        if score < 0:
            _write_score(proc, 0)
        yield
    finally:
        with suppress(OSError):
            if score < 0:
                _write_score(proc, score)
        with suppress(OSError):
            if flusher:
                _set_io_flusher(True)


def raise_file_limit() -> None:
    """Let this process have as many open files as it may: every client of a server is one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _set_io_flusher(on: bool) -> None:
    """Make the calling thread an IO flusher, or an ordinary one."""
    if _prctl(_PR_SET_IO_FLUSHER, int(on)) < 0:
        raise _refusal()


def _prctl(option: int, argument: int = 0) -> int:
    return int(_libc.prctl(option, argument, 0, 0, 0))


def _lock_memory(proc: Path) -> None:
    """Keep in memory what has been touched, and what will be, but touch nothing for that.

    Only where nothing limits it: under a limit that is not reached yet, the mmap that reaches it
    would fail later, a thread's stack for instance.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and not _capable(_CAP_IPC_LOCK, proc):
        raise OSError(errno.EPERM, "locking memory needs CAP_IPC_LOCK or an infinite memlock limit")
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) < 0:
        raise _refusal()


def _capable(capability: int, proc: Path) -> bool:
    status = (proc / "status").read_text()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> capability & 1)


def _read_score(proc: Path) -> int:
    try:
        return int((proc / "oom_score_adj").read_text())
    except OSError:
        return 0


def _write_score(proc: Path, score: int) -> None:
    (proc / "oom_score_adj").write_text(str(score))


def _refusal() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
