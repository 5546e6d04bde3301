"""Repeat the tests of faults in their whole form, with new random moments, until the time is over.

A row is a test with the marker `torture`, with all its parameters. Each is run by a pytest of its
own, which boots a VM where it has to, with RBDNBD_TORTURE set to a seed that nobody has tried.
Those with the fewest rounds come first, of these the quickest, so that every row has had its turn
before one has its second. No row begins when the time is over; one that has begun ends. A failure
does not stop the others.

    python -m testbed.torture [--minutes MINUTES] [PATH...]

Status 0: every row was run, and none failed. 1: a row failed. 2: for a row there was no time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from testbed.places import ROOT, TORTURE
from testbed.processes import end, sigterm_interrupts

PYTEST = (sys.executable, "-m", "pytest")
LOGS = Path(".build") / "torture"
TOOK = "seconds.json"
SEEDS = 10**6
LAST_LINES = 40
COLLECT_SECONDS = 120
CLEAN_UP_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Round:
    """One run of a row: its seed, how it ended, how many seconds it took, what it printed."""

    seed: int
    status: int
    seconds: float
    log: Path


@dataclass(slots=True)
class Row:
    """A test of faults, and its rounds; `expected` is a round's length in seconds, 0 if unknown."""

    test: str
    expected: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    @property
    def failed(self) -> list[Round]:
        """The rounds that did not end well."""
        return [each for each in self.rounds if each.status]

    def outcome(self) -> str:
        """Say in a word or two what came out."""
        if not self.rounds:
            return "no time"
        return f"FAILED {len(self.failed)} times" if self.failed else "held"


def rows(root: Path, paths: Sequence[str]) -> list[Row]:
    """Return a row for every test of faults below `paths`; SystemExit when there is none."""
    done = subprocess.run(
        [*PYTEST, "--collect-only", "-q", "-m", "torture", *paths],
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COLLECT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"no test of faults was collected:\n{done.stdout}{done.stderr}")
    took = root / LOGS / TOOK
    known: dict[str, float] = json.loads(took.read_text()) if took.exists() else {}
    cases = re.findall(r"^(\S+::[^\s\[]+)", done.stdout, re.MULTILINE)
    return [Row(test, known.get(test, 0.0)) for test in dict.fromkeys(cases)]


def next_row(rows: Iterable[Row]) -> Row:
    """Return the row whose turn it is: the fewest rounds, then the quickest."""
    return min(rows, key=lambda row: (len(row.rounds), row.expected))


def run(row: Row, seed: int, root: Path) -> Round:
    """Run a row once with a seed, in its whole form, and add the round to it."""
    logs = root / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{row.test.rpartition('::')[2]}-{seed}.log"
    begun = time.monotonic()
    with log.open("wb") as printed:
        pytest = subprocess.Popen(
            [*PYTEST, row.test],
            cwd=root,
            env={**os.environ, TORTURE: str(seed)},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is passed on once, and its clean-up waited for
        )
        try:
            status = pytest.wait()  # it has limits of its own
        finally:
            if pytest.poll() is None:
                end(pytest.pid, signal.SIGINT, CLEAN_UP_SECONDS)
                pytest.wait()
    result = Round(seed, status, time.monotonic() - begun, log)
    row.rounds.append(result)
    row.expected = result.seconds
    return result


def repeat(row: Row, each: Round) -> str:
    """Return the command that repeats a round."""
    return f"{TORTURE}={each.seed} .venv/bin/pytest {shlex.quote(row.test)}"


def table(rows: Sequence[Row]) -> str:
    """Return what came out, a line for each row."""
    width = max(len(row.test) for row in rows)
    lines = [f"{'test':{width}}  rounds  minutes  outcome"]
    for row in rows:
        minutes = sum(each.seconds for each in row.rounds) / 60
        lines.append(f"{row.test:{width}}  {len(row.rounds):6}  {minutes:7.1f}  {row.outcome()}")
    return "\n".join(lines)


def torture(
    rows: Sequence[Row], seconds: float, root: Path, clock: Callable[[], float] = time.monotonic
) -> None:
    """Run rows until the time is over, and print a line at the begin and the end of each round."""
    over = clock() + seconds
    while (left := over - clock()) > 0:
        row = next_row(rows)
        seed = random.SystemRandom().randrange(SEEDS)
        print(f"torture: {left / 60:.0f} min left: {row.test}, {TORTURE}={seed}", flush=True)
        result = run(row, seed, root)
        verdict = f"FAILED with status {result.status}" if result.status else "held"
        print(f"torture: {verdict} after {result.seconds:.0f} s", flush=True)
        if result.status:
            lines = result.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            print("\n".join(lines), f"torture: all of it is in {result.log}", sep="\n", flush=True)


def report(rows: Sequence[Row]) -> int:
    """Print what came out and how to repeat what failed; return the exit status that says it."""
    print(table(rows))
    for row in rows:
        for each in row.failed:
            print(f"again: {repeat(row, each)}")
    if any(row.failed for row in rows):
        return 1
    return 0 if all(row.rounds for row in rows) else 2


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Torture for so many minutes; Ctrl-C ends it early, with the table of what was run."""
    parser = argparse.ArgumentParser(prog="torture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("path", nargs="*", help="files or tests; without: all tests of faults")
    wanted = parser.parse_args(arguments)
    all_rows = rows(root, wanted.path)
    print(f"torture: {len(all_rows)} rows, {wanted.minutes:g} minutes", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
    try:
        with sigterm_interrupts():
            torture(all_rows, wanted.minutes * 60, root)
    except KeyboardInterrupt:
        print("torture: ended early", flush=True)
    known = {row.test: round(row.expected, 1) for row in all_rows if row.expected}
    if known:
        (root / LOGS / TOOK).write_text(json.dumps(known, indent=1) + "\n")
    return report(all_rows)


if __name__ == "__main__":
    sys.exit(main())
