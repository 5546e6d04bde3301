"""What rbdnbd is to reach, as ratios to the stock rbd-nbd with its defaults. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from bench.figures import Sample, geometric_mean, ratios
from bench.samples import samples_of

STOCK: Final = "rbd-nbd"
AGAIN: Final = "rbd-nbd again"


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that is wanted: `measured` must be at least, or at most, `wanted`."""

    what: str
    measured: float
    wanted: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Tell whether it is reached."""
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted


@dataclass(frozen=True, slots=True)
class Wanted:
    """An engine's targets for the native cells, ratios to the stock's."""

    cell: float
    mean: float
    processor: float
    latency: float


THREADS: Final = Wanted(cell=0.90, mean=1.00, processor=1.25, latency=1.10)
EVENTS: Final = Wanted(cell=0.95, mean=1.15, processor=1.00, latency=1.00)
KERNEL: Final = {
    "buffered sequential read": 1.8,
    "buffered sequential write": 1.1,
    "untar on ext4": 1.1,
}
MAP_RATIO: Final = 1.3
LIST_SECONDS: Final = 0.3
MORE_MIB: Final = 20.0
STEADY: Final = 1.05
"""A price that "does not grow": what two runs of the same binary may differ by."""


def targets(results: Mapping[str, Any], name: str) -> list[Target]:
    """Return what is wanted of one of ours, as far as the results tell."""
    found: list[Target] = []
    if name in results.get("native", {}):
        found += _native(results["native"], name)
    for step, wanted in KERNEL.items():
        rates = results.get("kernel", {})
        if name in rates:
            measured = kernel_ratio(rates, name, step)
            found.append(Target(f"{step} through the kernel", measured, wanted, at_least=True))
    found += _once(results, name)
    return found


def doubt(native: Mapping[str, Any]) -> tuple[float, float]:
    """Return how far the stock's rate is from its own: in the worst cell, and on the mean."""
    found = ratios(samples_of(native), AGAIN, STOCK, "iops").values()
    return max(abs(ratio - 1) for ratio in found), abs(geometric_mean(found) - 1)


def kernel_ratio(rates: Mapping[str, Mapping[str, list[float]]], name: str, step: str) -> float:
    """Return the median over the rounds of a rate's ratio to the stock's."""
    pairs = zip(rates[name][step], rates[STOCK][step], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def _native(native: Mapping[str, Any], name: str) -> Iterator[Target]:
    wanted = EVENTS if "events" in name else THREADS
    samples = samples_of(native)
    iops = ratios(samples, name, STOCK, "iops")
    processor = ratios(samples, name, STOCK, "cpu_us")
    latency = ratios(samples, name, STOCK, "p99_us")
    worst = min(iops, key=lambda cell: iops[cell])
    yield Target(f"worst native cell ({worst})", iops[worst], wanted.cell, at_least=True)
    mean = geometric_mean(iops.values())
    yield Target("geometric mean of the native cells", mean, wanted.mean, at_least=True)
    mean = geometric_mean(processor.values())
    yield Target("processor time a request, mean", mean, wanted.processor, at_least=False)
    alone = {cell: latency[cell] for cell in latency if cell.endswith(", 1")}
    if alone:
        worst = max(alone, key=lambda cell: alone[cell])
        what = f"worst 99th percentile at depth 1 ({worst})"
        yield Target(what, alone[worst], wanted.latency, at_least=False)
    more = (native[name]["idle"]["rss_kib"] - native[STOCK]["idle"]["rss_kib"]) / 1024
    yield Target("more memory of an idle mapping, MiB", more, MORE_MIB, at_least=False)


def _once(results: Mapping[str, Any], name: str) -> Iterator[Target]:
    if "map" in results and name in results["map"]:
        measured = results["map"][name]["map"] / results["map"][STOCK]["map"]
        yield Target("wall time of map", measured, MAP_RATIO, at_least=False)
    if "list" in results and name in results["list"]:
        what = "list-mapped with 50 mappings, seconds"
        yield Target(what, results["list"][name], LIST_SECONDS, at_least=False)
    if parts := results.get("million", {}).get(name):
        first, last = (Sample(**parts[index]) for index in (0, -1))
        measured = last.cpu_us / first.cpu_us
        what = "processor time a request, last tenth of a million to the first"
        yield Target(what, measured, STEADY, at_least=False)
        what = "resident memory, the same"
        yield Target(what, last.rss_kib / first.rss_kib, STEADY, at_least=False)
    if large := results.get("sizes", {}).get(name):
        what = "processor time a request, image of 10 TiB to one of 1 GiB"
        yield Target(what, large["cpu_us"], STEADY, at_least=False)
