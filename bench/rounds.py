"""The native part: all candidates at once on images of their own, cell by cell in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.candidates import Candidate
from bench.cells import Cell
from bench.figures import Sample, turns
from bench.fio import Fio
from bench.gateway import Gateway, serving
from testbed.cluster import Cluster
from testbed.processes import Unavailable

IMAGE_MIB = 256
WARMUP_PART = 0.2

Say = Callable[[str], None]
Runner = Gateway | Fio
Samples = dict[str, dict[str, list[Sample]]]


@contextmanager
def image(cluster: Cluster, name: str, size: str) -> Iterator[str]:
    """Give an image of the pool rbd for the time of a `with`."""
    spec = f"rbd/{name}"
    cluster.rbd("create", spec, "--size", size)
    try:
        yield spec
    finally:
        cluster.rbd("rm", "--no-progress", spec)


@contextmanager
def all_serving(
    cluster: Cluster, candidates: Sequence[Candidate], say: Say
) -> Iterator[dict[str, Runner]]:
    """Give every candidate, by name, with its image written full."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rbdnbd-bench-")))
        runners: dict[str, Runner] = {}
        for number, candidate in enumerate(candidates):
            say(f"{candidate.name}: filling an image of {IMAGE_MIB} MiB")
            spec = stack.enter_context(image(cluster, f"bench-{number}", f"{IMAGE_MIB}M"))
            environment = cluster.environment()
            if candidate.is_fio:
                runners[candidate.name] = Fio(candidate, spec, environment)
            else:
                place = scratch / str(number)
                runners[candidate.name] = stack.enter_context(
                    serving(candidate, spec, environment, place)
                )
            runners[candidate.name].fill()
        yield runners


def measure(
    runners: Mapping[str, Runner],
    cells: Sequence[Cell],
    rounds: int,
    seconds: float,
    say: Say,
) -> Samples:
    """Measure every cell of every candidate in every round.

    The turns are cell by cell, so that what is compared was measured seconds apart.
    """
    samples: Samples = {name: {cell.name: [] for cell in cells} for name in runners}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for cell in cells:
            for name in turns(list(runners), number):
                try:
                    sample = runners[name].run(cell, seconds, seconds * WARMUP_PART)
                except Unavailable as error:
                    raise Unavailable(f"{name}, {cell.name}: {error}") from error
                samples[name][cell.name].append(sample)
    return samples


def native(
    cluster: Cluster,
    candidates: Sequence[Candidate],
    cells: Sequence[Cell],
    rounds: int,
    seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Run the native part and return it as it is kept in the results file."""
    with all_serving(cluster, candidates, say) as runners:
        samples = measure(runners, cells, rounds, seconds, say)
        return {
            name: {
                "argv": list(runner.candidate.argv),
                "idle": runner.idle if isinstance(runner, Gateway) else None,
                "cells": {
                    cell: [asdict(sample) for sample in several]
                    for cell, several in samples[name].items()
                },
            }
            for name, runner in runners.items()
        }
