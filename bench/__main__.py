"""Measure rbdnbd beside the stock rbd-nbd, qemu-nbd and librbd alone.

Each part's results are kept as soon as they are there. When those of all parts are, and of this
machine, docs/performance.md and its picture are written anew. With a choice of candidates or cells
the results go to a file of their own, and the tables are printed and no more.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from bench import report
from bench.build import BUILD, build
from bench.candidates import AGAIN, OTHERS, OURS, STOCK, parsed
from bench.cells import CELLS, chosen
from bench.machine import description
from bench.parts import PARTS, Wanted, measure, measures
from bench.results import Results
from bench.table import all_tables
from testbed.cluster import Cluster, LocalCluster
from testbed.processes import Unavailable

RESULTS = BUILD / "results.json"
CHOICE = BUILD / "choice.json"


def main() -> int:
    """Measure, keep the results, print and write the tables; return an exit status."""
    wanted = arguments()
    names = [candidate.name for candidate in wanted.candidate or OURS]
    failures: dict[str, str] = {}
    try:
        results = Results(wanted.results)
        if not wanted.again:
            failures = measured(wanted, results)
    except (Unavailable, ValueError) as error:
        say(f"failed: {error}")
        return 1
    print(all_tables(results.figures(), names))
    if wanted.results == RESULTS and results.complete(PARTS):
        report.write(results, names)
        say(f"written: {report.PAGE}, {report.PICTURE}")
    for part, reason in failures.items():
        say(f"the part {part} failed: {reason}")
    return 1 if failures else 0


def measured(wanted: argparse.Namespace, results: Results) -> dict[str, str]:
    """Measure the parts that are wanted on one cluster; return why those failed that did."""
    if Path("/sys/module/nbd").exists() and set(wanted.parts) - {"kernel"}:
        message = "this kernel has the nbd driver, which all parts but 'kernel' play themselves"
        raise Unavailable(f"{message}: modprobe -r nbd")
    ours = wanted.candidate or list(OURS)
    how = Wanted(
        candidates=[STOCK, AGAIN, *ours, *([] if wanted.candidate else OTHERS)],
        ours=ours,
        cells=wanted.cells,
        rounds=wanted.rounds,
        seconds=wanted.seconds,
        kernel_rounds=wanted.kernel_rounds,
    )
    run = {
        "began": time.strftime("%Y-%m-%d %H:%M"),
        "machine": description(),
        "rounds": how.rounds,
        "seconds": how.seconds,
        "kernel_rounds": how.kernel_rounds,
    }
    build()
    with ExitStack() as stack:
        cluster = cluster_of(wanted.conf, stack)
        return measure(wanted.parts, measures(cluster, how, say), results, run, say)


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
    option("--rounds", type=positive, default=6, metavar="N", help="[default: 6]")
    option("--seconds", type=float, default=1.0, metavar="S", help="of a native cell  [default: 1]")
    option("--kernel-rounds", type=positive, default=5, metavar="N", help="[default: 5]")
    option("--conf", type=Path, metavar="FILE", help="a cluster that exists: its pool rbd is used")
    option(
        "--results",
        type=Path,
        metavar="FILE",
        help=f"[default: {RESULTS}; with --candidate or --cells: {CHOICE}]",
    )
    option("--again", action="store_true", help="measure nothing: show the results that there are")
    wanted = parser.parse_args()
    choice = wanted.candidate or wanted.cells != CELLS
    wanted.parts = wanted.parts or (("native",) if choice else PARTS)
    wanted.results = wanted.results or (CHOICE if choice else RESULTS)
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
