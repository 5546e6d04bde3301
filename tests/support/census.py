"""What there is of the product on this host, to be counted before and after."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from rbdnbd.control import RUN_DIR

ESTABLISHED = "01"


class Census(NamedTuple):
    """What must be the same before and after; each a set of names, or a number."""

    processes: frozenset[str]
    connected_devices: frozenset[str]
    run_files: frozenset[str]
    temporary_files: frozenset[str]
    unix_sockets: int
    tcp_connections: int


class Size(NamedTuple):
    """What a process has: open files, threads, and KiB of memory."""

    files: int
    threads: int
    memory: int


def census(temporary: Path) -> Census:
    """Count all that a command could leave behind here, with that in TMPDIR, but for /dev."""
    return Census(
        processes=frozenset(_processes()),
        connected_devices=frozenset(pid.parent.name for pid in Path("/sys/block").glob("nbd*/pid")),
        run_files=frozenset(os.listdir(RUN_DIR)),
        temporary_files=frozenset(os.listdir(temporary)),
        unix_sockets=len(Path("/proc/net/unix").read_text().splitlines()),
        tcp_connections=sum(
            line.split()[3] == ESTABLISHED
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        ),
    )


def size(pid: int) -> Size:
    """Return what a process has."""
    process = Path(f"/proc/{pid}")
    memory = (process / "status").read_text().partition("VmRSS:")[2].split()[0]
    return Size(
        files=len(os.listdir(process / "fd")),
        threads=len(os.listdir(process / "task")),
        memory=int(memory),
    )


def kernel_memory() -> int:
    """Return the KiB that the kernel has for itself and cannot give back."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("SUnreclaim:")[2].split()[0])


def nodes() -> frozenset[str]:
    """Return the names of the block devices' nodes in /dev."""
    return frozenset(path.name for path in Path("/dev").glob("nbd*"))


def _processes() -> list[str]:
    """Return every process that has a command line, a kernel's thread has none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if argv[0]:
                found.append(f"{entry.name} {' '.join(argv)[:80]}")
    return found
