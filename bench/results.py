"""The results file: what was measured of each part, and in which run.

Each part is kept as soon as it is measured, in the place of what an earlier run has found of it, so
that a run that breaks off, or measures some parts only, loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

Run = Mapping[str, Any]
"""`began` says when, `machine` where, and the rest how: see `run_text`."""

_HOW: Final = ("rounds", "seconds", "kernel_rounds")


class Results:
    """The parts that were measured, each as {"run": …, "figures": …}, in one file of JSON."""

    def __init__(self, path: Path) -> None:
        """Read the file if it is there. Raises ValueError if it holds something else."""
        self._path = path
        self._parts: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._parts = json.loads(path.read_text())
            if not all(part.keys() == {"run", "figures"} for part in self._parts.values()):
                raise ValueError(f"{path} holds no results of this version: remove it")

    def keep(self, part: str, run: Run, figures: Any) -> None:
        """Put what was measured in the place of an earlier run's, and write the file anew."""
        self._parts[part] = {"run": dict(run), "figures": figures}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self._parts, indent=1) + "\n")
        fresh.rename(self._path)

    def figures(self) -> dict[str, Any]:
        """Return what was measured, by part."""
        return {part: kept["figures"] for part, kept in self._parts.items()}

    def runs(self) -> dict[str, Run]:
        """Return the run of each part."""
        return {part: kept["run"] for part, kept in self._parts.items()}

    def complete(self, parts: Sequence[str]) -> bool:
        """Tell whether all of these parts are there, and of one machine."""
        runs = self.runs()
        machines = [runs[part]["machine"] for part in parts if part in runs]
        return len(machines) == len(parts) and all(each == machines[0] for each in machines)


def provenance(runs: Mapping[str, Run]) -> str:
    """Return where and when the parts were measured; if in different runs, it says so."""
    first = next(iter(runs.values()))
    machine = "; ".join(f"{name} {value}" for name, value in first["machine"].items())
    together: dict[str, list[str]] = {}
    for part, run in runs.items():
        together.setdefault(run_text(run), []).append(part)
    if len(together) == 1:
        return f"Measured on: {machine}. All in one run: {next(iter(together))}."
    texts = [f"{', '.join(parts)}: {text}" for text, parts in together.items()]
    return f"Measured on: {machine}. The parts are of different runs. {'. '.join(texts)}."


def run_text(run: Run) -> str:
    """Return when a run began and how it measured."""
    rounds, seconds, kernel_rounds = (run[key] for key in _HOW)
    how = f"{rounds} rounds of {seconds:g} s a cell, {kernel_rounds} rounds through the kernel"
    return f"{run['began']}, {how}"
