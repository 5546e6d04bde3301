"""Measure rbdnbd beside the stock rbd-nbd, qemu-nbd and librbd alone.

Without options, all parts are measured with everybody, and docs/performance.md and its picture are
written anew. With a choice of parts, candidates or cells the tables are printed and no more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import report
from bench.build import BUILD, build
from bench.candidates import AGAIN, OTHERS, OURS, STOCK, parsed
from bench.cells import CELLS, chosen
from bench.endurance import million, sizes
from bench.kernel import kernel
from bench.machine import description
from bench.mappings import list_times, map_times
from bench.rounds import native
from bench.table import all_tables
from testbed.cluster import Cluster, LocalCluster
from testbed.processes import Unavailable

RESULTS = BUILD / "results.json"
PARTS = ("native", "kernel", "map", "list", "million", "sizes")


def main() -> int:
    """Measure, keep the results, print and write the tables; return an exit status."""
    wanted = arguments()
    names = [candidate.name for candidate in wanted.candidate or OURS]
    if wanted.again:
        results = json.loads(wanted.results.read_text())
    else:
        try:
            results = measured(wanted)
        except Unavailable as error:
            say(f"failed: {error}")
            return 1
        wanted.results.write_text(json.dumps(results, indent=1) + "\n")
    print(all_tables(results, names))
    everything = wanted.parts == PARTS and wanted.cells == CELLS and not wanted.candidate
    if everything and set(PARTS) <= results.keys():
        report.write(results, names)
        say(f"written: {report.PAGE}, {report.PICTURE}, {wanted.results}")
    return 0


def measured(wanted: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that are wanted, one after the other, on one cluster."""
    if Path("/sys/module/nbd").exists() and set(wanted.parts) - {"kernel"}:
        message = "this kernel has the nbd driver, which all parts but 'kernel' play themselves"
        raise Unavailable(f"{message}: modprobe -r nbd")
    ours = wanted.candidate or list(OURS)
    candidates = [STOCK, AGAIN, *ours, *([] if wanted.candidate else OTHERS)]
    cells, rounds, seconds = wanted.cells, wanted.rounds, wanted.seconds
    results: dict[str, Any] = {
        "machine": description(),
        "rounds": rounds,
        "seconds": seconds,
        "kernel_rounds": wanted.kernel_rounds,
    }
    build()
    with ExitStack() as stack:
        cluster = cluster_of(wanted.conf, stack)
        parts: dict[str, Callable[[], Any]] = {
            "native": lambda: native(cluster, candidates, cells, rounds, seconds, say),
            "kernel": lambda: kernel(cluster, wanted.kernel_rounds, say),
            "map": lambda: map_times(cluster, say),
            "list": lambda: list_times(cluster, say),
            "million": lambda: million(cluster, ours, say),
            "sizes": lambda: sizes(cluster, [STOCK, *ours], say),
        }
        for part in wanted.parts:
            results[part] = parts[part]()
    return results


def arguments() -> argparse.Namespace:
    """Return the command line's wishes."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option(
        *("--candidate", "-c"),
        action="append",
        type=parsed,
        metavar="NAME=ARGV",
        help="measure this, beside rbd-nbd twice, and nobody else; ARGV has {image} in it, and"
        " {device} or {socket}; may be repeated. Parts native, million and sizes",
    )
    option(
        "--cells",
        type=chosen,
        default=CELLS,
        metavar="WORDS;…",
        help="only the native cells whose names contain one of these",
    )
    option(
        "--parts",
        type=parts_of,
        metavar="PART,…",
        help=f"of {','.join(PARTS)}  [default: all; with --candidate or --cells: native]",
    )
    option("--rounds", type=positive, default=7, metavar="N", help="[default: 7]")
    option("--seconds", type=float, default=1.0, metavar="S", help="of a native cell  [default: 1]")
    option("--kernel-rounds", type=positive, default=5, metavar="N", help="[default: 5]")
    option("--conf", type=Path, metavar="FILE", help="a cluster that exists: its pool rbd is used")
    option("--results", type=Path, default=RESULTS, metavar="FILE", help=f"[default: {RESULTS}]")
    option("--again", action="store_true", help="measure nothing: show the results that there are")
    wanted = parser.parse_args()
    if wanted.parts is None:
        wanted.parts = ("native",) if wanted.candidate or wanted.cells != CELLS else PARTS
    return wanted


def parts_of(text: str) -> tuple[str, ...]:
    """Return the parts of a list with commas, in the order in which they are measured."""
    named = text.split(",")
    if unknown := set(named) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return tuple(part for part in PARTS if part in named)


def positive(text: str) -> int:
    """Return a number of rounds."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least one round is needed")
    return number


def cluster_of(conf: Path | None, stack: ExitStack) -> Cluster:
    """Return the cluster that exists already, or a throw-away one."""
    if conf is None:
        return stack.enter_context(LocalCluster(say))
    cluster = Cluster()
    cluster.conf = conf
    return cluster


def say(line: str) -> None:
    """Say what is under way, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
