"""What a device is asked, in the words of nbd-trdump."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.support.trace import records

pytestmark = pytest.mark.usefixtures("nbd_module")

MIB = 1 << 20


def succeed(rbdnbd: Command, *words: str) -> str:
    """Run a command that has to succeed, and return what it prints."""
    done = rbdnbd(*words)
    assert done.returncode == 0, done.stderr
    return str(done.stdout).strip()


def write_at(device: str, offset: int) -> None:
    """Write 4 KiB and have them stable."""
    file = os.open(device, os.O_RDWR)
    try:
        os.pwrite(file, b"x" * 4096, offset)
        os.fsync(file)
    finally:
        os.close(file)


def answers(trace: Path, offset: int) -> list[int]:
    """Return the errors with which the writes of 4 KiB at an offset were answered."""
    found = records(trace)
    cookies = [
        record[1]
        for record in found
        if record[0] == ">" and record[2] == "NBD_CMD_WRITE" and record[4:] == (offset, 4096)
    ]
    return [record[2] for record in found if record[0] == "<" and record[1] in cookies]


@pytest.mark.parametrize("engine", ["threads", "events"])
def test_a_devices_trace_shows_a_write_its_flush_and_their_replies(
    rbdnbd: Command, image: Callable[..., str], engine: str, tmp_path: Path
) -> None:
    """Seen to fail with an engine that was not given the trace."""
    trace = tmp_path / "trace"
    device = succeed(rbdnbd, "map", image("16M"), "--io-engine", engine, "--trace", str(trace))
    write_at(device, MIB)
    succeed(rbdnbd, "unmap", device)
    found = records(trace)
    assert answers(trace, MIB) == [0]
    assert [record[2] for record in found if record[0] == ">"][-1] == "NBD_CMD_DISC"
    assert "NBD_CMD_FLUSH" in [record[2] for record in found]


def test_attach_replace_begins_a_trace_and_ends_it(
    rbdnbd: Command, image: Callable[..., str], tmp_path: Path
) -> None:
    """Seen to fail with a trace that is the mapping's, as recorded, and not the process's."""
    trace = tmp_path / "trace"
    device = succeed(rbdnbd, "map", image("16M"))
    replace = ("attach", "--replace", "--device", device)
    succeed(rbdnbd, *replace, "--trace", str(trace), "--trace-data")
    write_at(device, MIB)
    succeed(rbdnbd, *replace)
    write_at(device, 2 * MIB)
    succeed(rbdnbd, "unmap", device)
    assert answers(trace, MIB) == [0]
    assert answers(trace, 2 * MIB) == []
    assert b"x" * 4096 in trace.read_bytes()
