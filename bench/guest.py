"""The part of the benchmark that needs /dev/nbdN, where there is one: on this host or in a VM.

Run as `python -m bench.guest JOB RESULT`, two files of JSON. Every program maps an image of its
own, and they take turns step by step. All figures are rates: more is better.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.figures import turns

MIB: Final = 1024 * 1024
BUFFERED_MIB: Final = 64
FIO_SECONDS: Final = 3

Rates = dict[str, dict[str, list[float]]]
"""By program and step, one for each round."""


def run(*argv: str) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(argv)}\n{done.stderr.strip()}")
    return done.stdout


def seconds(*argv: str) -> float:
    """Run a command and return how long it took."""
    begin = time.monotonic()
    run(*argv)
    return time.monotonic() - begin


def fio(device: str, pattern: str, size: str, depth: int) -> float:
    """Return the requests a second of direct, asynchronous I/O."""
    printed = run(
        *("fio", "--name=bench", "--ioengine=libaio", "--direct=1", "--output-format=json"),
        *(f"--filename={device}", f"--rw={pattern}", f"--bs={size}", f"--iodepth={depth}"),
        *("--time_based", f"--runtime={FIO_SECONDS}"),
    )
    job = json.loads(printed[printed.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


def buffered_write(device: str) -> float:
    """Return the MiB a second of writing through the page cache, until it is stable."""
    options = (f"of={device}", "bs=1M", f"count={BUFFERED_MIB}", "conv=fsync", "status=none")
    return BUFFERED_MIB / seconds("dd", "if=/dev/zero", *options)


def buffered_read(device: str) -> float:
    """Return the MiB a second of reading through the page cache, which is empty at first."""
    run("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    options = ("of=/dev/null", "bs=1M", f"count={BUFFERED_MIB}", "status=none")
    return BUFFERED_MIB / seconds("dd", f"if={device}", *options)


def mkfs(device: str) -> float:
    """Return how often a second an ext4 could be made."""
    return 1 / seconds("mkfs.ext4", "-q", "-F", "-E", "nodiscard", device)


def untar(device: str, archive: Path) -> float:
    """Return how often a second a tree could be unpacked on the ext4 there, until it is stable."""
    with tempfile.TemporaryDirectory(prefix="rbdnbd-bench-") as directory:
        run("mount", device, directory)
        try:
            begin = time.monotonic()
            run("tar", "-C", directory, "-xf", str(archive))
            run("sync", "-f", directory)
            return 1 / (time.monotonic() - begin)
        finally:
            run("umount", directory)


def steps(archive: Path) -> Mapping[str, Callable[[str], float]]:
    """Return what is measured, in this order: mkfs comes after the raw device, untar after it."""
    return {
        "4k random read, 32, direct": lambda device: fio(device, "randread", "4k", 32),
        "4k random write, 32, direct": lambda device: fio(device, "randwrite", "4k", 32),
        "1M sequential read, 16, direct": lambda device: fio(device, "read", "1M", 16),
        "1M sequential write, 16, direct": lambda device: fio(device, "write", "1M", 16),
        "buffered sequential write": buffered_write,
        "buffered sequential read": buffered_read,
        "mkfs.ext4": mkfs,
        "untar on ext4": lambda device: untar(device, archive),
    }


def measure(devices: Mapping[str, str], rounds: int, archive: Path) -> Rates:
    """Measure every step on every device in every round.

    Once before that, all is done on one of them, so that no program is read from disk in a round.
    """
    rates: Rates = {name: {} for name in devices}
    for rate in steps(archive).values():
        rate(next(iter(devices.values())))
    for number in range(rounds):
        print(f"kernel: round {number + 1} of {rounds}", flush=True)
        for step, rate in steps(archive).items():
            for name in turns(list(devices), number):
                rates[name].setdefault(step, []).append(rate(devices[name]))
    return rates


def fill(device: str) -> None:
    """Write the whole device, so that every object is there, and flush."""
    size = int(run("blockdev", "--getsize64", device)) // MIB
    options = (f"of={device}", "bs=1M", f"count={size}", "conv=fsync", "status=none")
    run("dd", "if=/dev/zero", *options)


def pack(archive: Path) -> None:
    """Pack Python's standard library, a thousand files, without what is compiled of it."""
    library = sysconfig.get_paths()["stdlib"]
    excluded = ("--exclude=__pycache__", "--exclude=test", "--exclude=dist-packages")
    run("tar", "-C", library, *excluded, "-cf", str(archive), ".")


def main(argv: Sequence[str]) -> int:
    """Do a job: {"rounds": N, "programs": {NAME: {"map": ARGV, "unmap": ARGV}}}."""
    job: dict[str, Any] = json.loads(Path(argv[0]).read_text())
    devices: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="rbdnbd-bench-") as directory:
        archive = Path(directory, "tree.tar")
        pack(archive)
        try:
            for name, program in job["programs"].items():
                devices[name] = run(*program["map"]).strip()
                fill(devices[name])
            rates = measure(devices, job["rounds"], archive)
        finally:
            for name, device in devices.items():
                run(*job["programs"][name]["unmap"], device)
    Path(argv[1]).write_text(json.dumps(rates))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
