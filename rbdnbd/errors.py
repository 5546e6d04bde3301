"""What a person is told: one sentence and an exit status.

Errors are of three kinds that never mix. A start-up error is an `RbdnbdError`: one sentence on
stderr and an exit status. A request error is a number on the wire and the connection lives on
(`OSError` from the image, `rbdnbd.wire.nbd_error`). A protocol error ends the connection
(`rbdnbd.wire.ProtocolError`). Foreign exceptions are translated into these once, in the room that
knows the foreign library.
"""

from __future__ import annotations

import errno


class RbdnbdError(Exception):
    """Say in one sentence why a command cannot do what it was asked to do.

    `errno` is the system's error number behind it (0 when there is none), `exit_status` what the
    command exits with: 1 for a failure, 2 for a command line that makes no sense.
    """

    exit_status = 1

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.errno = errno


def image_error(number: int, text: str) -> OSError:
    """Return the `OSError` for what librbd failed with while serving."""
    reasons = {
        errno.ESHUTDOWN: "this client was blocklisted, or its lock broken",  # EBLOCKLISTED
        errno.EROFS: "another client keeps the lock, or the image is open read-only",
    }
    return OSError(number, f"{reasons[number]}: {text}" if number in reasons else text)


class UsageError(RbdnbdError):
    """A malformed name or option: nothing was tried."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(message, errno.EINVAL)


class NotMapped(RbdnbdError):
    """Nothing is mapped to the device, or the image is mapped to none."""


class NoProcess(RbdnbdError):
    """The device is there, but no process of ours serves it."""


class Busy(RbdnbdError):
    """Somebody else has what is wanted."""


class DeviceBusy(Busy):
    """The device that is to be mapped to is in use."""


class NoFreeDevice(RbdnbdError):
    """Every device is in use."""


class NotFlushed(RbdnbdError):
    """What a device caches cannot be written out."""


class CookieMismatch(RbdnbdError):
    """The device is not the mapping that the cookie is of."""


class Interrupted(Exception):
    """A signal, `number`, came before the command was done."""

    def __init__(self, number: int) -> None:
        import signal  # here, because the rest is imported by whoever must be quick

        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number
