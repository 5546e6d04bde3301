"""What a connection has done: requests, bytes, errors and latency for each command.

Plain integers, added up by whoever holds the connection's sending turn, so that no lock of its own
is needed; readers in other threads see figures that may be one request apart, never wrong ones.
Latency is kept in buckets of powers of two: bucket n counts the requests that took less than 2**n
microseconds (and not less than half of that).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from rbdnbd.wire import COMMAND_NAMES

BUCKETS: Final = 32


@dataclass(slots=True)
class CommandStats:
    """One command's figures: `seconds` is the sum of all latencies."""

    requests: int = 0
    errors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    latency: list[int] = field(default_factory=lambda: [0] * BUCKETS)


class Stats:
    """The figures of one connection, a `CommandStats` for each command that can be answered."""

    def __init__(self) -> None:
        self._commands = {command: CommandStats() for command in COMMAND_NAMES}

    def record(self, command: int, length: int, seconds: float, error: int) -> None:
        """Count one answered request; `error` is the NBD error it was answered with, 0 for none."""
        stats = self._commands.get(command)
        if stats is None:
            return
        stats.requests += 1
        stats.seconds += seconds
        stats.latency[min(int(seconds * 1e6).bit_length(), BUCKETS - 1)] += 1
        if error:
            stats.errors += 1
        else:
            stats.bytes += length

    def add(self, other: Stats) -> None:
        """Add another connection's figures to these."""
        for command, theirs in other._commands.items():
            ours = self._commands[command]
            ours.requests += theirs.requests
            ours.errors += theirs.errors
            ours.bytes += theirs.bytes
            ours.seconds += theirs.seconds
            ours.latency = [a + b for a, b in zip(ours.latency, theirs.latency, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by the command's name, for JSON: microseconds are those of latency."""
        return {
            COMMAND_NAMES[command]: {
                "requests": stats.requests,
                "errors": stats.errors,
                "bytes": stats.bytes,
                "seconds": round(stats.seconds, 6),
                "latency_log2_us": _trimmed(stats.latency),
            }
            for command, stats in self._commands.items()
        }


def total(stats: Iterable[Stats]) -> Stats:
    """Return the sum of several connections' figures."""
    whole = Stats()
    for each in stats:
        whole.add(each)
    return whole


def _trimmed(buckets: list[int]) -> list[int]:
    """Drop the empty buckets at the slow end."""
    filled = max((i + 1 for i, count in enumerate(buckets) if count), default=0)
    return buckets[:filled]
