"""A device that gets another server or another size, on a real kernel, while it is in use."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from rbdnbd.blockqueue import SUCCESSOR_MILLISECONDS, set_timer
from rbdnbd.errors import Busy, CookieMismatch, NotMapped, RbdnbdError
from rbdnbd.kernel import Attachment, NbdDriver
from tests.support.direct_io import DirectIO
from tests.support.nbd_responder import Responder
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MIB = 1 << 20
SIZE = 64 * MIB
DEPTH = 32
SOON = 3.0
"""Seconds for requests to go on: a timer of 0.5 s, up to 1 s of rounding, and a busy machine."""
BOTH = pytest.mark.parametrize("use_ioctl", [False, True], ids=["netlink", "ioctl"])
DRIVER = NbdDriver()


@pytest.fixture
def responder() -> Iterator[Callable[[], Responder]]:
    made: list[Responder] = []

    def make() -> Responder:
        made.append(Responder())
        return made[-1]

    yield make
    for responder in made:
        responder.close()


@pytest.fixture
def attach() -> Iterator[Callable[..., Attachment]]:
    """Attach a socket with the cookie "c"; it is disconnected by force in the end."""
    made: list[Attachment] = []

    def make(sock: socket.socket, reattach_timeout: int = 30, **options: object) -> Attachment:
        given = {"size": SIZE, "block_size": 512, "flags": 5, "cookie": "c"} | options
        attachment = DRIVER.attach(sock, reattach_timeout=reattach_timeout, **given)  # type: ignore[arg-type]
        set_timer(DRIVER.devices, attachment.index, SUCCESSOR_MILLISECONDS)
        made.append(attachment)
        return attachment

    yield make
    for attachment in made:
        attachment.disconnect(flush_limit=1)


def reattach(index: int, sock: socket.socket, size: int = SIZE, cookie: str = "c") -> Attachment:
    attachment = DRIVER.reattach(
        index, lambda: sock, size=size, timeout=None, reattach_timeout=30, cookie=cookie
    )
    set_timer(DRIVER.devices, index, SUCCESSOR_MILLISECONDS)
    return attachment


def refusal(act: Callable[[], object]) -> RbdnbdError:
    with pytest.raises(RbdnbdError) as refused:
        act()
    return refused.value


def capacity(device: str) -> int:
    fd = os.open(device, os.O_RDONLY)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def assert_all_go_on(io: DirectIO) -> None:
    wait_until(lambda: io.stuck(0.2) == 0, SOON, "requests that are answered")
    assert io.errors == []


def test_a_server_that_leaves_and_its_successor_lose_no_request(attach, responder):
    served = responder()
    attachment = attach(served.client)
    with DirectIO(attachment.device, DEPTH) as io:
        wait_until(lambda: len(served.requests) > 1000, 10, "running requests")
        served.leave()
        wait_until(lambda: io.stuck(0.5) == DEPTH, 5, "requests that wait for a successor")
        assert io.errors == []
        reattach(attachment.index, responder().client)
        assert_all_go_on(io)


def test_servers_that_follow_one_another_at_once_lose_no_request(attach, responder):
    served = responder()
    attachment = attach(served.client)
    with DirectIO(attachment.device, DEPTH) as io:
        for _ in range(5):
            wait_until(lambda served=served: len(served.requests) > 200, SOON, "running requests")
            served.leave()
            served = responder()
            reattach(attachment.index, served.client)
        assert_all_go_on(io)


def test_requests_that_died_with_their_server_are_sent_to_its_successor(attach, responder):
    ours, kernels = socket.socketpair()
    with ours:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nbd_responder", "1000"], stdin=ours
        )
    try:
        attachment = attach(kernels)
        with DirectIO(attachment.device, DEPTH) as io:
            wait_until(lambda: io.stuck(0.5) == DEPTH, 10, "requests that are not answered")
            child.kill()
            child.wait()
            reattach(attachment.index, responder().client)
            assert_all_go_on(io)
    finally:
        child.kill()
        child.wait()


def test_a_device_attached_again_is_released_like_any_other(attach, responder):
    served = responder()
    attachment = attach(served.client)
    served.leave()
    again = reattach(attachment.index, responder().client)
    assert not again.released()
    DRIVER.release(again.index)
    assert again.released()


def test_a_device_attached_again_has_the_new_size(attach, responder):
    served = responder()
    attachment = attach(served.client)
    served.leave()
    reattach(attachment.index, responder().client, size=2 * SIZE)
    assert capacity(attachment.device) == 2 * SIZE


def test_a_device_whose_server_lives_keeps_it(attach, responder):
    served = responder()
    attachment = attach(served.client)
    refused = refusal(lambda: reattach(attachment.index, responder().client))
    assert (type(refused), refused.message) == (
        Busy,
        f"{attachment.device} still has a server: end that first",
    )
    with DirectIO(attachment.device) as io:
        assert_all_go_on(io)


def test_a_device_with_another_cookie_waits_on(attach, responder):
    served = responder()
    attachment = attach(served.client)
    served.leave()
    refused = refusal(lambda: reattach(attachment.index, responder().client, cookie="d"))
    assert isinstance(refused, CookieMismatch)
    reattach(attachment.index, responder().client)


def test_a_device_attached_by_ioctl_is_not_given_another_server(attach, responder):
    attachment = attach(responder().client, use_ioctl=True)
    assert refusal(lambda: reattach(attachment.index, responder().client)).message == (
        f"{attachment.device} has no cookie: only what netlink attached can be attached again"
    )


def test_a_free_device_is_not_given_another_server(responder):
    refused = refusal(lambda: reattach(9, responder().client))
    assert (type(refused), refused.message) == (NotMapped, "/dev/nbd9 is not attached")


def test_without_a_reattach_timeout_requests_fail_at_once(attach, responder):
    served = responder()
    attachment = attach(served.client, reattach_timeout=0)
    served.leave()
    with DirectIO(attachment.device, 1) as io:
        wait_until(lambda: io.errors, 2, "an error")
    assert io.errors[0].errno == errno.EIO


def test_a_request_that_has_waited_for_too_long_fails_and_the_device_stays(attach, responder):
    served = responder()
    attachment = attach(served.client, reattach_timeout=2)
    with DirectIO(attachment.device, 1) as io:
        served.leave()
        started = time.monotonic()
        wait_until(lambda: io.errors, 10, "an error")
    assert (io.errors[0].errno, round(time.monotonic() - started)) == (errno.EIO, 2)
    assert not attachment.released()
    assert DRIVER.devices.size(attachment.index) == SIZE
    reattach(attachment.index, responder().client)
    with DirectIO(attachment.device) as io:
        assert_all_go_on(io)


def test_a_request_that_died_with_its_server_waits_until_the_device_is_disconnected(
    attach, responder
):
    served = responder()
    attachment = attach(served.client, reattach_timeout=1)
    served.silent = True
    with DirectIO(attachment.device, 1) as io:
        wait_until(lambda: io.stuck(0.1), 5, "a request that is not answered")
        served.leave()
        wait_until(lambda: io.stuck(3), 5, "a wait that outlasts the reattach timeout")
        DRIVER.release(attachment.index, force=True, flush_limit=0.5)
    assert [error.errno for error in io.errors] == [errno.EIO]


def test_a_forced_release_does_not_wait_for_a_successor(attach, responder):
    served = responder()
    attachment = attach(served.client, reattach_timeout=30)
    attachment.resize(2 * SIZE)  # the next to open it reads, for its partitions
    served.leave()
    started = time.monotonic()
    DRIVER.release(attachment.index, force=True, flush_limit=0.5)
    assert attachment.released()
    assert time.monotonic() - started < 10


def test_a_release_waits_for_a_successor_and_refuses_without_one(attach, responder):
    served = responder()
    attachment = attach(served.client, reattach_timeout=1)
    served.leave()
    assert refusal(lambda: DRIVER.release(attachment.index)).message == (
        f"cannot flush {attachment.device}: Input/output error "
        "(--force gives up what is not written yet)"
    )
    assert not attachment.released()


@BOTH
def test_a_device_follows_its_image_up_and_down_under_io(attach, responder, use_ioctl):
    attachment = attach(responder().client, use_ioctl=use_ioctl)
    with DirectIO(attachment.device, DEPTH) as io:
        for size in (3 << 40, 2 * SIZE, SIZE // 2):
            attachment.resize(size + 511)
            assert capacity(attachment.device) == size
        assert_all_go_on(io)


@BOTH
def test_a_device_that_is_released_is_not_resized(attach, responder, use_ioctl):
    attachment = attach(responder().client, use_ioctl=use_ioctl)
    attachment.disconnect()
    assert isinstance(refusal(lambda: attachment.resize(2 * SIZE)), NotMapped)
