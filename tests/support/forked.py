"""Commands of the product as forks of a process that has imported it already.

An emulated processor needs seconds to import a command, which is most of what it takes: so a test
that runs hundreds of commands, or many at once, has them forked. What is left out is the start in
the background (`rbdnbd.daemon`): a map is one in the foreground.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.support.waiting import wait_until

IMPORTED = ["rados", "rbd", "rbdnbd.cli", "rbdnbd.mapping", "rbdnbd.loop", "tests.support.forked"]
LIMIT_SECONDS = 130
"""The longest that a command may take: rbdnbd's own limits are 120 seconds."""
STAYS = ("map", "attach")
_NUMBERS = itertools.count()


class Ended(NamedTuple):
    """How a command ended: None for one that goes on, because it serves the device it printed."""

    status: int | None
    out: str
    err: str


class Forked:
    """A command that runs since it was made; `words` as after "rbdnbd"."""

    def __init__(self, words: tuple[str, ...], directory: Path, conf: Path) -> None:
        self.words = words
        name = directory / f"{next(_NUMBERS)}-{words[0]}"
        self._out, self._err = name.with_suffix(".out"), name.with_suffix(".err")
        for path in (self._out, self._err):
            path.touch()
        if words[0] in STAYS:
            words = (words[0], "--foreground", *words[1:])
        self.process = _FORKS.Process(target=_run, args=(words, self._out, self._err, conf))
        self.process.start()

    def over(self) -> bool:
        """Tell whether it has ended, or serves the device that it has printed."""
        serves = self.words[0] in STAYS and self._out.read_text().endswith("\n")
        return serves or not self.process.is_alive()

    def ended(self, limit: float = LIMIT_SECONDS) -> Ended:
        """Wait until it is over, and fail after `limit` seconds; return how it is then."""
        try:
            wait_until(self.over, limit, "its end")
        except AssertionError as error:
            self._show_threads()
            raise AssertionError(f"rbdnbd {' '.join(self.words)}: {self.now()}: {error}") from None
        return self.now()

    def gone(self, limit: float = LIMIT_SECONDS) -> Ended:
        """Wait until it has ended, ready or not."""
        self.process.join(limit)
        assert not self.process.is_alive(), f"rbdnbd {' '.join(self.words)} has not ended"
        return self.now()

    def _show_threads(self) -> None:
        """Have a command that hangs say on stderr where its threads are."""
        said = self._err.read_text()
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)
        with suppress(AssertionError):
            wait_until(lambda: self._err.read_text() != said, 5, "its threads")

    def now(self) -> Ended:
        """Return how it ended, and what it has printed so far."""
        return Ended(self.process.exitcode, self._out.read_text(), self._err.read_text())


class Forks:
    """Starts commands and knows all that it has started."""

    def __init__(self, directory: Path, conf: Path) -> None:
        self._directory, self._conf = directory, conf
        self.all: list[Forked] = []

    def start(self, *words: str) -> Forked:
        """Start a command and return at once."""
        self.all.append(Forked(words, self._directory, self._conf))
        return self.all[-1]

    def run(self, *words: str) -> str:
        """Run a command that has to succeed; return what it prints."""
        ended = self.start(*words).ended()
        assert not ended.status, f"rbdnbd {' '.join(words)}: {ended}"
        return ended.out.strip()


@contextmanager
def forks(directory: Path, conf: Path) -> Iterator[Forks]:
    """Give commands for a test; at its end none may run any more, and one that does is killed."""
    directory.mkdir(exist_ok=True)
    started = Forks(directory, conf)
    yield started
    left = [each for each in started.all if each.process.is_alive()]
    for each in left:
        each.process.kill()
        each.process.join()
    assert not left, f"still running: {', '.join(' '.join(each.words) for each in left)}"


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(IMPORTED)


def _run(words: tuple[str, ...], out: Path, err: Path, conf: Path) -> None:
    """Be the command: in a session of its own, with its output in files."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    faulthandler.register(signal.SIGUSR1)
    os.environ["CEPH_CONF"] = str(conf)
    sys.argv = ["rbdnbd", *words]
    from rbdnbd.cli import main

    main()
