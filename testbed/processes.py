"""The test bed's child processes: hear them while they work, be sure that they are gone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

TAIL = 30


class Unavailable(Exception):
    """Say in one sentence why a part of the test bed is not to be had; then come the reasons."""


def silent(line: str) -> None:
    """Tell nobody."""


def narrate(command: Sequence[str], say: Callable[[str], None]) -> None:
    """Run a command to its end and hand on each line of its output as it comes.

    Raises Unavailable with the last lines when it fails.
    """
    tail: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail = [*tail[1 - TAIL :], line.rstrip()]
            say(line.rstrip())
    if process.returncode:
        raise Unavailable("\n".join([f"failed: {' '.join(command)}", *tail]))


def output(*command: str) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"failed: {' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout


def end(pid: int, signal_number: int, seconds: float) -> None:
    """Send a signal to a process and wait for its end; after `seconds`, kill it."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal_number)
        if not select.select([process], [], [], seconds)[0]:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], seconds)
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, process, os.WEXITED)
    except ProcessLookupError:
        return
    finally:
        os.close(process)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM undo what is under way as Ctrl-C does; in other threads, change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
