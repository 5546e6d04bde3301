"""What is done once for a mapping: map, unmap, and list-mapped with many mappings, in wall time."""

from __future__ import annotations

import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.candidates import ENGINES, RBDNBD
from bench.figures import turns
from bench.gateway import END_SECONDS, make_devices, shimmed
from bench.load import START_SECONDS, Load
from bench.rounds import Say, image
from bench.targets import STOCK
from testbed.cluster import Cluster
from testbed.processes import Unavailable, end

MAPPINGS: Final = 50
MAP_ROUNDS: Final = 9
LIST_ROUNDS: Final = 7


@dataclass(frozen=True, slots=True)
class Program:
    """A program with rbd-nbd's commands, as they are called in the background."""

    name: str
    map: tuple[str, ...]
    command: str

    def run(self, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[float, str]:
        """Run one command to its end; return the seconds it took and what it printed."""
        begin = time.monotonic()
        done = subprocess.run(argv, env=dict(environment), capture_output=True, text=True)
        seconds = time.monotonic() - begin
        if done.returncode:
            raise Unavailable(f"failed: {' '.join(argv)}\n{done.stderr.strip()}")
        return seconds, done.stdout


PROGRAMS: Final = (
    Program(STOCK, ("rbd-nbd", "map"), "rbd-nbd"),
    *(
        Program(name, (RBDNBD, "map", "--ioctl", *options), RBDNBD)
        for name, options in ENGINES.items()
    ),
)


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices of one program, each with an nbdload as its kernel."""

    program: Program
    environment: Mapping[str, str]
    loads: Sequence[Load]

    def map(self, index: int, spec: str, *options: str) -> tuple[float, int]:
        """Map an image; return the seconds until the command returned, and who serves it."""
        argv = [*self.program.map, *options, "--device", f"/dev/nbd{index}", spec]
        seconds, _ = self.program.run(argv, self.environment)
        return seconds, self.loads[index].hear("live", START_SECONDS)["pid"]

    def unmap(self, index: int) -> float:
        """Unmap it again; return the seconds until the command returned.

        Not before it is listed, which takes a moment: what rbd-nbd does not list it does not unmap.
        """
        deadline = time.monotonic() + START_SECONDS
        while self._listed()[1] < len(self.loads):
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.program.name} does not list what it has mapped")
        argv = [self.program.command, "unmap", f"/dev/nbd{index}"]
        seconds, _ = self.program.run(argv, self.environment)
        self.loads[index].hear("released", START_SECONDS)
        return seconds

    def list(self) -> float:
        """List the mappings, see that all are there, and return the seconds it took."""
        seconds, found = self._listed()
        if found != len(self.loads):
            raise Unavailable(f"{self.program.name} lists {found} of {len(self.loads)} mappings")
        return seconds

    def _listed(self) -> tuple[float, int]:
        """List the mappings; return the seconds it took, and how many are there."""
        argv = [self.program.command, "list-mapped", "--format", "json"]
        seconds, printed = self.program.run(argv, self.environment)
        found = sum(printed.count(f'/dev/nbd{index}"') > 0 for index in range(len(self.loads)))
        return seconds, found


@contextmanager
def devices(program: Program, cluster: Cluster, count: int) -> Iterator[Devices]:
    """Give a program devices of its own."""
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="rbdnbd-bench-"))
        directory, log = Path(scratch, "devices"), Path(scratch, "log")
        make_devices(directory, count)
        loads: list[Load] = []
        for index in range(count):
            loads.append(Load(["device", str(directory), str(index)], log))
            stack.callback(loads[-1].end)
            loads[-1].hear("listening", START_SECONDS)
        yield Devices(program, shimmed(cluster.environment(), directory), loads)


def map_times(cluster: Cluster, say: Say) -> dict[str, Any]:
    """Return the median seconds of a map and of an unmap, by program."""
    say(f"map and unmap, {MAP_ROUNDS} times each")
    times: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        spec = stack.enter_context(image(cluster, "bench-map", "1G"))
        all_devices = {
            program.name: stack.enter_context(devices(program, cluster, 1)) for program in PROGRAMS
        }
        for number in range(MAP_ROUNDS):
            for name in turns(list(all_devices), number):
                taken = times.setdefault(name, {"map": [], "unmap": []})
                taken["map"].append(all_devices[name].map(0, spec)[0])
                taken["unmap"].append(all_devices[name].unmap(0))
    return {
        name: {step: statistics.median(taken) for step, taken in steps.items()}
        for name, steps in times.items()
    }


def list_times(cluster: Cluster, say: Say) -> dict[str, float]:
    """Return the median seconds of list-mapped with many mappings of a program, by program.

    The mappings are not unmapped, which is not what is measured: their processes are told to end.
    """
    say(f"list-mapped, with {MAPPINGS} mappings of each program")
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        spec = stack.enter_context(image(cluster, "bench-list", "64M"))
        all_devices: dict[str, Devices] = {}
        for program in PROGRAMS:
            made = stack.enter_context(devices(program, cluster, MAPPINGS))
            all_devices[program.name] = made
            for index in range(MAPPINGS):
                _, pid = made.map(index, spec, "--read-only")
                stack.callback(end, pid, signal.SIGTERM, END_SECONDS)
        for number in range(LIST_ROUNDS):
            for name in turns(list(all_devices), number):
                times.setdefault(name, []).append(all_devices[name].list())
    return {name: statistics.median(taken) for name, taken in times.items()}
