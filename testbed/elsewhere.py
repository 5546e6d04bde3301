"""Count tests by name in one pytest run, wherever they ran.

Inside a place (a VM, a container) pytest runs with `-p testbed.elsewhere` and writes what happens
to a file, a line of JSON each: a test starts, reports, ends; a file could not be collected; the
run ended. Outside, `run_elsewhere` has a place run the tests that were selected there, follows
the file and hands every report to the outer pytest's own hooks, the place's name in front of the
node id: failures show their tracebacks, -x stops, the exit status and the closing line are right.
Silence is no success: whatever keeps a selected test from reporting becomes a failure that says so.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

POLL_SECONDS = 0.2
# A test that has reported this phase has reported all.
LAST_PHASE = "teardown"


# Tells the person who waits one line.
Say = Callable[[str], None]


class PlaceLost(Exception):
    """Say in one sentence why a place could not run its tests to the end."""


class Place(Protocol):
    """Somewhere else to run pytest."""

    @property
    def name(self) -> str:
        """What stands in front of the node ids."""

    @property
    def directory(self) -> Path:
        """An empty directory under the same name here and there, writable on both sides."""

    @property
    def patience(self) -> float:
        """How many seconds without a line of report mean that a test hangs."""

    def run(self, arguments: Sequence[str], say: Say, stop: threading.Event) -> Ended:
        """Run pytest with `arguments` there; raise PlaceLost when it got no exit status."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How pytest ended in a place: status, what it printed, and complaints besides its tests."""

    status: int
    printed: str
    complaints: Sequence[str] = ()


# ---- inside


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("elsewhere")
    group.addoption("--elsewhere-reports", type=Path, help="write every report to this file")
    group.addoption("--elsewhere-select", type=Path, help="run the node ids in this JSON file only")


def pytest_configure(config: pytest.Config) -> None:
    if reports := config.getoption("elsewhere_reports"):
        config.pluginmanager.register(Recorder(config, reports), "elsewhere-recorder")


class Recorder:
    """Writes what happens in this pytest run, at once, for the one outside."""

    def __init__(self, config: pytest.Config, reports: Path) -> None:
        self.config = config
        self.file = reports.open("a")

    def _write(self, **record: object) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def _serial(self, report: pytest.TestReport | pytest.CollectReport) -> object:
        return self.config.hook.pytest_report_to_serializable(config=self.config, report=report)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if selection := self.config.getoption("elsewhere_select"):
            wanted = frozenset(json.loads(selection.read_text()))
            items[:] = [item for item in items if item.nodeid in wanted]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._write(collect=self._serial(report))

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._write(start=nodeid, location=location)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._write(report=self._serial(report))

    def pytest_runtest_logfinish(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._write(finish=nodeid, location=location)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._write(end=int(exitstatus))


# ---- outside


def run_elsewhere(session: pytest.Session, work: Iterable[tuple[Place, Sequence[str]]]) -> None:
    """Run tests, by their node ids, in places side by side; report them to `session` as they come.

    Returns when all have ended, or the session should end, and every place is left.
    """
    with ExitStack() as stack:
        runs = [stack.enter_context(closing(_run(session, *each))) for each in work]
        while runs and not session.shouldfail:
            runs = [each for each in runs if next(each, True) is None]
            time.sleep(POLL_SECONDS)


def _run(session: pytest.Session, place: Place, node_ids: Sequence[str]) -> Generator[None]:
    """Run tests in a place, and go on with reporting whenever it is asked to."""
    reports, selection = place.directory / "reports.jsonl", place.directory / "selection.json"
    reports.write_bytes(b"")
    selection.write_text(json.dumps(list(node_ids)))
    replay = Replay(session, place.name, node_ids)
    arguments = [
        *("-p", "testbed.elsewhere", "-p", "no:cacheprovider", "-q"),
        f"--elsewhere-reports={reports}",
        f"--elsewhere-select={selection}",
        f"--maxfail={_failures_left(session)}",
        *dict.fromkeys(node_id.partition("::")[0] for node_id in node_ids),
    ]
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix=place.name) as pool, reports.open() as lines:
        future = pool.submit(place.run, arguments, said.put, stop)
        try:
            yield from _follow(future, replay, _records(lines), said, place.patience)
        finally:
            stop.set()
    replay.close(future)


def say(session: pytest.Session, line: str) -> None:
    """Print a line between the tests' own."""
    if terminal := session.config.pluginmanager.get_plugin("terminalreporter"):
        terminal.ensure_newline()
        terminal.write_line(line)


def report_lost(session: pytest.Session, place: str, node_ids: Sequence[str], why: str) -> None:
    """Report that nothing of `node_ids` could run in `place`, as one failure."""
    Replay(session, place, node_ids).lost(why)


def _failures_left(session: pytest.Session) -> int:
    allowed: int = session.config.getoption("maxfail")
    return max(allowed - session.testsfailed, 1) if allowed else 0


def _follow(
    future: Future[Ended],
    replay: Replay,
    records: Iterator[list[dict[str, Any]]],
    said: queue.SimpleQueue[str],
    patience: float,
) -> Iterator[None]:
    """Replay what has come until the place has ended, or has been silent for too long."""
    heard = time.monotonic()
    over = False
    while not over:
        yield
        over = future.done()
        while not said.empty():
            say(replay.session, f"{replay.place}: {said.get()}")
            heard = time.monotonic()
        for record in next(records):
            replay.one(record)
            heard = time.monotonic()
        if time.monotonic() - heard > patience:
            replay.silence = f"nothing was heard for {patience:.0f} s"
            return


def _records(lines: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield again and again the records that have come since the last time; never ends."""
    begun = ""
    while True:
        *whole, begun = (begun + lines.read()).split("\n")
        yield [json.loads(line) for line in whole]


class Replay:
    """What a place reported, given to the outer pytest's hooks."""

    def __init__(self, session: pytest.Session, place: str, node_ids: Sequence[str]) -> None:
        self.session, self.place = session, place
        self.hook, self.config = session.config.hook, session.config
        self.missing = dict.fromkeys(node_ids)
        self.running: str | None = None
        self.failed = 0
        self.ended = False
        self.silence: str | None = None

    def one(self, record: dict[str, Any]) -> None:
        """Replay one record."""
        if "start" in record:
            self.running = record["start"]
            self.hook.pytest_runtest_logstart(**self._named(record["start"], record["location"]))
        elif "finish" in record:
            self.running = None
            self.hook.pytest_runtest_logfinish(**self._named(record["finish"], record["location"]))
        elif "end" in record:
            self.ended = True
        else:
            self._report(record.get("report") or record["collect"])

    def _report(self, data: dict[str, Any]) -> None:
        report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
        self.failed += report.failed
        if isinstance(report, pytest.CollectReport):
            report.nodeid = f"{self.place}:{report.nodeid}"
            self.hook.pytest_collectreport(report=report)
            return
        if report.when == LAST_PHASE:
            self.missing.pop(report.nodeid, None)
            self.running = None
        named = self._named(report.nodeid, report.location)
        report.nodeid, report.location = named["nodeid"], named["location"]
        self.hook.pytest_runtest_logreport(report=report)

    def _named(self, nodeid: str, location: Sequence[Any]) -> dict[str, Any]:
        path, line, domain = location
        return {
            "nodeid": f"{self.place}:{nodeid}",
            "location": (f"{self.place}:{path}", line, f"{domain} ({self.place})"),
        }

    def close(self, future: Future[Ended]) -> None:
        """Report as failures whatever else went wrong in a place that has ended."""
        error = future.exception()
        if error and not isinstance(error, PlaceLost):
            raise error
        if error or self.silence or not self.ended:
            self.lost(self._reason(future))
            return
        ended = future.result()
        if self.missing and not self.session.shouldfail:
            self._fail_place(f"{self._not_run()}\n{ended.printed}")
        elif ended.status and not self.failed:
            why = f"pytest exited with status {ended.status} although no test failed"
            self._fail_place(f"{why}\n{ended.printed}")
        for complaint in ended.complaints:
            self._fail_place(complaint)

    def _reason(self, future: Future[Ended]) -> str:
        if (error := future.exception()) is not None:
            reason = str(error)
        else:
            ended = future.result()
            reason = f"pytest ended with status {ended.status} before its time\n{ended.printed}"
        return f"{self.silence}; {reason}" if self.silence else reason

    def lost(self, reason: str) -> None:
        """Report the test that was running, and as one failure those that did not run."""
        sentence = reason.partition("\n")[0]
        if self.running is not None:
            self.missing.pop(self.running, None)
            self._fail_test(self.running, f"this test was running when {reason}")
            if self.missing:
                self._fail_place(f"{self._not_run()}: {sentence}")
        elif self.missing:
            self._fail_place(f"{self._not_run()}: {reason}")
        else:
            self._fail_place(f"every test had run when {reason}")

    def _not_run(self) -> str:
        return f"{len(self.missing)} selected test{'s' * (len(self.missing) != 1)} did not run"

    def _fail_place(self, sentence: str) -> None:
        """Report a failure of the place itself, with the tests that did not run, if any."""
        names = "".join(f"\n  {node_id}" for node_id in self.missing)
        tests = f"\nnot run:{names}" if names else ""
        self._fail(self.place, (self.place, None, self.place), f"{sentence}{tests}")

    def _fail_test(self, node_id: str, sentence: str) -> None:
        """Report a failure of a test that was cut off."""
        path, _, domain = node_id.partition("::")
        named = self._named(node_id, (path, None, domain))
        self._fail(named["nodeid"], named["location"], sentence)

    def _fail(self, node_id: str, location: tuple[str, None, str], sentence: str) -> None:
        report = pytest.TestReport(
            nodeid=node_id,
            location=location,
            keywords={},
            outcome="failed",
            longrepr=sentence,
            when="call",
        )
        self.hook.pytest_runtest_logreport(report=report)
        self.hook.pytest_runtest_logfinish(nodeid=node_id, location=location)
