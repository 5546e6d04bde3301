"""The picture of the results: how many times the stock's rate everybody's is, an SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.figures import ratios
from bench.samples import samples_of
from bench.targets import STOCK, kernel_ratio

COLOURS = ("#0072b2", "#e69f00", "#999999", "#cc79a7", "#56b4e9", "#d55e00")
BAR = 0.8


def bars(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return every candidate's ratios to the stock, cell by cell, native ones first."""
    found: dict[str, dict[str, float]] = {}
    samples = samples_of(results.get("native", {}))
    for name in samples:
        if name != STOCK:
            found[name] = ratios(samples, name, STOCK, "iops")
    rates = results.get("kernel", {})
    for name in rates:
        if name != STOCK:
            steps = {f"kernel: {step}": kernel_ratio(rates, name, step) for step in rates[STOCK]}
            found.setdefault(name, {}).update(steps)
    return found


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the same results give the same bytes."""
    import matplotlib  # here, because nothing else needs it

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "rbdnbd", "svg.fonttype": "none"})
    from matplotlib import pyplot

    found = bars(results)
    cells = list(dict.fromkeys(cell for by_cell in found.values() for cell in by_cell))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.45 * len(cells)), layout="constrained")
    height = BAR / len(found)
    for number, (name, by_cell) in enumerate(found.items()):
        places = [cells.index(cell) + (number + 0.5) * height - BAR / 2 for cell in by_cell]
        colour = COLOURS[number % len(COLOURS)]
        axes.barh(places, list(by_cell.values()), height, label=name, color=colour)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cells)), cells)
    axes.invert_yaxis()
    axes.set_xlabel(f"rate, {STOCK} = 1; more is better")
    axes.margins(y=0.01)
    figure.legend(loc="outside upper center", ncols=len(found), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
