"""Keep keys where nobody else sees them: not among a process's arguments, and not in a core file.

Whoever is on the host reads every process's arguments (proc(5), cmdline), and a core file outlives
its process. A Ceph key that was given as `--key` is passed on in memory that has a descriptor and
no name, and the command runs anew without it. What a process reads from files it keeps to itself:
it leaves no core, and nobody but root may trace it or look into its memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NoReturn

_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
_KEY: Final = "RBDNBD_KEY"
_MOST: Final = 64 << 10
_ABOVE: Final = 10
"""Descriptors below are a background process's own (rbdnbd.background)."""

_libc = ctypes.CDLL(None, use_errno=True)


def keep_no_core() -> None:
    """Have this process leave no core file, and be nobody's to trace but root's.

    Programs that it starts are not concerned.
    """
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def take_key(words: Sequence[str], has_value: Callable[[str], bool]) -> tuple[list[str], str]:
    """Return a command line without `--key`, and the key; "" for none.

    `has_value` tells whether the word behind an option belongs to it.
    """
    rest, key, left = list[str](), "", list(words)
    while left:
        word = left.pop(0)
        if word == "--key" and left:
            key = left.pop(0)
        elif word.startswith("--key="):
            key = word.removeprefix("--key=")
        elif word == "--":
            return [*rest, word, *left], key
        else:
            rest.append(word)
            if left and has_value(word):
                rest.append(left.pop(0))
    return rest, key


@contextmanager
def handed_on(key: str) -> Iterator[tuple[int, ...]]:
    """Have a program that is started in the `with` find the key; yields what it must inherit."""
    if not key:
        yield ()
        return
    memory = os.memfd_create("key")
    fd = fcntl.fcntl(memory, fcntl.F_DUPFD, _ABOVE)
    os.close(memory)
    try:
        os.write(fd, key.encode())
        os.environ[_KEY] = str(fd)
        yield (fd,)
    finally:
        del os.environ[_KEY]
        os.close(fd)


def handed_key() -> str:
    """Take the key that this program was handed, "" for none."""
    number = os.environ.pop(_KEY, "")
    if not number:
        return ""
    try:
        return os.pread(int(number), _MOST, 0).decode()
    finally:
        os.close(int(number))


def begin_anew(module: str, words: Sequence[str], key: str) -> NoReturn:
    """Be the same command with these words, and with the key out of sight."""
    with handed_on(key):
        os.execv(sys.executable, [sys.executable, "-P", "-m", module, *words])
