"""A Debian 13 beside this host's files: its rbd, its rbd-nbd, and ours on its Python and librbd.

Commands run chrooted into an unpacked image, which sees this kernel's /dev, /proc, /sys, and the
/run and /tmp of here: devices, sockets and records are shared with what runs outside. All mounts
are in a namespace of their own, which ends with the `with`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rbdnbd
from tests.support.rbd_nbd import Run, runner

SHARED = ("/dev", "/proc", "/sys", "/run", "/tmp")


class Debian13:
    """What runs there: `ours`, `stock`, and `rbd`, with ours beside it where it looks for it."""

    def __init__(self, enter: list[str], programs: Path, environment: dict[str, str]) -> None:
        def here(program: str) -> Run:
            return runner([*enter, "env", "-i", *variables, program])

        variables = [f"{name}={value}" for name, value in environment.items()]
        self.ours, self.rbd = here(f"{programs}/rbd-nbd"), here(f"{programs}/rbd")
        self.stock = here("/usr/bin/rbd-nbd")


@contextmanager
def debian13(root: Path, ceph_conf: Path, scratch: Path) -> Iterator[Debian13]:
    """Have Debian 13 at `root`, with `scratch`, a directory below /tmp, for our programs."""
    shared = [*SHARED, str(ceph_conf.parent)]
    script = "".join(
        f"mkdir -p {root}{each}\nmount --rbind {each} {root}{each}\n" for each in shared
    )
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation=slave", "sh", "-ec", f"{script}echo; read end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        environment = _install(root, scratch) | {"CEPH_CONF": str(ceph_conf)}
        enter = ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", "chroot", str(root)]
        yield Debian13(enter, scratch, environment)


def _install(root: Path, scratch: Path) -> dict[str, str]:
    """Put our package and the two programs there; it is compiled when it is first run."""
    package = Path(rbdnbd.__file__).parent
    shutil.copytree(package, scratch / "lib/rbdnbd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "usr/bin/rbd", scratch / "rbd")
    ours = scratch / "rbd-nbd"
    ours.write_text('#!/bin/sh\nexec /usr/bin/python3 -P -m rbdnbd.drop_in "$@"\n')
    ours.chmod(0o755)
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(scratch / "lib")}
