"""The settings of a block device's queue, in /sys/block/nbdN/queue.

What the kernel starts with is made for disks, not for images whose objects are megabytes. What is
written there outlives a disconnect: so every mapping sets all of `SETTINGS`, each to what was
asked for or to a value that does not depend on the mapping before. All other settings are the
administrator's, and stay as they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from rbdnbd.devices import NbdDevices
from rbdnbd.errors import RbdnbdError, UsageError

log = logging.getLogger(__name__)

SETTINGS: Final[Mapping[str, range | tuple[str, ...]]] = {
    "scheduler": ("none", "mq-deadline", "kyber", "bfq"),
    "nr_requests": range(4, 2049),
    "max_sectors_kb": range(4, (32 << 10) + 1),
    "read_ahead_kb": range((1 << 31) + 1),
    "rotational": range(2),
    "discard_max_bytes": range((1 << 41) + 1),
    "nomerges": range(3),
    "rq_affinity": range(3),
}
"""What may be asked for, in the order in which it is written: a scheduler has requests of its own,
whose number comes after it. Source: Documentation/ABI/stable/sysfs-block."""

SUCCESSOR_MILLISECONDS: Final = 500
"""How long a request is out before the driver looks whether its server has been replaced.

What a server has been sent and has not answered is lost to its successor. The driver sends it again
only when the request's own timer runs out (nbd_xmit_timeout, 2c272542baee, Linux 5.8), which is
fixed when the request starts: too late to change once the server is gone. The block layer adds up
to a second.

The price: when the timer runs out on a server that lives, nothing happens but a line in the
kernel's log, "Possible stuck request", 115 bytes, every 1.5 s for each request that waits: on a
cluster that hangs 21 lines a second with 32 in flight, 85 with 128, the most there can be.
"""
SIBLINGS_MILLISECONDS: Final = 30_000
"""The same where a device has several connections, and the driver hangs up on a server that is
merely slow (`connections`): as long as a request may reasonably take."""
NEVER_MILLISECONDS: Final = (1 << 31) - 1
"""Three weeks: for several connections that nobody succeeds."""
KERNELS_MILLISECONDS: Final = 30_000
"""What a device starts with."""


def parse_settings(words: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Read KEY=VALUE; `UsageError` for an unknown key or a value that no kernel takes."""
    settings: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        allowed = SETTINGS.get(key)
        if allowed is None:
            raise UsageError(f"invalid queue setting {word!r}: expected {', '.join(SETTINGS)}")
        if isinstance(allowed, tuple):
            if value not in allowed:
                raise UsageError(f"invalid queue setting {word!r}: expected {', '.join(allowed)}")
        elif not (value.isascii() and value.isdecimal() and int(value) in allowed):
            bounds = f"{allowed.start} to {allowed.stop - 1}"
            raise UsageError(f"invalid queue setting {word!r}: expected {bounds}")
        settings[key] = value if isinstance(allowed, tuple) else str(int(value))
    return tuple(settings.items())


def tune(
    devices: NbdDevices, index: int, object_size: int, asked: Iterable[tuple[str, str]] = ()
) -> None:
    """Set the queue of a device: what was asked for, and defaults.

    By default one request can carry an object of `object_size` bytes, and two objects are read
    ahead: the driver starts with 128 KiB (6.1) or 1280 KiB (6.12) and takes up to 32 MiB. A default
    that the kernel refuses is logged; what was asked for raises `RbdnbdError`. What is so already
    is not written, for some settings wait until no request is in flight.
    """
    queue, explicit = devices.queue(index), dict(asked)
    for key, value in (_defaults(queue, object_size) | explicit).items():
        try:
            _write(queue / key, value)
        except OSError as error:
            sentence = f"{devices.path(index)} does not take {key}={value}: {error.strerror}"
            if key in explicit:
                raise RbdnbdError(sentence, error.errno or 0) from error
            log.warning("%s", sentence)


def set_timer(devices: NbdDevices, index: int, milliseconds: int) -> None:
    """Set how long the driver waits for an answer, to one of the figures above.

    Call this after each attach and each reattach, which may put the timer back. But do not where
    requests have a timeout (other than 0): that is the same timer. A failure is logged.
    """
    try:
        (devices.queue(index) / "io_timeout").write_text(str(milliseconds))
    except OSError as error:
        log.warning("cannot set the timer of %s: %s", devices.path(index), error)


def _defaults(queue: Path, object_size: int) -> dict[str, str]:
    """Return a value for each of `SETTINGS`, in that order."""
    request_kib = max(object_size // 1024, 4)
    if limit := _read(queue / "max_hw_sectors_kb"):
        request_kib = min(request_kib, int(limit))
    return {
        "scheduler": "none",
        "nr_requests": "128",
        "max_sectors_kb": str(request_kib),
        "read_ahead_kb": str(2 * request_kib),
        "rotational": "0",
        "discard_max_bytes": _read(queue / "discard_max_hw_bytes") or "0",
        "nomerges": "0",
        "rq_affinity": "1",
    }


def _write(setting: Path, value: str) -> None:
    """Write a setting that is another one; `OSError` if it is not what was written then."""
    if _read(setting) == value:
        return
    setting.write_text(value)
    if (found := _read(setting)) != value:
        raise OSError(0, f"the kernel makes {found} of it")


def _read(setting: Path) -> str:
    """Return a setting, of several words the chosen one; "" for one that cannot be read."""
    try:
        text = setting.read_text().strip()
    except OSError:
        return ""
    chosen = re.search(r"\[([^]]*)\]", text)
    return chosen[1] if chosen else text
