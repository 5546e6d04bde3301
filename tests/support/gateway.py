"""`rbdnbd serve` as a process of its own, with one client: what is asked of it and what it logs."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.client import RawClient
from tests.support.waiting import wait_until

START_SECONDS = 30
END_SECONDS = 20


@dataclass
class Gateway:
    """A server that is running, a client of it, and its log."""

    process: subprocess.Popen[bytes]
    client: RawClient
    log: Path
    address: Path

    def another(self) -> RawClient:
        """Connect once more; the client closes its socket at the end of a `with`."""
        client = RawClient(socket.socket(socket.AF_UNIX))
        client.sock.connect(str(self.address))
        return client.go()

    def said(self, words: str) -> list[str]:
        """Return the lines of the log that have these words."""
        return [line for line in self.log.read_text().splitlines() if words in line]

    def silent(self, seconds: float) -> bool:
        """Wait this long for a reply; tell whether none came."""
        return not select.select([self.client.sock], [], [], seconds)[0]

    def ended(self) -> int:
        """Wait for the end of the process; return its status."""
        return self.process.wait(END_SECONDS)


@contextmanager
def gateway(conf: Path, spec: str, path: Path, *options: str) -> Iterator[Gateway]:
    """Serve an image, without librbd's cache as a mapping is, at a socket and with a log at `path`.

    At the end the process is told to end, and killed if it does not.
    """
    address, log = path.with_suffix(".sock"), path.with_suffix(".log")
    argv = [sys.executable, "-P", "-m", "rbdnbd", "serve", "-c", str(conf), *options]
    environment = os.environ | {"CEPH_ARGS": "--rbd-cache=false"}
    with (
        log.open("wb") as said,
        subprocess.Popen(
            [*argv, "--socket", str(address), spec],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=said,
        ) as process,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        try:
            wait_until(
                lambda: address.exists() or process.poll() is not None, START_SECONDS, "it serves"
            )
            client = RawClient(sock)
            sock.connect(str(address))
            yield Gateway(process, client.go(), log, address)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
