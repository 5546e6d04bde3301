"""Give a device that netlink has attached sockets in place of those whose server has gone.

A RECONFIGURE puts each of its sockets in the place of one that the kernel has seen dying, and says
nothing if there is none: so what was taken is looked for afterwards. A socket that was not taken is
never offered again, since it might have been: a second time it would get a second place.
Source: nbd_reconnect_socket (ENOSPC), nbd_genl_reconfigure, Linux 6.1.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from rbdnbd.errors import Busy, RbdnbdError
from rbdnbd.netlink import NbdFamily, Reconfigure
from rbdnbd.release import refusal

REATTACH_PAUSES: Final = (0.0, 0.02, 0.08)
"""Seconds for the kernel to see that a server has gone, which threads of its own find out."""

Offer = Callable[[], socket.socket]
"""Makes a socket pair of which one end is served; returns the other, which is for the kernel."""


def hand_over(
    device: Path, family: NbdFamily | None, request: Reconfigure, offer: Offer, count: int
) -> None:
    """Send RECONFIGURE with new sockets until the kernel has taken `count` of them.

    The sockets are closed in any case. Errors: RbdnbdError; `Busy` if a server lives.
    """
    if family is None:
        raise RbdnbdError(f"cannot attach {device} again: the kernel has no netlink for nbd")
    try:
        with family:
            for pause in REATTACH_PAUSES:
                time.sleep(pause)
                count -= _taken(family, request, [offer() for _ in range(count)])
                if not count:
                    return
    except OSError as error:
        raise refusal(f"attach {device} again", error) from error
    raise Busy(f"{device} still has a server: end that first", errno.EBUSY)


def _taken(family: NbdFamily, request: Reconfigure, socks: Sequence[socket.socket]) -> int:
    """Offer sockets to the kernel and close them; return how many it has taken.

    What it has taken stays registered when we close it (epoll(7), question 6).
    """
    with select.epoll() as watch:
        with ExitStack() as stack:
            for sock in socks:
                watch.register(stack.enter_context(sock), select.EPOLLOUT)
            family.reconfigure(replace(request, sockets=tuple(each.fileno() for each in socks)))
        return Path(f"/proc/self/fdinfo/{watch.fileno()}").read_text().count("tfd:")
