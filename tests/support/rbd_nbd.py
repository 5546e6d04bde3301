"""Ceph's rbd-nbd and ours as programs: run one, and say what it must have said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

STOCK = ("/usr/bin/rbd-nbd",)
OURS = (str(Path(sys.executable).with_name("rbd-nbd")),)

LISTS = (
    ("list-mapped",),
    ("list-mapped", "--format", "json"),
    ("list-mapped", "--format", "json", "--pretty-format"),
    ("list-mapped", "--format", "xml"),
    ("list-mapped", "--format", "xml", "--pretty-format"),
)


_PATIENCE = re.compile(r"^rbd-?nbd: still .* \(\d+ s\)\n", re.MULTILINE)


class Done(NamedTuple):
    """All that a caller learns of a command: status, stdout, stderr."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]


def runner(command: Sequence[str], **environment: str) -> Run:
    """Return a function that runs `command` with more words and returns when both streams end."""
    inherited = {name: value for name, value in os.environ.items() if name != "CEPH_ARGS"}

    def run(*words: str, **more: str) -> Done:
        done = subprocess.run(
            [*command, *words],
            env=inherited | environment | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


def printed(done: Done) -> str:
    """Return what a command that has to succeed printed.

    On stderr it may say that it takes long, as it does on a processor that is emulated and shared.
    """
    assert (done.status, _PATIENCE.sub("", done.err)) == (0, "")
    return done.out


def refused(sentence: str) -> Done:
    """Return what a refusal looks like."""
    return Done(1, "", f"rbd-nbd: {sentence}\n")
