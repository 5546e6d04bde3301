"""How hard a test of faults tries: a short form in `make test`, the whole in `make torture`."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

LONG = "RBDNBD_TORTURE"
"""Set to the seed of the random moments, a number, where the whole is wanted."""


@dataclass(frozen=True, slots=True)
class Torture:
    """What a test of faults asks for how often and when; the seed repeats its moments."""

    seed: int
    whole: bool

    def rounds(self, short: int, whole: int) -> Iterator[tuple[int, random.Random]]:
        """Yield every round's number and its own source of random moments."""
        for number in range(whole if self.whole else short):
            yield number, random.Random(f"{self.seed}/{number}")


def torture() -> Torture:
    """Return what the environment asks for; the seed is always printed."""
    asked = os.environ.get(LONG)
    seed = int(asked) if asked else random.SystemRandom().randrange(10**6)
    sys.stderr.write(f"{LONG}={seed} repeats this\n")
    return Torture(seed, whole=asked is not None)
