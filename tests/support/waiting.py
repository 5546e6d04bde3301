"""The one way in which tests wait for something to become true."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

INTERVAL_SECONDS = 0.02

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout: float, what: str) -> T:
    """Return the condition's first true value; fail with `what` after `timeout` seconds.

    The condition is asked once more when the time is up, so a slow machine is not blamed twice.
    """
    deadline = time.monotonic() + timeout
    while True:
        late = time.monotonic() >= deadline
        if value := condition():
            return value
        if late:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(INTERVAL_SECONDS)
