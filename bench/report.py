"""Write the results where people read them: the figures of docs/performance.md, and the picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from bench.build import ROOT
from bench.plot import plot
from bench.table import all_tables

PAGE: Final = ROOT / "docs" / "performance.md"
PICTURE: Final = ROOT / "docs" / "performance.svg"
BEGIN: Final = "<!-- figures: written by make bench -->"
END: Final = "<!-- end of the figures -->"


def between_marks(page: str, text: str) -> str:
    """Return the page with the text in the place of what stands between the two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no place for the figures: {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def figures(results: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return what stands between the marks."""
    machine = "; ".join(f"{name} {value}" for name, value in results["machine"].items())
    rounds = (
        f"{results['rounds']} rounds of {results['seconds']:g} s a cell,"
        f" {results['kernel_rounds']} rounds through the kernel."
    )
    return f"Measured on: {machine}. {rounds}\n\n{all_tables(results, names)}"


def write(results: Mapping[str, Any], names: Iterable[str]) -> None:
    """Renew the page and the picture."""
    page = between_marks(PAGE.read_text(encoding="utf-8"), figures(results, names))
    PAGE.write_text(page, encoding="utf-8")
    plot(results, PICTURE)
