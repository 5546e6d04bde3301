"""What the mappings have done, as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_HEADER: Final = ("device", "command", "requests", "errors", "bytes", "mean ms", "in flight")


def statistics(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each command that a mapping has seen, or is at; "" without mappings."""
    if not documents:
        return ""
    rows = [_HEADER, *(row for document in documents for row in _rows(document))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "".join("  ".join(c.ljust(w) for c, w in line).rstrip() + "\n" for line in lines)


def _rows(document: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    busy = Counter(request["command"] for request in document["in_flight"])
    for command, stats in document["stats"].items():
        if stats["requests"] or busy[command]:
            mean = stats["seconds"] / stats["requests"] * 1000 if stats["requests"] else 0.0
            figures = (stats["requests"], stats["errors"], stats["bytes"])
            done = (*map(str, figures), f"{mean:.3f}", str(busy[command]))
            yield (document["device"], command, *done)
