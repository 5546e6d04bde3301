"""fio's rbd engine: librbd in the process that makes the load, without any server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.candidates import Candidate
from bench.cells import MIB, Cell
from bench.figures import Sample
from testbed.processes import Unavailable


@dataclass(frozen=True, slots=True)
class Fio:
    """fio on an image."""

    candidate: Candidate
    image: str
    environment: Mapping[str, str]

    def fill(self) -> None:
        """Write the whole image, so that every object is there."""
        self._fio("--rw=write", f"--bs={MIB}", "--iodepth=8")

    def run(self, cell: Cell, seconds: float, warmup: float) -> Sample:
        """Measure one cell."""
        job = self._fio(
            *options(cell),
            "--time_based",
            f"--runtime={seconds * 1000:.0f}ms",  # fio takes no fractions
            f"--ramp_time={warmup * 1000:.0f}ms",
        )
        return sample_of(job)

    def _fio(self, *arguments: str) -> dict[str, Any]:
        pool, image = self.image.split("/")
        command = [
            *(
                "fio",
                "--name=bench",
                "--ioengine=rbd",
                "--clientname=admin",
                "--output-format=json",
            ),
            *(
                f"--pool={pool}",
                f"--rbdname={image}",
                "--percentile_list=50:99",
                "--lat_percentiles=1",
                *arguments,
            ),
        ]
        done = subprocess.run(
            command, env=dict(self.environment), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Unavailable(f"failed: {' '.join(command)}\n{done.stderr.strip()}")
        job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        if job["error"]:
            raise Unavailable(f"fio ended with error {job['error']}: {' '.join(command)}")
        return job


def options(cell: Cell) -> Sequence[str]:
    """Return a cell in fio's words; a FLUSH is its fsync, and librbd has no FUA."""
    if 0 < cell.read < 100:
        pattern, mix = "rw", [f"--rwmixread={cell.read}"]
    else:
        pattern, mix = "read" if cell.read else "write", []
    return [
        f"--rw={'rand' if cell.random else ''}{pattern}",
        *mix,
        f"--bs={cell.size}",
        f"--iodepth={cell.depth}",
        *(["--fsync=1"] if cell.sync else []),
    ]


def sample_of(job: Mapping[str, Any]) -> Sample:
    """Return the figures of a job of fio's JSON.

    A mix's latencies are those of its reads; with a flush behind each write they are the sum of
    a write's and a flush's, each percentile by itself. There is no
    server, so it has no processor time.
    """
    ways = [job[way] for way in ("read", "write") if job[way]["total_ios"]]
    latencies = [ways[0]["lat_ns"]["percentile"]]
    if job["sync"]["total_ios"]:
        latencies.append(job["sync"]["lat_ns"]["percentile"])
    return Sample(
        iops=sum(way["iops"] for way in ways),
        p50_us=sum(latency["50.000000"] for latency in latencies) / 1000,
        p99_us=sum(latency["99.000000"] for latency in latencies) / 1000,
        cpu_us=0.0,
    )
