"""Write the results where people read them: the figures of docs/performance.md, and the picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bench.build import ROOT
from bench.plot import plot
from bench.results import Results, provenance
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


def write(results: Results, names: Iterable[str]) -> None:
    """Renew the page and the picture."""
    figures = results.figures()
    text = f"{provenance(results.runs())}\n\n{all_tables(figures, names)}"
    PAGE.write_text(between_marks(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    plot(figures, PICTURE)
