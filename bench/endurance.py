"""Whether a request's price stays what it is: over a million requests, and on a large image."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench.candidates import Candidate
from bench.cells import KIB, MIB
from bench.figures import Sample, ratio, turns
from bench.gateway import Gateway, sample_of, serving
from bench.rounds import Say, image
from testbed.cluster import Cluster

REQUESTS: Final = 1_000_000
PARTS: Final = 10
SMALL, LARGE = "1G", "10T"
SPAN: Final = 64 * MIB
SIZE_ROUNDS: Final = 9


def million(cluster: Cluster, candidates: Sequence[Candidate], say: Say) -> dict[str, Any]:
    """Return the figures of every tenth of a million requests, 4k, 70/30, 32 in flight."""
    line = f"bs={4 * KIB} depth=32 read=70 span={SPAN} count={REQUESTS // PARTS}"
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rbdnbd-bench-")))
        gateways: dict[str, Gateway] = {}
        for number, candidate in enumerate(candidates):
            spec = stack.enter_context(image(cluster, f"bench-{number}", "64M"))
            place, environment = scratch / str(number), cluster.environment()
            gateway = stack.enter_context(serving(candidate, spec, environment, place))
            gateway.fill()
            gateways[candidate.name] = gateway
        parts: dict[str, list[Sample]] = {name: [] for name in gateways}
        for part in range(PARTS):
            say(f"a million requests: part {part + 1} of {PARTS}")
            for name in turns(list(gateways), part):
                parts[name].append(sample_of(gateways[name].load.do(line)))
    return {name: [asdict(sample) for sample in several] for name, several in parts.items()}


def sizes(cluster: Cluster, candidates: Sequence[Candidate], say: Say) -> dict[str, Any]:
    """Return how many times the small image's figures a large one's are, by candidate.

    What is read, at random, is the same part of both: objects that are there.
    """
    line = f"bs={4 * KIB} depth=32 read=100 span={SPAN} seconds=0.5 warmup=0.1"
    found: dict[str, Any] = {}
    for candidate in candidates:
        say(f"{candidate.name}: an image of {LARGE} beside one of {SMALL}")
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rbdnbd-bench-")))
            gateways: dict[str, Gateway] = {}
            for size in (SMALL, LARGE):
                spec = stack.enter_context(image(cluster, f"bench-{size.lower()}", size))
                place, environment = scratch / size, cluster.environment()
                gateways[size] = stack.enter_context(serving(candidate, spec, environment, place))
                fill = f"bs={MIB} depth=8 read=0 random=0 span={SPAN} count={SPAN // MIB}"
                gateways[size].load.do(fill)
            samples: dict[str, list[Sample]] = {SMALL: [], LARGE: []}
            for number in range(SIZE_ROUNDS):
                for size in turns((SMALL, LARGE), number):
                    samples[size].append(sample_of(gateways[size].load.do(line)))
        found[candidate.name] = {
            "iops": ratio(samples[LARGE], samples[SMALL], "iops"),
            "cpu_us": ratio(samples[LARGE], samples[SMALL], "cpu_us"),
            "rss_kib": samples[LARGE][-1].rss_kib - samples[SMALL][-1].rss_kib,
        }
    return found
