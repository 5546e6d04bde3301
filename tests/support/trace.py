"""What a trace says, in the words of nbd-server's own nbd-trdump."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_REQUEST = re.compile(
    r"> H=([0-9a-f]{16}) C=0x[0-9a-f]{8} \( *(\w+)\+ *(FUA|NONE)\) O=([0-9a-f]{16}) L=([0-9a-f]{8})"
)
_REPLY = re.compile(r"< H=([0-9a-f]{16}) E=0x([0-9a-f]{8})")

Request = tuple[str, int, str, str, int, int]
Reply = tuple[str, int, int]


def dump(trace: Path) -> str:
    """Return what nbd-trdump prints of a trace."""
    with trace.open("rb") as file:
        done = subprocess.run(
            ["nbd-trdump"], stdin=file, capture_output=True, text=True, check=True
        )
    return done.stdout


def records(trace: Path) -> list[Request | Reply]:
    """Return the requests, (">", cookie, command, "FUA" or "NONE", offset, length), and replies.

    Replies are ("<", cookie, error). Fails for a record that is neither, but for the options.
    """
    found: list[Request | Reply] = []
    for line in dump(trace).splitlines():
        if match := _REQUEST.fullmatch(line):
            cookie, command, fua, offset, length = match.groups()
            found.append((">", int(cookie, 16), command, fua, int(offset, 16), int(length, 16)))
        elif match := _REPLY.fullmatch(line):
            found.append(("<", int(match[1], 16), int(match[2], 16)))
        else:
            assert line.startswith("TRACE_OPTION"), f"nbd-trdump is out of step: {line}"
    return found
