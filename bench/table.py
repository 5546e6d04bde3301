"""The tables that a person reads, in a terminal and, the same, in docs/performance.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.figures import Figure, Sample, geometric_mean, median, ratios
from bench.samples import samples_of
from bench.targets import AGAIN, STOCK, Target, doubt, kernel_ratio, targets

UNITS: Mapping[Figure, str] = {
    "iops": "requests a second",
    "p50_us": "median latency, µs",
    "p99_us": "99th percentile of the latency, µs",
    "cpu_us": "processor time of the server, µs a request",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a Markdown table whose columns line up; the first `words` are text, then numbers."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = [
        "-" * (width - 1) + ("-" if column < words else ":") for column, width in enumerate(widths)
    ]
    lines.insert(1, rule)
    return "\n".join("| " + " | ".join(_padded(line, widths, words)) + " |" for line in lines)


def _padded(line: Sequence[str], widths: Sequence[int], words: int) -> list[str]:
    return [
        cell.ljust(width) if column < words else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def figure_table(native: Mapping[str, Any], figure: Figure, stock: str = STOCK) -> str:
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


def kernel_table(rates: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Return every step through the kernel: the stock's rate, and everybody's ratio to it."""
    others = [name for name in rates if name != STOCK]
    rows = [
        [step, number(statistics.median(several))]
        + [f"{kernel_ratio(rates, name, step):.2f}" for name in others]
        for step, several in rates[STOCK].items()
    ]
    return table(["through the kernel: requests, MiB or times a second", STOCK, *others], rows)


def once_table(results: Mapping[str, Any]) -> str:
    """Return the wall times of commands, in milliseconds, by program."""
    times: dict[str, dict[str, float]] = {}
    for name, steps in results.get("map", {}).items():
        for step, seconds in steps.items():
            times.setdefault(step, {})[name] = seconds
    if "list" in results:
        times["list-mapped, 50 mappings"] = results["list"]
    names = list(next(iter(times.values())))
    rows = [[step, *(f"{by[name] * 1000:.0f}" for name in names)] for step, by in times.items()]
    return table(["wall time, ms", *names], rows)


def steady_table(results: Mapping[str, Any]) -> str:
    """Return what a million requests, and a large image, do to the price of one."""
    rows = []
    for name, parts in results.get("million", {}).items():
        first, last = parts[0], parts[-1]
        large = results.get("sizes", {}).get(name)
        rows.append(
            [name]
            + [f"{last[figure] / first[figure]:.2f}" for figure in ("iops", "cpu_us")]
            + [f"{(last['rss_kib'] - first['rss_kib']) / 1024:+.1f}"]
            + ([f"{large['iops']:.2f}", f"{large['cpu_us']:.2f}"] if large else ["", ""])
        )
    tenths, sizes = "last tenth of a million to the first", "10 TiB to 1 GiB"
    head = ["", f"{tenths}: requests a second", "processor time", "memory, MiB"]
    return table([*head, f"{sizes}: requests a second", "processor time"], rows)


def target_table(results: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return what is wanted of each of ours, and whether it is reached."""
    rows = [
        [name, target.what, f"{target.measured:.2f}", _sign(target) + f" {target.wanted:.2f}"]
        + ["yes" if target.met else "no"]
        for name in names
        for target in targets(results, name)
    ]
    return table(["", "target", "measured", "wanted", "met"], rows, words=2)


def _sign(target: Target) -> str:
    return "≥" if target.at_least else "≤"


def all_tables(results: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return all tables for which there are results; `names` are ours."""
    made: list[str] = []
    if native := results.get("native"):
        made += [figure_table(native, figure) for figure in UNITS]
        made.append(process_table(native))
    if rates := results.get("kernel"):
        made.append(kernel_table(rates))
    if "map" in results or "list" in results:
        made.append(once_table(results))
    if "million" in results:
        made.append(steady_table(results))
    if AGAIN in results.get("native", {}):
        worst, mean = doubt(results["native"])
        made.append(
            f"In this run {STOCK} is off from itself by up to {worst:.0%} in a native cell, and by"
            f" {mean:.0%} in the mean: no ratio here says anything finer."
        )
    made.append(target_table(results, names))
    return "\n\n".join(made)


def number(value: float) -> str:
    """Return a number with three digits that matter, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
