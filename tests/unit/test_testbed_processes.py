"""Slots and the test bed's child processes: what is taken, what is told, what is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.processes import Unavailable, end, narrate, sigterm_interrupts
from testbed.slots import SLOTS, slot


def test_the_lowest_free_slot_is_taken(tmp_path: Path) -> None:
    with slot("thing", tmp_path) as first:
        with slot("thing", tmp_path) as second, slot("other", tmp_path) as other:
            assert (first, second, other) == (1, 2, 1)
        with slot("thing", tmp_path) as second:
            assert second == 2


def test_a_slot_is_free_again_when_its_owner_was_killed(tmp_path: Path) -> None:
    owner = f"""
import os, pathlib, signal
from testbed.slots import slot
with slot("thing", pathlib.Path({str(tmp_path)!r})) as number:
    assert number == 1
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", owner]).returncode == -signal.SIGKILL
    with slot("thing", tmp_path) as number:
        assert number == 1


def test_there_is_an_end_to_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.slots.SLOTS", SLOTS[:1])
    with (
        slot("thing", tmp_path),
        pytest.raises(Unavailable, match="all 1 places for a thing are taken"),
        slot("thing", tmp_path),
    ):
        pass


def test_lines_are_told_as_they_come_and_a_failure_ends_with_them() -> None:
    told: list[str] = []
    with pytest.raises(Unavailable, match=r"(?s)^failed: sh -c .*\none\ntwo$"):
        narrate(["sh", "-c", "echo one; echo two >&2; exit 3"], told.append)
    assert told == ["one", "two"]


def test_only_the_last_lines_are_kept_for_a_failure() -> None:
    with pytest.raises(Unavailable) as raised:
        narrate(["sh", "-c", "seq 1000; exit 1"], lambda line: None)
    assert str(raised.value).splitlines()[1:] == [str(number) for number in range(971, 1001)]


def test_a_process_that_ignores_a_signal_is_killed() -> None:
    with subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 60; done"],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        end(process.pid, signal.SIGTERM, 0.1)
        assert not Path("/proc", str(process.pid)).exists()
        process.returncode = -signal.SIGKILL  # `end` has reaped it


def test_sigterm_interrupts_for_a_time_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
