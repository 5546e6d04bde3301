"""Signals and endings, each in a process of its own, because signals belong to a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import rbdnbd
from tests.support.waiting import wait_until

PRELUDE = """
import logging, os, signal, sys, threading, time
from rbdnbd import life as room
from rbdnbd.life import Interrupted, Life

logging.basicConfig(level=logging.INFO, format="%(message)s")

def say(what):
    print(what, flush=True)

"""
ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@contextmanager
def running(script: str) -> Iterator[subprocess.Popen[str]]:
    """Run a script that says "here" when it has come where the test wants it."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", PRELUDE + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(rbdnbd.__file__).parents[1])},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Close stdin, and return the exit status and what was said to stdout and stderr since."""
    assert process.stdin and process.stdout and process.stderr
    process.stdin.close()
    out, err = process.stdout.read(), process.stderr.read()
    return process.wait(20), out, err


def masks(process: subprocess.Popen[str]) -> list[tuple[int, int]]:
    """Return which of our signals are pending and which blocked, for each thread; see proc(5)."""
    ours = sum(1 << (number - 1) for number in ENDINGS)
    found = []
    for file in Path(f"/proc/{process.pid}/task").glob("*/status"):
        fields = dict(
            re.findall(r"^(ShdPnd|SigBlk):\s*([0-9a-f]+)$", file.read_text(), re.MULTILINE)
        )
        found.append((int(fields["ShdPnd"], 16) & ours, int(fields["SigBlk"], 16) & ours))
    return found


def send(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal and return when it was taken and the process listens for the next, or is gone.

    A thread that waits for signals has them out of its blocked mask for that long.
    """
    process.send_signal(number)
    wait_until(lambda: process.poll() is not None or (0, 0) in masks(process), 20, "it was taken")


WAITING = "life = Life(); say('here'); say(life.wait())"


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_a_signal_ends_the_waiting(number):
    with running(WAITING) as process:
        process.send_signal(number)
        assert end(process)[:2] == (0, f"{int(number)}\n")


def test_the_signal_is_named_in_the_log():
    with running(WAITING) as process:
        process.send_signal(signal.SIGTERM)
        assert end(process)[2] == "SIGTERM: draining\n"


def test_no_handler_runs_and_no_thread_but_one_takes_the_signals():
    script = """
def hold(): time.sleep(60)
life = Life()
threading.Thread(target=hold, daemon=True).start()
say('here')
life.wait()
"""
    with running(script) as process:
        wait_until(
            lambda: sorted(bool(blocked) for _, blocked in masks(process)) == [False, True, True],
            10,
            "of three threads one waits for the signals, and the others have them blocked",
        )
        process.send_signal(signal.SIGTERM)
        assert end(process)[0] == 0


def test_an_orderly_end_is_an_empty_reason():
    with running("life = Life(); say('here'); life.ended(''); say(repr(life.wait()))") as process:
        assert end(process)[:2] == (0, "''\n")


def test_an_end_from_another_thread_wakes_the_main_thread_with_its_reason():
    script = """
life = Life()
def later():
    sys.stdin.read()
    life.ended("the peer hung up")
threading.Thread(target=later).start()
say("here")
say(life.wait())
"""
    with running(script) as process:
        assert end(process)[:2] == (0, "the peer hung up\n")


def test_the_first_of_two_endings_counts():
    script = """
life = Life()
life.ended("first")
life.ended("second")
say("here")
say(life.wait())
"""
    with running(script) as process:
        assert end(process)[1] == "first\n"


def test_an_action_returns_its_value_and_leaves_no_ending_behind():
    script = """
life = Life()
values = [life.during(lambda: 42), life.during(lambda: "x")]
say("here")
say(values)
say(life.wait())
"""
    with running(script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[42, 'x']\n"
        process.send_signal(signal.SIGTERM)
        assert end(process)[:2] == (0, f"{int(signal.SIGTERM)}\n")


def test_an_action_that_fails_raises_what_it_raised():
    script = """
life = Life()
def fail(): raise FileNotFoundError("gone")
say("here")
try:
    life.during(fail)
except FileNotFoundError as error:
    say(error)
"""
    with running(script) as process:
        assert end(process)[:2] == (0, "gone\n")


def test_a_signal_during_an_action_that_then_ends_is_an_interruption_and_its_work_is_done():
    script = """
life = Life()
done = []
def slow():
    say("here")
    sys.stdin.read()
    done.append("made")
try:
    life.during(slow)
except Interrupted as error:
    say(f"{error}, {done}, {error.number}")
"""
    with running(script) as process:
        send(process, signal.SIGTERM)
        assert end(process)[:2] == (0, "ended by SIGTERM, ['made'], 15\n")


def test_a_signal_during_an_action_that_then_fails_is_an_interruption():
    script = """
life = Life()
def slow():
    say("here")
    sys.stdin.read()
    raise OSError("too late")
try:
    life.during(slow)
except Interrupted as error:
    say(error)
"""
    with running(script) as process:
        send(process, signal.SIGINT)
        assert end(process)[:2] == (0, "ended by SIGINT\n")


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_a_signal_during_an_action_that_hangs_ends_the_process(number):
    script = """
room._GRACE_SECONDS = 0.1
def hang():
    say("here")
    threading.Event().wait()
Life().during(hang)
"""
    with running(script) as process:
        process.send_signal(number)
        assert end(process)[0] == 128 + number


def test_a_signal_before_the_waiting_is_not_lost():
    script = """
life = Life()
os.kill(os.getpid(), signal.SIGTERM)
say("here")
sys.stdin.read()
say(life.wait())
"""
    with running(script) as process:
        assert end(process)[:2] == (0, f"{int(signal.SIGTERM)}\n")


def test_a_second_signal_ends_a_process_that_does_not_come_to_its_end():
    script = """
life = Life()
say("here")
life.wait()
say("draining")
threading.Event().wait()
"""
    with running(script) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "draining\n"
        status = repeat_until_gone(process, signal.SIGINT)
        assert status == 128 + signal.SIGINT


def repeat_until_gone(process: subprocess.Popen[str], number: signal.Signals) -> int:
    """Send a signal as an impatient person does, once and again; return the exit status."""
    deadline = time.monotonic() + 20
    while True:
        process.send_signal(number)
        try:
            return process.wait(0.5)
        except subprocess.TimeoutExpired:
            assert time.monotonic() < deadline, "still there"


def test_a_signal_that_is_sent_twice_at_once_is_one():
    script = """
life = Life()
say("here")
say(life.wait())
say("draining")
sys.stdin.read()
say("closed")
"""
    with running(script) as process:
        assert process.stdout is not None
        send(process, signal.SIGTERM)
        send(process, signal.SIGTERM)
        assert process.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        assert end(process)[:2] == (0, "draining\nclosed\n")


def test_a_signal_that_nohup_ignores_does_not_end_the_process():
    script = f"signal.signal(signal.SIGHUP, signal.SIG_IGN); {WAITING}"
    with running(script) as process:
        send(process, signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert end(process)[1] == f"{int(signal.SIGTERM)}\n"
