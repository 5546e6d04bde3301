"""The command line of the benchmark: python -m bench."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.build import BUILD, build
from bench.candidates import AGAIN, OTHERS, OURS, STOCK, Candidate, parsed
from bench.cells import CELLS, chosen
from bench.rounds import native
from bench.table import UNITS, figure_table, process_table
from testbed.cluster import Cluster, LocalCluster
from testbed.processes import Unavailable

RESULTS = BUILD / "results.json"


def main() -> int:
    """Measure, keep the results, print the tables; return an exit status."""
    wanted = arguments()
    try:
        build()
        with ExitStack() as stack:
            cluster = cluster_of(wanted.conf, stack)
            results: dict[str, Any] = {
                "native": native(
                    cluster, candidates(wanted), wanted.cells, wanted.rounds, wanted.seconds, say
                )
            }
    except Unavailable as error:
        say(f"failed: {error}")
        return 1
    wanted.results.write_text(json.dumps(results, indent=1) + "\n")
    for figure in UNITS:
        print(figure_table(results["native"], STOCK.name, figure), end="\n\n")
    print(process_table(results["native"]))
    return 0


def arguments() -> argparse.Namespace:
    """Return the command line's wishes."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        *("--candidate", "-c"),
        action="append",
        type=parsed,
        metavar="NAME=ARGV",
        help="measure this, beside rbd-nbd twice, and nothing else; ARGV has {image} in it, and"
        " {device} or {socket}; may be repeated",
    )
    parser.add_argument(
        "--cells",
        type=chosen,
        default=CELLS,
        metavar="WORDS;…",
        help="only the cells whose names contain one of these",
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="[default: 9]")
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="of one cell, each [default: 1]"
    )
    parser.add_argument(
        "--conf", type=Path, metavar="FILE", help="a cluster that exists; its pool rbd is written"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    return parser.parse_args()


def candidates(wanted: argparse.Namespace) -> list[Candidate]:
    """Return who takes part."""
    others = wanted.candidate if wanted.candidate else [*OURS, *OTHERS]
    return [STOCK, AGAIN, *others]


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
