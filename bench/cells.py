"""What is measured: a cell is one pattern of requests, the same for every candidate."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Final, Literal

KIB: Final = 1024
MIB: Final = 1024 * KIB

Sync = Literal["", "flush", "durable"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One pattern: `size` bytes a request, `depth` in flight, `read` per cent of them reads.

    `sync`: each write is followed by a flush ("flush"), or made durable in the way that the server
    offers, with FUA or a flush ("durable"), before it counts.
    """

    name: str
    size: int
    depth: int
    read: int
    random: bool = True
    sync: Sync = ""

    def job(self, seconds: float, warmup: float) -> str:
        """Return the line that makes nbdload do it."""
        words: dict[str, float | str] = {
            "bs": self.size,
            "depth": self.depth,
            "read": self.read,
            "random": int(self.random),
            "seconds": seconds,
            "warmup": warmup,
        }
        if self.sync:
            words["sync"] = self.sync
        return " ".join(f"{key}={value}" for key, value in words.items())


CELLS: Final = (
    *(Cell(f"4k random read, {depth}", 4 * KIB, depth, 100) for depth in (1, 32, 128)),
    *(Cell(f"4k random write, {depth}", 4 * KIB, depth, 0) for depth in (1, 32, 128)),
    Cell("4k random 70/30, 32", 4 * KIB, 32, 70),
    Cell("64k sequential read, 16", 64 * KIB, 16, 100, random=False),
    Cell("64k sequential write, 16", 64 * KIB, 16, 0, random=False),
    Cell("1M sequential read, 16", MIB, 16, 100, random=False),
    Cell("1M sequential write, 16", MIB, 16, 0, random=False),
    Cell("4k write and flush, 1", 4 * KIB, 1, 0, sync="flush"),
    Cell("4k durable write, 1", 4 * KIB, 1, 0, sync="durable"),
)
"""The native cells. The last number of a name is the depth."""


def chosen(patterns: str) -> tuple[Cell, ...]:
    """Return the cells whose name contains one of the patterns, which stand between semicolons."""
    wanted = [pattern.strip() for pattern in patterns.split(";")]
    cells = tuple(cell for cell in CELLS if any(pattern in cell.name for pattern in wanted))
    if not cells:
        names = "; ".join(cell.name for cell in CELLS)
        raise argparse.ArgumentTypeError(f"no cell is called {patterns}: there are {names}")
    return cells
