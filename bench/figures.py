"""The arithmetic: samples to medians, medians to ratios. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Figure = Literal["iops", "p50_us", "p99_us", "cpu_us"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One cell of one candidate in one round: `cpu_us` is the server's processor time a request.

    `rss_kib` and `threads` are the server's at the end of it; 0 where there is no server.
    """

    iops: float
    p50_us: float
    p99_us: float
    cpu_us: float
    rss_kib: int = 0
    threads: int = 0


def value(sample: Sample, figure: Figure) -> float:
    """Return one figure of a sample."""
    return float(getattr(sample, figure))


def median(samples: Sequence[Sample], figure: Figure) -> float:
    """Return the median of a figure over the rounds."""
    return statistics.median(value(sample, figure) for sample in samples)


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample], figure: Figure) -> float:
    """Return the median, over the rounds, of how many times theirs ours is.

    Round is compared with round, because a machine that drifts does so for both.
    """
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(value(mine, figure) / value(its, figure) for mine, its in pairs)


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the n-th root of the product of n ratios."""
    values = list(ratios)
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def turns(names: Sequence[str], number: int) -> list[str]:
    """Return the order in which candidates take turns in round `number`.

    Every second round goes the other way than the one before, so that over both nobody comes
    earlier on the average than another, nor always after the same one; then the next one begins.
    """
    start = number // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if number % 2 else order


def ratios(
    results: Mapping[str, Mapping[str, Sequence[Sample]]], name: str, stock: str, figure: Figure
) -> dict[str, float]:
    """Return a candidate's ratio to the stock in each cell."""
    return {
        cell: ratio(samples, results[stock][cell], figure)
        for cell, samples in results[name].items()
    }
