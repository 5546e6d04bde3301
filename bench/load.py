"""nbdload, a process that puts load on one server: started, told what to do, ended."""

from __future__ import annotations

import json
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.build import NBDLOAD
from testbed.processes import Unavailable

START_SECONDS: Final = 60.0
MOST_SECONDS: Final = 600.0
_LOOK_SECONDS: Final = 0.5

Event = dict[str, Any]


class Load:
    """A running nbdload; see native/nbdload.c for what it is told and what it says.

    Raises Unavailable when it ends, with what it said, or is silent for too long.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        self.server: subprocess.Popen[bytes] | None = None
        """When this process ends, there is nothing left to wait for."""
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [NBDLOAD, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                bufsize=0,
            )

    def hear(self, event: str, seconds: float = MOST_SECONDS) -> Event:
        """Wait for the next line and return it, if it is of this event."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while not select.select([self._process.stdout], [], [], _LOOK_SECONDS)[0]:
            if self.server is not None and self.server.poll() is not None:
                raise self._failure(f"the server ended with status {self.server.returncode}")
            if time.monotonic() > deadline:
                raise self._failure(f"nbdload did not say '{event}' within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure("nbdload ended")
        heard: Event = json.loads(line)
        if heard["event"] != event:
            raise self._failure(f"nbdload said {heard}, not '{event}'")
        return heard

    def do(self, line: str, event: str = "job") -> Event:
        """Have a line obeyed, and return what comes of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise self._failure("nbdload ended") from None
        return self.hear(event)

    def end(self) -> None:
        """End it; whoever it was the kernel of, or a client of, sees it go."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _failure(self, reason: str) -> Unavailable:
        said = self._log.read_text(errors="replace").splitlines()[-10:]
        return Unavailable("\n".join([reason, f"the last lines of {self._log}:", *said]))
