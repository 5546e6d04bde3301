"""Which way a device is attached, what is undone when that fails, and what is said."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from rbdnbd import handover, kernel
from rbdnbd.errors import Busy, CookieMismatch, DeviceBusy, NoFreeDevice, NotMapped, RbdnbdError
from rbdnbd.kernel import Attachment, NbdDriver
from rbdnbd.netlink import Connect, Reconfigure
from tests.support.nbd_driver import FakeDriver, FakeFamily
from tests.support.waiting import wait_until

SIZE = 64 << 20


@pytest.fixture
def fake(tmp_path):
    return FakeDriver(tmp_path)


@pytest.fixture
def family(fake):
    family = FakeFamily(fake)
    yield family
    family.close()


@pytest.fixture
def driver(fake, family):
    return NbdDriver(fake.devices, fake.ioctls, family)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    for limit in ("LIVE_LIMIT", "BUSY_LIMIT", "RELEASE_LIMIT"):
        monkeypatch.setattr(kernel, limit, 0.1)
    monkeypatch.setattr(handover, "REATTACH_PAUSES", (0, 0, 0))


@pytest.fixture
def pair():
    server, client = socket.socketpair()
    with server, client:
        yield server, client


@pytest.fixture
def attach(driver, pair):
    def attach(**options: object) -> Attachment:
        given = {"size": SIZE, "block_size": 512, "flags": 5} | options
        return driver.attach(pair[1], **given)

    return attach


@pytest.fixture
def offer():
    """Make sockets for the kernel; `offered` are our ends of them."""
    offered: list[socket.socket] = []

    def offer() -> socket.socket:
        ours, kernels = socket.socketpair()
        offered.append(ours)
        return kernels

    offer.offered = offered
    yield offer
    for each in offered:
        each.close()


def refused(act: Callable[[], object]) -> RbdnbdError:
    with pytest.raises(RbdnbdError) as refusal:
        act()
    return refusal.value


def test_netlink_is_preferred_and_told_everything(attach, family, fake, pair):
    fd = pair[1].fileno()
    device = str(fake.devices.path(1))
    attachment = attach(device=device, timeout=3, reattach_timeout=9, cookie="c", block_size=4096)
    assert family.connects == [
        Connect(
            sockets=(fd,),
            size=SIZE,
            block_size=4096,
            flags=5,
            index=1,
            timeout=3,
            dead_conn_timeout=9,
            backend_identifier="c",
        )
    ]
    assert (attachment.index, attachment.method) == (1, "netlink")
    assert attachment.device == device


def test_the_kernel_chooses_when_no_device_is_named(attach, family):
    assert attach().index == 0
    assert family.connects[0].index is None


def test_ioctl_is_taken_where_the_family_is_missing(attach, family, fake):
    family.missing = True
    attachment = attach()
    assert (attachment.method, fake.names()[0]) == ("ioctl", "NBD_SET_SOCK")
    attachment.disconnect()


def test_ioctl_is_taken_when_it_is_asked_for(attach, family, fake):
    attachment = attach(use_ioctl=True)
    assert (attachment.method, family.connects) == ("ioctl", [])
    attachment.disconnect()


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_a_size_is_cut_to_whole_blocks(attach, fake, use_ioctl):
    attachment = attach(size=SIZE + 4095, block_size=4096, use_ioctl=use_ioctl)
    assert fake.devices.size(attachment.index) == SIZE
    attachment.disconnect()


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_an_attached_device_is_opened_once_and_freed_of_a_read_only_mark(attach, fake, use_ioctl):
    attachment = attach(use_ioctl=use_ioctl)
    assert fake.calls[-1] == (f"nbd{attachment.index}", "BLKROSET", 0)
    attachment.disconnect()
    wait_until(lambda: fake.open_here() == [], 5, "the device is closed")


def test_the_socket_is_closed_once_the_kernel_has_it(attach, pair):
    attach()
    assert pair[0].recv(1) == b""


def test_the_socket_is_closed_when_the_attach_fails(attach, family, pair):
    family.refusals = [errno.EINVAL]
    refused(attach)
    assert pair[0].recv(1) == b""


def test_a_malformed_device_is_refused_before_anything_is_done(attach, family):
    refusal = refused(lambda: attach(device="/dev/sda"))
    assert refusal.message.startswith("invalid device path: /dev/sda ")
    assert family.connects == []


def test_a_refusal_of_the_kernel_is_one_sentence(attach, family):
    family.refusals = [errno.EINVAL]
    assert refused(attach).message == "cannot attach an nbd device: Invalid argument"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_who_is_not_root_is_told_so(attach, family, number):
    family.refusals = [number]
    refusal = refused(attach)
    assert refusal.message == "cannot attach an nbd device: this needs root (CAP_SYS_ADMIN)"
    assert refusal.errno == number


def test_a_free_device_that_is_open_somewhere_is_asked_for_again(attach, family, fake):
    family.refusals = [errno.EBUSY, errno.EBUSY]
    assert attach(device=str(fake.devices.path(1))).index == 1


def test_a_device_that_stays_open_somewhere_is_refused_in_the_end(attach, family, fake):
    family.refusals = [errno.EBUSY] * 1000
    device = str(fake.devices.path(1))
    refusal = refused(lambda: attach(device=device))
    assert refusal.message == f"{device} is busy: another process has it open"
    assert len(family.connects) > 1


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_a_connected_device_is_refused_at_once(attach, family, fake, use_ioctl):
    family.refusals = [errno.EBUSY] * 1000
    fake.connect(1, SIZE, pid=4711)
    device = str(fake.devices.path(1))
    refusal = refused(lambda: attach(device=device, use_ioctl=use_ioctl))
    assert isinstance(refusal, DeviceBusy)
    assert refusal.message == f"{device} is already in use (by process 4711)"
    assert refusal.errno == errno.EBUSY
    assert len(family.connects) <= 1


def test_ioctl_takes_the_first_device_that_is_free(attach, fake):
    fake.connect(0, SIZE)
    attachment = attach(use_ioctl=True)
    assert attachment.index == 1
    attachment.disconnect()


def test_ioctl_passes_over_a_device_that_another_process_sets_up(attach, fake):
    fake.refusals["NBD_SET_SOCK"] = errno.EBUSY
    refused(lambda: attach(use_ioctl=True))
    assert [device for device, _, _ in fake.calls] == ["nbd0", "nbd1"]


def test_no_free_device_is_said_with_the_number_of_devices(attach, fake):
    fake.connect(0, SIZE)
    fake.connect(1, SIZE)
    refusal = refused(lambda: attach(use_ioctl=True))
    assert isinstance(refusal, NoFreeDevice)
    assert refusal.message == (
        "no free nbd device: all 2 are in use (the nbd module's nbds_max sets how many)"
    )


def test_a_device_that_does_not_exist_is_refused(attach, fake):
    device = str(fake.devices.path(7))
    refusal = refused(lambda: attach(device=device, use_ioctl=True))
    assert refusal.message == f"cannot attach {device}: No such file or directory"


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_a_device_that_does_not_come_to_life_is_disconnected(attach, family, fake, use_ioctl):
    fake.alive = False
    refusal = refused(lambda: attach(use_ioctl=use_ioctl))
    assert refusal.message == f"{fake.devices.path(0)} did not come to life"
    assert family.disconnects == [0]
    wait_until(lambda: fake.open_here() == [], 5, "the device is closed")


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_a_device_that_cannot_be_opened_is_disconnected(attach, family, fake, use_ioctl):
    fake.refusals["BLKROSET"] = errno.EACCES
    refused(lambda: attach(use_ioctl=use_ioctl))
    assert family.disconnects == [0]


def test_a_do_it_that_fails_says_why_and_disconnects_nobody(attach, family, fake):
    fake.refusals["NBD_DO_IT"] = errno.EBUSY
    refusal = refused(lambda: attach(use_ioctl=True))
    assert refusal.message == "cannot attach an nbd device: Device or resource busy"
    assert family.disconnects == []


@pytest.mark.parametrize("use_ioctl", [False, True])
def test_an_attachment_knows_when_it_is_released(attach, fake, use_ioctl):
    attachment = attach(use_ioctl=use_ioctl)
    assert not attachment.wait_released(0)
    fake.let_go("nbd0")
    assert attachment.wait_released(5)


def test_a_device_that_is_somebody_elses_by_now_is_released(attach, fake):
    attachment = attach()
    fake.connect(0, SIZE, pid=4712)
    assert attachment.released()


def test_an_attachment_that_is_released_is_not_disconnected_again(attach, fake, family):
    attachment = attach()
    fake.let_go("nbd0")
    attachment.disconnect()
    assert family.disconnects == []


def test_the_driver_is_loaded_once(driver):
    assert not driver.load(4, 16)


@pytest.fixture
def reattach(driver, fake, offer):
    """Attach device 1 again, which was attached with the cookie "c"."""

    def reattach(count: int = 1, **options: object) -> Attachment:
        given = {"size": SIZE, "timeout": None, "reattach_timeout": 30, "cookie": "c"} | options
        return driver.reattach(1, offer, count, **given)

    fake.connect(1, SIZE, backend="c")
    return reattach


def hung_up(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def test_a_device_is_given_another_server(reattach, family, offer):
    attachment = reattach(timeout=0)
    (sent,) = family.reconfigures
    assert len(sent.sockets) == 1
    assert replace(sent, sockets=()) == Reconfigure(
        index=1, backend_identifier="c", timeout=0, dead_conn_timeout=30
    )
    assert not hung_up(offer.offered[0])
    assert (attachment.index, attachment.method) == (1, "netlink")


def test_a_socket_that_is_not_taken_at_first_is_offered_again(reattach, family):
    family.deaf = 2
    assert not reattach().released()


def test_each_connection_of_a_device_gets_a_successor_of_its_own(reattach, family, offer):
    """Seen to fail with a `hand_over` that is content with the first answer."""
    family.dead, family.deaf = 4, 1
    reattach(4)
    assert [len(each.sockets) for each in family.reconfigures] == [4, 4]
    assert [hung_up(ours) for ours in offer.offered] == [True] * 4 + [False] * 4


def test_connections_that_the_kernel_notices_late_are_given_theirs_later(
    reattach, family, offer, monkeypatch
):
    """Seen to fail with a `hand_over` that offers as many again, whatever was taken."""
    noticed = iter((1, 3))

    def notice(_: float) -> None:
        family.dead = next(noticed)

    monkeypatch.setattr(handover.time, "sleep", notice)
    reattach(3)
    assert [len(each.sockets) for each in family.reconfigures] == [3, 2]
    assert [hung_up(ours) for ours in offer.offered] == [False, True, True, False, False]


def test_several_sockets_are_attached_with_one_message(driver, family, offer):
    socks = [offer() for _ in range(3)]
    numbers = tuple(each.fileno() for each in socks)
    driver.attach(*socks, size=SIZE, block_size=512, flags=5)
    assert family.connects[0].sockets == numbers
    assert all(each.fileno() == -1 for each in socks)


@pytest.mark.parametrize("missing", [False, True])
def test_several_sockets_are_refused_without_netlink(driver, family, offer, missing):
    family.missing = missing
    refusal = refused(
        lambda: driver.attach(
            offer(), offer(), size=SIZE, block_size=512, flags=5, use_ioctl=not missing
        )
    )
    assert refusal.message == (
        "several connections need netlink, which this kernel has not for nbd"
    )
    assert all(map(hung_up, offer.offered))


def test_a_connection_that_the_kernel_has_dropped_is_replaced(attach, family, offer):
    attachment = attach(cookie="c")
    attachment.replace(offer)
    (sent,) = family.reconfigures
    assert replace(sent, sockets=()) == Reconfigure(index=0, backend_identifier="c")
    assert not hung_up(offer.offered[0])


def test_no_connection_of_a_device_that_is_somebody_elses_is_replaced(attach, fake, family, offer):
    attachment = attach()
    fake.connect(0, SIZE, pid=4712)
    assert isinstance(refused(lambda: attachment.replace(offer)), NotMapped)
    assert family.reconfigures == []


def test_a_device_whose_server_lives_is_refused(reattach, family, fake, offer):
    family.deaf = 1000
    refusal = refused(reattach)
    assert isinstance(refusal, Busy)
    assert refusal.message == f"{fake.devices.path(1)} still has a server: end that first"
    assert all(map(hung_up, offer.offered))


def test_a_device_with_another_cookie_is_left_alone(reattach, family, fake):
    refusal = refused(lambda: reattach(cookie="d"))
    assert isinstance(refusal, CookieMismatch)
    assert refusal.message == f"cookie mismatch: {fake.devices.path(1)} has another one"
    assert family.reconfigures == []


def test_a_device_without_a_cookie_is_left_alone(reattach, family, fake):
    fake.disconnect(1)
    fake.connect(1, SIZE)
    assert refused(reattach).message == (
        f"{fake.devices.path(1)} has no cookie: only what netlink attached can be attached again"
    )
    assert family.reconfigures == []


def test_a_free_device_cannot_be_attached_again(reattach, fake):
    fake.disconnect(1)
    refusal = refused(reattach)
    assert isinstance(refusal, NotMapped)
    assert refusal.message == f"{fake.devices.path(1)} is not attached"


def test_without_netlink_no_device_is_attached_again(reattach, family, fake):
    family.missing = True
    assert refused(reattach).message == (
        f"cannot attach {fake.devices.path(1)} again: the kernel has no netlink for nbd"
    )


def test_a_refused_reattach_is_one_sentence_and_closes_the_socket(reattach, family, fake, offer):
    family.refusals = [errno.EPERM]
    assert refused(reattach).message == (
        f"cannot attach {fake.devices.path(1)} again: this needs root (CAP_SYS_ADMIN)"
    )
    assert all(map(hung_up, offer.offered))


def test_a_new_size_comes_after_the_socket_that_answers_meanwhile(reattach, family, fake):
    reattach(size=2 * SIZE + 511)
    assert [each.size for each in family.reconfigures] == [None, 2 * SIZE]
    assert fake.devices.size(1) == 2 * SIZE


def test_a_device_attached_again_is_ours_until_its_pid_or_cookie_changes(reattach, fake):
    attachment = reattach()
    assert not attachment.released()
    fake.connect(1, SIZE, backend="d")
    assert attachment.released()
    fake.connect(1, SIZE, backend="c")
    assert not attachment.released()
    fake.disconnect(1)
    assert attachment.released()


def test_netlink_resizes_a_device_with_its_cookie(attach, family, fake):
    attachment = attach(cookie="c")
    attachment.resize(2 * SIZE + 511)
    assert family.reconfigures == [Reconfigure(index=0, backend_identifier="c", size=2 * SIZE)]
    assert fake.devices.size(0) == 2 * SIZE


def test_ioctl_resizes_a_device_in_its_blocks(attach, fake):
    attachment = attach(use_ioctl=True, block_size=4096)
    attachment.resize(2 * SIZE + 4095)
    assert fake.calls[-1] == ("nbd0", "NBD_SET_SIZE_BLOCKS", 2 * SIZE // 4096)
    attachment.disconnect()


def test_a_device_that_has_the_size_is_not_resized(attach, family):
    attach().resize(SIZE + 511)
    assert family.reconfigures == []


def test_a_device_that_is_not_ours_any_more_is_not_resized(attach, family, fake):
    attachment = attach()
    fake.let_go("nbd0")
    refusal = refused(lambda: attachment.resize(2 * SIZE))
    assert (type(refusal), refusal.errno) == (NotMapped, errno.ENODEV)
    assert family.reconfigures == []


def test_a_resize_that_the_kernel_refuses_is_one_sentence(attach, family):
    attachment = attach()
    family.refusals = [errno.EINVAL]
    assert refused(lambda: attachment.resize(2 * SIZE)).message == (
        f"cannot resize {attachment.device}: Invalid argument"
    )
