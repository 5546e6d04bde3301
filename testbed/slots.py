"""Numbers for things that a machine has only once each: a network namespace, an address, a name.

A slot is a locked file. The kernel drops the lock with the process that held it, however that
ended, so whoever gets a slot owns all that carries its number: what is left there belongs to
nobody alive and can be removed. The lowest free slot is taken first, so leftovers do not pile up.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from testbed.processes import Unavailable

LOCKS = Path("/run/rbdnbd-testbed")
SLOTS = range(1, 251)


@contextmanager
def slot(kind: str, locks: Path = LOCKS) -> Iterator[int]:
    """Hold the lowest number of `kind` that no living process holds."""
    locks.mkdir(exist_ok=True)
    for number in SLOTS:
        with (locks / f"{kind}-{number}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield number
            return
    raise Unavailable(f"all {len(SLOTS)} places for a {kind} are taken")
