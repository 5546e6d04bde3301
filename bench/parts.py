"""The parts of the benchmark, one after the other: a part that fails does not lose the others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.candidates import STOCK, Candidate
from bench.cells import Cell
from bench.endurance import million, sizes
from bench.kernel import kernel
from bench.mappings import list_times, map_times
from bench.results import Results, Run
from bench.rounds import Say, native
from testbed.cluster import Cluster
from testbed.processes import Unavailable

PARTS: Final = ("native", "kernel", "map", "list", "million", "sizes")
"""In the order in which they are measured."""

Measures = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """How to measure: `ours` are those of the candidates that are to be held to the targets."""

    candidates: Sequence[Candidate]
    ours: Sequence[Candidate]
    cells: Sequence[Cell]
    rounds: int
    seconds: float
    kernel_rounds: int


def measures(cluster: Cluster, wanted: Wanted, say: Say) -> Measures:
    """Return what measures each part."""
    how = (wanted.cells, wanted.rounds, wanted.seconds)
    return {
        "native": lambda: native(cluster, wanted.candidates, *how, say),
        "kernel": lambda: kernel(cluster, wanted.kernel_rounds, say),
        "map": lambda: map_times(cluster, say),
        "list": lambda: list_times(cluster, say),
        "million": lambda: million(cluster, wanted.ours, say),
        "sizes": lambda: sizes(cluster, [STOCK, *wanted.ours], say),
    }


def measure(
    parts: Sequence[str], measures: Measures, results: Results, run: Run, say: Say
) -> dict[str, str]:
    """Measure some parts, and keep each at once; return why those failed that did, by part."""
    failures: dict[str, str] = {}
    for part in parts:
        begin = time.monotonic()
        try:
            results.keep(part, run, measures[part]())
        except Unavailable as error:
            failures[part] = str(error)
        except Exception:  # the parts that come have nothing to do with it
            failures[part] = traceback.format_exc().rstrip()
        outcome = f"failed: {failures[part]}" if part in failures else "done"
        say(f"{part}, {(time.monotonic() - begin) / 60:.1f} minutes: {outcome}")
    return failures
