"""`make fuzz`: coverage-guided, by atheris, from the corpus on.

    python -m tests.fuzz TARGET RUNS

What was found new stays below .build/fuzz, and the next run begins with it. An input that the
server does wrong with ends the run, and is written there: put it into tests/fuzz/corpus.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rbdnbd", "tests.fuzz.targets"]):
    from tests.fuzz.targets import TARGETS

HERE = Path(__file__).resolve().parent
FOUND = HERE.parents[1] / ".build" / "fuzz"
SEEDS = HERE / "corpus"


def main(name: str, runs: str) -> None:
    """Fuzz one target with so many inputs; exits with another status than 0 if one fails."""
    logging.disable()
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    options = (
        f"-runs={runs}",
        "-max_len=512",
        f"-dict={HERE / 'words'}",
        f"-artifact_prefix={found.parent / f'{name}-failed-'}",
        "-print_final_stats=1",
    )
    atheris.Setup([sys.argv[0], *options, str(found), str(SEEDS / name)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
