"""`make torture`: which test of faults comes next, with what seed, and what the status says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed import torture
from testbed.torture import Round, Row, next_row

Project = Callable[[str], Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Make a project with these tests, which knows the marker."""

    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # to import them takes seconds

    def make(tests: str) -> Path:
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = torture: of faults\n")
        (tmp_path / "test_it.py").write_text(f"import os, pytest\n{tests}")
        return tmp_path

    return make


HOLDS = """
@pytest.mark.torture
@pytest.mark.parametrize("engine", ["threads", "events"])
def test_holds(engine):
    open("seeds", "a").write(os.environ["RBDNBD_TORTURE"] + "\\n")

def test_of_something_else():
    raise AssertionError("this is no test of faults")
"""
BREAKS = """
@pytest.mark.torture
def test_breaks():
    raise AssertionError("a byte is lost")
"""


def ended(status: int = 0, seconds: float = 1.0) -> Round:
    """A round that has been run."""
    return Round(7, status, seconds, Path("log"))


def test_the_row_with_the_fewest_rounds_comes_next_and_of_these_the_quickest() -> None:
    """Seen to fail with the key of `next_row` turned around."""
    slow, quick = Row("slow", 100.0), Row("quick", 10.0)
    assert next_row([slow, quick]) is quick
    quick.rounds.append(ended())
    assert next_row([slow, quick]) is slow
    slow.rounds.append(ended())
    assert next_row([slow, quick]) is quick


def test_only_tests_of_faults_are_rows_each_with_all_its_parameters(project: Project) -> None:
    """Seen to fail without `-m torture`, and with the parameters left in the names."""
    found = torture.rows(project(HOLDS + BREAKS), [])
    assert [row.test for row in found] == ["test_it.py::test_holds", "test_it.py::test_breaks"]


def test_a_row_is_run_in_its_whole_form_with_its_seed(project: Project) -> None:
    """Seen to fail with a seed that is not given on."""
    root = project(HOLDS)
    (row,) = torture.rows(root, [])
    assert torture.run(row, 42, root).status == 0
    assert (root / "seeds").read_text().split() == ["42", "42"]
    assert torture.repeat(row, row.rounds[0]) == (
        "RBDNBD_TORTURE=42 .venv/bin/pytest test_it.py::test_holds"
    )


def test_a_failure_is_shown_with_the_command_that_repeats_it_and_stops_no_other(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to fail with an exit status that is dropped."""
    root = project(BREAKS + HOLDS)
    found = torture.rows(root, [])
    clock = iter([0.0, 0.0, 30.0, 60.0])  # time for two rounds
    torture.torture(found, 60, root, lambda: next(clock))
    assert torture.report(found) == 1
    said = capsys.readouterr().out
    assert "AssertionError: a byte is lost" in said
    seed = found[0].rounds[0].seed
    assert f"again: RBDNBD_TORTURE={seed} .venv/bin/pytest test_it.py::test_breaks\n" in said
    assert [row.outcome() for row in found] == ["FAILED 1 times", "held"]


def test_a_row_for_which_there_was_no_time_is_no_success(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to fail with rows that were not run left out of the status."""
    assert torture.main(["--minutes", "0"], project(HOLDS)) == 2
    assert "no time" in capsys.readouterr().out


def test_when_every_row_holds_the_status_is_0() -> None:
    assert torture.report([Row("a", rounds=[ended()])]) == 0
    assert torture.report([Row("a", rounds=[ended(), ended(1)])]) == 1
