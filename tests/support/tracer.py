"""What a debugger does to a process: attach to every thread, and let go (ptrace(2))."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

PTRACE_ATTACH = 16
PTRACE_DETACH = 17
_WALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def attach_and_detach(pid: int) -> None:
    """Stop every thread of a process as a debugger does, and let all of them go on.

    Threads may end meanwhile. From one thread only, which is then the tracer.
    """
    traced = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            _ptrace(PTRACE_ATTACH, int(task.name))
            traced.append(int(task.name))
    assert traced
    for thread in traced:
        _, status = os.waitpid(thread, _WALL)
        if os.WIFSTOPPED(status):
            _ptrace(PTRACE_DETACH, thread)


def _ptrace(request: int, thread: int) -> None:
    if _libc.ptrace(request, thread, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"thread {thread}")
