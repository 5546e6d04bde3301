"""The tables that a person reads, in a terminal and, the same, in docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.figures import Figure, Sample, geometric_mean, median, ratios

UNITS: Mapping[Figure, str] = {
    "iops": "requests a second",
    "p50_us": "median latency, µs",
    "p99_us": "99th percentile of the latency, µs",
    "cpu_us": "processor time of the server, µs a request",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up; the first is text, the others numbers."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, rule)
    return "\n".join("| " + " | ".join(_padded(line, widths)) + " |" for line in lines)


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(line, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]


def samples_of(native: Mapping[str, Any]) -> dict[str, dict[str, list[Sample]]]:
    """Return the samples of the results file's native part."""
    return {
        name: {
            cell: [Sample(**sample) for sample in several]
            for cell, several in candidate["cells"].items()
        }
        for name, candidate in native.items()
    }


def figure_table(native: Mapping[str, Any], stock: str, figure: Figure) -> str:
    """Return one figure of every cell: the stock's own, and everybody's ratio to it."""
    samples = samples_of(native)
    others = [name for name in samples if name != stock and has(samples[name], figure)]
    by_name = {name: ratios(samples, name, stock, figure) for name in others}
    rows = [
        [cell, number(median(samples[stock][cell], figure))]
        + [f"{by_name[name][cell]:.2f}" for name in others]
        for cell in samples[stock]
    ]
    mean = ["geometric mean", ""] + [
        f"{geometric_mean(by_name[name].values()):.2f}" for name in others
    ]
    return table([UNITS[figure], stock, *others], [*rows, mean])


def has(cells: Mapping[str, Sequence[Sample]], figure: Figure) -> bool:
    """Tell whether a candidate has a figure at all: librbd alone has no server's processor time."""
    return all(getattr(sample, figure) for several in cells.values() for sample in several)


def process_table(native: Mapping[str, Any]) -> str:
    """Return memory and threads of every server, before the first request and at the end."""
    rows = []
    for name, candidate in native.items():
        if candidate["idle"] is None:
            continue
        last = [several[-1] for several in candidate["cells"].values()]
        rows.append(
            [
                name,
                f"{candidate['idle']['rss_kib'] / 1024:.0f}",
                f"{max(sample['rss_kib'] for sample in last) / 1024:.0f}",
                str(candidate["idle"]["threads"]),
                str(max(sample["threads"] for sample in last)),
            ]
        )
    head = ["process", "idle, MiB", "under load, MiB", "idle, threads", "under load, threads"]
    return table(head, rows)


def number(value: float) -> str:
    """Return a number with three digits that matter, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
