"""One candidate with an image of its own, serving it to a load of its own, for as long as a `with`.

Where it attaches /dev/nbdN, nbdshim.so and nbdload stand in for the driver, in a directory that
stands in for /dev and /sys.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.build import SHIM
from bench.candidates import Candidate
from bench.cells import KIB, MIB, Cell
from bench.figures import Sample
from bench.load import START_SECONDS, Event, Load
from testbed.processes import Unavailable

END_SECONDS: Final = 30.0
SETTLE_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Gateway:
    """A candidate that serves an image; `idle` is what it held before the first request."""

    candidate: Candidate
    load: Load
    live: Event
    idle: Event

    def fill(self) -> None:
        """Write the whole image, so that every object is there, and read it back.

        The flush ends librbd's writing through, which it does until it has seen one.
        """
        count = self.live["size"] // MIB
        sequential = f"bs={MIB} depth=8 random=0 count={count}"
        self.load.do(f"{sequential} read=0")
        self.load.do(f"{sequential} read=100 verify=1")
        self.load.do(f"bs={4 * KIB} read=0 count=1 sync=flush")

    def run(self, cell: Cell, seconds: float, warmup: float) -> Sample:
        """Measure one cell."""
        return sample_of(self.load.do(cell.job(seconds, warmup)))


def sample_of(event: Event) -> Sample:
    """Return the figures of what nbdload says of a job."""
    fields = ("iops", "p50_us", "p99_us", "cpu_us", "rss_kib", "threads")
    return Sample(**{field: event[field] for field in fields})


def make_devices(directory: Path, count: int) -> None:
    """Make /dev, /sys and the place for questions of `count` devices below a directory."""
    parameters = directory / "sys/module/nbd/parameters"
    for made in (parameters, directory / "dev", directory / "ctl"):
        made.mkdir(parents=True)
    (parameters / "nbds_max").write_text(f"{count}\n")
    for index in range(count):
        queue = directory / f"sys/block/nbd{index}/queue"
        queue.mkdir(parents=True)
        (directory / f"dev/nbd{index}").touch()
        (queue.parent / "size").write_text("0\n")
        for name, value in (
            ("logical_block_size", 512),
            ("max_hw_sectors_kb", 32768),
            ("max_sectors_kb", 128),
            ("read_ahead_kb", 128),
        ):
            (queue / name).write_text(f"{value}\n")


def shimmed(environment: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Return the environment of a program that is to see the devices below a directory."""
    return {**environment, "LD_PRELOAD": str(SHIM), "RBDNBD_BENCH_DIR": str(directory)}


@contextmanager
def serving(
    candidate: Candidate, image: str, environment: Mapping[str, str], directory: Path
) -> Iterator[Gateway]:
    """Start a candidate and its load, and end both in good order; raises Unavailable."""
    directory.mkdir(parents=True)
    log = directory / "log"
    start = _on_device if candidate.has_device else _on_socket
    with start(candidate, image, environment, directory, log) as load:
        live = load.hear("live", START_SECONDS)
        time.sleep(SETTLE_SECONDS)
        yield Gateway(candidate, load, live, load.do("idle", "idle"))
        load.do("disconnect", "released")


@contextmanager
def _on_device(
    candidate: Candidate, image: str, environment: Mapping[str, str], directory: Path, log: Path
) -> Iterator[Load]:
    devices = directory / "devices"
    make_devices(devices, 1)
    load = Load(["device", str(devices), "0"], log)
    try:
        load.hear("listening", START_SECONDS)
        argv = candidate.command(device="/dev/nbd0", image=image)
        with _running(argv, shimmed(environment, devices), log) as process:
            load.server = process
            yield load
            load.server = None
            _wait(process, argv)
    finally:
        load.end()


@contextmanager
def _on_socket(
    candidate: Candidate, image: str, environment: Mapping[str, str], directory: Path, log: Path
) -> Iterator[Load]:
    path = directory / "socket"
    argv = candidate.command(socket=str(path), image=image)
    with _running(argv, environment, log) as process:
        _until(lambda: path.exists() or process.poll() is not None, f"{argv[0]} does not listen")
        load = Load(["client", str(path), ""], log)
        try:
            yield load
        finally:
            load.end()


@contextmanager
def _running(
    argv: list[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as said:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *argv],
            env=dict(environment) | {"PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], argv: list[str]) -> None:
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{argv[0]} did not end when its device was released") from None
    if process.returncode:
        raise Unavailable(f"{argv[0]} ended with status {process.returncode}")


def _until(true: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise Unavailable(otherwise)
        time.sleep(_POLL_SECONDS)
