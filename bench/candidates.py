"""Who is measured: programs that serve an image, and librbd alone.

An argv has places: {device} for /dev/nbdN, or {socket} for a unix socket, and {image}. A candidate
without an argv is fio's own rbd engine.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import targets

RBDNBD: Final = str(Path(sys.executable).with_name("rbdnbd"))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A name for the table, and how the program is started."""

    name: str
    argv: tuple[str, ...] = ()

    @property
    def is_fio(self) -> bool:
        """Tell whether this is fio on librbd, without a server."""
        return not self.argv

    @property
    def has_device(self) -> bool:
        """Tell whether it attaches /dev/nbdN, rather than listening on a socket."""
        return any("{device}" in word for word in self.argv)

    def command(self, **places: str) -> list[str]:
        """Return the argv with its places filled in."""
        return [word.format(**places) for word in self.argv]


ENGINES: Final[dict[str, tuple[str, ...]]] = {
    "rbdnbd threads": ("--io-engine", "threads"),
    "rbdnbd events": ("--io-engine", "events"),
}
"""Every way of ours to serve an image, by its name in the tables: options of `rbdnbd map`."""


_STOCK_ARGV = ("rbd-nbd", "map", "--device", "{device}", "-f", "{image}")
STOCK: Final = Candidate(targets.STOCK, _STOCK_ARGV)
AGAIN: Final = Candidate(targets.AGAIN, _STOCK_ARGV)
"""The same once more: how far it is from itself is what the other ratios may be off by."""
_ATTACH = ("--ioctl", "--device", "{device}", "--foreground")
OURS: Final = tuple(
    Candidate(name, (RBDNBD, "map", *_ATTACH, *options, "{image}"))
    for name, options in ENGINES.items()
)
OTHERS: Final = (
    Candidate(
        "qemu-nbd",
        ("qemu-nbd", "--format=raw", "--persistent", "--socket={socket}", "rbd:{image}"),
    ),
    Candidate("librbd alone"),
)


def parsed(text: str) -> Candidate:
    """Return the candidate of "NAME=ARGV"."""
    name, _, words = text.partition("=")
    candidate = Candidate(name.strip(), tuple(shlex.split(words)))
    if not name.strip() or "{image}" not in words or ("{device}" in words) == ("{socket}" in words):
        raise argparse.ArgumentTypeError(
            f"not a candidate: {text!r}; wanted is NAME=ARGV, with {{image}} in it, and with"
            " {device} or {socket}"
        )
    return candidate
