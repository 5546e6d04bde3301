"""Four tiers by folder, and where each of them runs.

RBDNBD_TIERS (unit,protocol,cluster,kernel,debian13) names the tiers that must run: these are run,
no others, and one without a test is an error. Without it, what the command line selects is run.
The kernel tier runs in a VM where this host has no nbd; "debian13" is the selected tests of the
unit, protocol and cluster tiers once more, in a Debian 13 container. Either way all tests are
counted here, and in no tier may a test be skipped: what it needs and does not find fails it.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from testbed import places
from testbed.elsewhere import Place, PlaceLost, report_lost, run_elsewhere, say
from tests.support.torture import Torture, torture

TESTS = Path(__file__).resolve().parent
TIERS = {
    "unit": "bytes in, bytes out: needs nothing",
    "protocol": "real NBD clients against our server, on an image in memory",
    "cluster": "real librbd on a real Ceph cluster",
    "kernel": "/dev/nbdN, on a kernel that has nbd",
}
DEBIAN13 = "debian13"
DEBIAN13_TIERS = ("unit", "protocol", "cluster")
REQUIRED = "RBDNBD_TIERS"
VMS = 2
"""An emulated processor keeps one of the host's busy, and hosts have two."""


def required_tiers() -> frozenset[str] | None:
    """Return the tiers that RBDNBD_TIERS names, or None when it leaves the choice open."""
    if (named := os.environ.get(REQUIRED)) is None:
        return None
    tiers = frozenset(tier.strip() for tier in named.split(",") if tier.strip())
    if unknown := tiers - {*TIERS, DEBIAN13}:
        known = ", ".join((*TIERS, DEBIAN13))
        raise pytest.UsageError(f"{REQUIRED} names {', '.join(unknown)}; there are {known}")
    return tiers


def collected_tiers(required: frozenset[str] | None) -> frozenset[str]:
    """Return the tiers whose files are collected here."""
    if required is None:
        return frozenset(TIERS)
    return (required - {DEBIAN13}) | (set(DEBIAN13_TIERS) if DEBIAN13 in required else set())


def tier_of(path: Path) -> str | None:
    """Return the tier that a file or folder belongs to by where it lies."""
    parts = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else ()
    return parts[0] if parts and parts[0] in TIERS else None


def pytest_configure(config: pytest.Config) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background job has them ignored
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for tier, meaning in TIERS.items():
        config.addinivalue_line("markers", f"{tier}: {meaning}")
    config.addinivalue_line("markers", "torture: breaks something under load; `make torture`")
    required_tiers()
    if not config.getoption("elsewhere_reports", None):
        config.pluginmanager.register(Places(), "places")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    tier = tier_of(collection_path)
    return True if tier is not None and tier not in collected_tiers(required_tiers()) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if tier := tier_of(item.path):
            item.add_marker(tier)
        if places.TORTURE in os.environ and item.get_closest_marker("torture"):
            item.add_marker(pytest.mark.timeout(places.WHOLE_SECONDS), append=False)
    found = {tier_of(item.path) for item in items}
    required = required_tiers() or frozenset()
    if config.getoption("elsewhere_reports", None):
        return
    wanting = required - {DEBIAN13} - found
    if DEBIAN13 in required:
        wanting |= set(DEBIAN13_TIERS) - found
    if wanting:
        raise pytest.UsageError(f"no test was collected of: {', '.join(sorted(wanting))}")


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"no test may be skipped here; this one wanted to: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.fixture(name="torture")
def _torture() -> Torture:
    """How often a test of faults tries, and at which random moments."""
    return torture()


class Places:
    """Runs the tests that belong elsewhere after those that run here."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        if session.config.option.collectonly:
            return (yield)
        here, elsewhere = plan(session.items, required_tiers())
        session.items[:] = here
        session.testscollected = len(here) + sum(len(ids) for _, ids in elsewhere)
        done = yield
        if elsewhere:
            run_places(session, elsewhere)
        return done


MakePlace = type[places.KernelVM] | type[places.Debian13]


def plan(
    items: Sequence[pytest.Item], required: frozenset[str] | None
) -> tuple[list[pytest.Item], list[tuple[MakePlace, list[str]]]]:
    """Divide the selected tests into those that run here and those of each place elsewhere."""
    native = not any(tier_of(item.path) == "kernel" for item in items) or places.host_has_nbd()
    debian13 = required is not None and DEBIAN13 in required
    here, in_vm, in_debian13 = [], [], []
    for item in items:
        tier = tier_of(item.path)
        if debian13 and tier in DEBIAN13_TIERS and not item.get_closest_marker("on_host"):
            in_debian13.append(item.nodeid)
        if tier == "kernel" and not native:
            in_vm.append(item.nodeid)
        elif tier is None or required is None or tier in required:
            here.append(item)
    work: list[tuple[MakePlace, list[str]]] = [
        *((places.KernelVM, in_vm[number::VMS]) for number in range(VMS)),
        (places.Debian13, in_debian13),
    ]
    return here, [(make, node_ids) for make, node_ids in work if node_ids]


def run_places(session: pytest.Session, work: Sequence[tuple[MakePlace, Sequence[str]]]) -> None:
    """Run all places side by side, each with a cluster of its own; in turn, if one was given.

    For some tests pause their cluster. Directories with logs are kept when something failed.
    """
    parent = places.ROOT / ".build" / "places"
    parent.mkdir(parents=True, exist_ok=True)
    failed = session.testsfailed
    with ExitStack() as stack:
        ready: list[tuple[Place, Sequence[str]]] = []
        for make, node_ids in work:
            try:
                conf = stack.enter_context(places.ceph_conf(lambda line: say(session, line)))
            except PlaceLost as error:
                report_lost(session, make.name, node_ids, str(error))
            else:
                directory = Path(tempfile.mkdtemp(prefix=f"{make.name}-", dir=parent))
                ready.append((make(directory, conf), node_ids))
        for batch in [[each] for each in ready] if places.CEPH_CONF in os.environ else [ready]:
            if not session.shouldfail:
                run_elsewhere(session, batch)
    for place, _ in ready:
        if session.testsfailed == failed:
            shutil.rmtree(place.directory)
        else:
            say(session, f"the logs of {place.name} are in {place.directory}")
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
