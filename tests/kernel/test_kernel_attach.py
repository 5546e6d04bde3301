"""/dev/nbdN on a real kernel: both ways to attach, what lives on it, and how it is let go."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rbdnbd import release
from rbdnbd.blockqueue import tune
from rbdnbd.errors import RbdnbdError
from rbdnbd.ioctl import BLKROSET, NbdIoctls, ioctl
from rbdnbd.kernel import Attachment, NbdDriver
from rbdnbd.netlink import FamilyNotFoundError, NbdFamily, encode_attribute
from tests.support.nbd_responder import BLOCK, DISC, FLUSH, READ, WRITE, Responder
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
FLAGS = 1 | 4  # HAS_FLAGS, SEND_FLUSH
READ_ONLY = 2
BOTH = pytest.mark.parametrize("use_ioctl", [False, True], ids=["netlink", "ioctl"])
DRIVER = NbdDriver()


def without_family() -> NbdFamily:
    raise FamilyNotFoundError(errno.ENOENT, "as in a network namespace of its own")


@pytest.fixture
def responder() -> Iterator[Callable[..., Responder]]:
    made: list[Responder] = []

    def make(blocks: dict[int, bytes] | None = None) -> Responder:
        made.append(Responder(blocks))
        return made[-1]

    yield make
    for responder in made:
        responder.close()


@pytest.fixture
def attach(responder: Callable[..., Responder]) -> Iterator[Callable[..., Attachment]]:
    """Attach a responder with 64 MiB of zeroes, or the one that is given."""
    made: list[Attachment] = []

    def make(
        served: Responder | None = None, *, driver: NbdDriver = DRIVER, **options: object
    ) -> Attachment:
        given = {"size": 64 * MIB, "block_size": 512, "flags": FLAGS} | options
        made.append(driver.attach((served or responder()).client, **given))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for attachment in made:
        attachment.disconnect()


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(RbdnbdError) as refused:
        act()
    return refused.value.message


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


@contextmanager
def mounted(device: str, directory: Path) -> Iterator[None]:
    run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-O", "^has_journal", device)
    run("mount", device, str(directory))
    try:
        yield
    finally:
        run("umount", str(directory))


def partition_table() -> dict[int, bytes]:
    """A DOS partition table with one partition, from 1 MiB to 33 MiB."""
    entry = struct.pack("<BBBBBBBBII", 0, 0, 2, 0, 0x83, 0, 2, 0, 2048, 65536)
    return {0: bytes(446) + entry + bytes(48) + b"\x55\xaa"}


@BOTH
def test_what_is_written_to_the_device_is_read_back_from_it(attach, use_ioctl):
    attachment = attach(use_ioctl=use_ioctl)
    data = os.urandom(256 * 1024)
    with opened(attachment.device, os.O_RDWR) as fd:
        os.pwrite(fd, data, 3 * MIB)
        os.fsync(fd)
    run("blockdev", "--flushbufs", attachment.device)
    with opened(attachment.device, os.O_RDONLY) as fd:
        assert os.pread(fd, len(data), 3 * MIB) == data


@BOTH
@pytest.mark.parametrize("size", [3 * GIB, 3 * TIB, 9 * TIB], ids=["3GiB", "3TiB", "9TiB"])
def test_the_last_block_of_a_large_device_is_written_where_it_belongs(
    attach, responder, use_ioctl, size
):
    served = responder()
    attachment = attach(served, size=size, use_ioctl=use_ioctl)
    block = os.urandom(BLOCK)
    with opened(attachment.device, os.O_RDWR) as fd:
        assert os.lseek(fd, 0, os.SEEK_END) == size
        os.pwrite(fd, block, size - BLOCK)
        os.fsync(fd)
    assert served.blocks[size // BLOCK - 1] == block


@BOTH
@pytest.mark.parametrize("block_size", [512, 1024, 2048, 4096])
def test_the_device_has_the_block_size_that_was_asked_for(attach, use_ioctl, block_size):
    attachment = attach(size=64 * MIB + 4095, block_size=block_size, use_ioctl=use_ioctl)
    queue = DRIVER.devices.queue(attachment.index)
    assert int((queue / "logical_block_size").read_text()) == block_size
    assert DRIVER.devices.size(attachment.index) == (64 * MIB + 4095) // block_size * block_size


@BOTH
def test_a_read_only_device_takes_no_write(attach, use_ioctl):
    attachment = attach(flags=FLAGS | READ_ONLY, use_ioctl=use_ioctl)
    with pytest.raises(PermissionError), opened(attachment.device, os.O_RDWR) as fd:
        os.write(fd, bytes(BLOCK))


@BOTH
def test_a_read_only_mark_left_by_an_earlier_user_does_not_stay(attach, use_ioctl):
    earlier = attach(device="/dev/nbd5")
    run("blockdev", "--setro", earlier.device)
    earlier.disconnect()
    attachment = attach(device="/dev/nbd5", use_ioctl=use_ioctl)
    with opened(attachment.device, os.O_RDWR) as fd:
        assert os.write(fd, bytes(BLOCK)) == BLOCK


def test_a_device_attached_by_netlink_shows_its_cookie(attach):
    attachment = attach(cookie="ein Keks")
    assert DRIVER.devices.backend(attachment.index) == "ein Keks"
    assert attachment.method == "netlink"


def test_netlink_makes_devices_beyond_those_of_the_module(attach):
    attachment = attach(device="/dev/nbd40")
    assert Path(attachment.device).is_block_device()


@BOTH
def test_two_devices_at_once_do_not_share_their_blocks(attach, responder, use_ioctl):
    served = [responder(), responder()]
    devices = [attach(each, use_ioctl=use_ioctl).device for each in served]
    for device, byte in zip(devices, b"ab", strict=True):
        with opened(device, os.O_RDWR) as fd:
            os.pwrite(fd, bytes([byte]) * BLOCK, 0)
            os.fsync(fd)
    assert [each.blocks[0][:1] for each in served] == [b"a", b"b"]


@BOTH
def test_the_partitions_are_there_when_the_attach_returns(attach, responder, use_ioctl):
    attachment = attach(responder(partition_table()), use_ioctl=use_ioctl)
    assert Path(f"/sys/block/nbd{attachment.index}/nbd{attachment.index}p1/size").exists()


@BOTH
def test_a_device_in_use_is_refused_with_its_process(attach, use_ioctl):
    device = attach(use_ioctl=use_ioctl).device
    for again in (False, True):
        message = refusal(lambda again=again: attach(device=device, use_ioctl=again))
        assert message == f"{device} is already in use (by process {os.getpid()})"


def test_a_free_device_that_is_open_for_a_moment_is_waited_for(attach):
    fd = os.open("/dev/nbd6", os.O_RDONLY)
    threading.Timer(0.5, os.close, [fd]).start()
    assert attach(device="/dev/nbd6").device == "/dev/nbd6"


@BOTH
def test_a_refused_attach_leaves_the_device_free(attach, use_ioctl):
    message = refusal(lambda: attach(device="/dev/nbd7", block_size=3, use_ioctl=use_ioctl))
    assert message == "cannot attach /dev/nbd7: Invalid argument"
    assert attach(device="/dev/nbd7", use_ioctl=not use_ioctl).device == "/dev/nbd7"


@BOTH
def test_an_attach_that_fails_when_the_device_lives_leaves_it_free(attach, use_ioctl):
    def ioctl_without_roset(fd: int, request: int, argument: int) -> None:
        if request == BLKROSET:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        ioctl(fd, request, argument)

    driver = NbdDriver(ioctls=NbdIoctls(ioctl_without_roset))
    refusal(lambda: attach(driver=driver, device="/dev/nbd7", use_ioctl=use_ioctl))
    assert DRIVER.devices.connected(7) is None
    assert attach(device="/dev/nbd7", use_ioctl=use_ioctl).device == "/dev/nbd7"


def test_the_kernels_own_words_come_with_its_refusal():
    class ShortIndex:
        def encode(self) -> bytes:
            return encode_attribute(1, b"ab")

    with NbdFamily() as family, pytest.raises(OSError) as refused:
        family.connect(ShortIndex())  # type: ignore[arg-type]
    assert refused.value.strerror == "Attribute failed policy validation"


@BOTH
def test_who_is_not_root_is_told_so(use_ioctl):
    attach = (
        "import os, socket; from rbdnbd.kernel import *\n"
        "os.setgroups([]); os.setuid(65534)\n"  # only now: the sources may be root's alone
        "try: NbdDriver().attach(socket.socketpair()[0], size=1 << 20, block_size=512, flags=1,"
        f" device='/dev/nbd0', use_ioctl={use_ioctl})\n"
        "except RbdnbdError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", attach], capture_output=True, text=True)
    assert done.stdout == "cannot attach /dev/nbd0: this needs root (CAP_SYS_ADMIN)\n", done.stderr


@BOTH
def test_a_tuned_device_asks_for_a_whole_object_at_once(attach, responder, use_ioctl):
    served = responder()
    attachment = attach(served, use_ioctl=use_ioctl)
    tune(DRIVER.devices, attachment.index, 4 * MIB)
    with opened(attachment.device, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4 * MIB) as room:
        os.preadv(fd, [room], 0)
    assert served.saw(READ, 4 * MIB)


def test_a_signal_does_not_end_a_device_attached_by_ioctl(attach):
    attachment = attach(use_ioctl=True)
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        (thread,) = (each for each in threading.enumerate() if each.name == "nbd0")
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: seen, 5, "the signal's arrival")
        assert not attachment.wait_released(0.5)
    finally:
        signal.signal(signal.SIGUSR1, before)


@BOTH
def test_a_release_writes_out_what_is_cached_flushes_and_says_goodbye(
    attach, responder, use_ioctl, monkeypatch
):
    monkeypatch.setattr(release, "RELEASE_LIMIT", 0.5)
    served = responder()
    attachment = attach(served, use_ioctl=use_ioctl)
    with opened(attachment.device, os.O_RDWR) as fd:  # whose last close would write it out, too
        os.pwrite(fd, b"x" * 4096, 0)
        message = refusal(lambda: DRIVER.release(attachment.index))
    assert message == (
        f"{attachment.device} is disconnected but not free: another process has it open"
    )
    kinds = [kind for kind, _, _ in served.requests]
    assert served.blocks[0] == b"x" * BLOCK
    assert kinds.index(WRITE) < kinds.index(FLUSH) < kinds.index(DISC)


@BOTH
@pytest.mark.parametrize("by_netlink", [True, False], ids=["by-netlink", "by-ioctl"])
def test_a_device_is_released_in_either_way_however_it_was_attached(attach, use_ioctl, by_netlink):
    attachment = attach(use_ioctl=use_ioctl)
    driver = DRIVER if by_netlink else NbdDriver(open_family=without_family)
    driver.release(attachment.index)
    assert attachment.wait_released(5)
    assert DRIVER.devices.connected(attachment.index) is None
    assert attach(device=attachment.device, use_ioctl=use_ioctl).device == attachment.device


def test_a_device_that_is_released_again_is_said_not_to_be_attached(attach):
    attachment = attach()
    DRIVER.release(attachment.index)
    assert refusal(lambda: DRIVER.release(attachment.index)) == (
        f"{attachment.device} is not attached"
    )


@BOTH
def test_a_mounted_device_is_not_released(attach, use_ioctl, tmp_path):
    attachment = attach(use_ioctl=use_ioctl)
    with mounted(attachment.device, tmp_path):
        message = refusal(lambda: DRIVER.release(attachment.index))
        assert message == (
            f"{attachment.device} is mounted on {tmp_path}: unmount it first, or use --force"
        )
        (tmp_path / "still").write_text("alive")
    DRIVER.release(attachment.index)


def test_a_device_with_a_mounted_partition_is_not_released(attach, responder, tmp_path):
    attachment = attach(responder(partition_table()))
    partition = f"{attachment.device}p1"
    with mounted(partition, tmp_path):
        message = refusal(lambda: DRIVER.release(attachment.index))
    assert message == f"{partition} is mounted on {tmp_path}: unmount it first, or use --force"


def test_a_swap_area_is_not_released(attach):
    attachment = attach()
    run("mkswap", attachment.device)
    run("swapon", attachment.device)
    try:
        message = refusal(lambda: DRIVER.release(attachment.index))
    finally:
        run("swapoff", attachment.device)
    device = attachment.device
    assert message == (
        f"{device} is in use as swap space: run swapoff {device} first, or use --force"
    )


def test_a_device_that_someone_has_claimed_is_not_released(attach):
    attachment = attach()
    with opened(attachment.device, os.O_RDONLY | os.O_EXCL):
        message = refusal(lambda: DRIVER.release(attachment.index))
    assert message == (
        f"{attachment.device} is in use by another process or mount namespace: "
        "end that first, or use --force"
    )


@BOTH
def test_force_disconnects_a_mounted_device_and_writes_out_its_files(
    attach, responder, use_ioctl, tmp_path, caplog
):
    served = responder()
    attachment = attach(served, use_ioctl=use_ioctl)
    with mounted(attachment.device, tmp_path):
        (tmp_path / "file").write_bytes(b"unwritten".ljust(BLOCK))
        DRIVER.release(attachment.index, force=True)
        assert b"unwritten".ljust(BLOCK) in served.blocks.values()
        assert f"{attachment.device} is disconnected but not free" in caplog.text
    wait_until(lambda: DRIVER.devices.connected(attachment.index) is None, 5, "a free device")


def test_a_forced_release_does_not_wait_for_a_silent_server(attach, responder, monkeypatch, caplog):
    monkeypatch.setattr(release, "RELEASE_LIMIT", 0.5)
    served = responder()
    attachment = attach(served)
    with opened(attachment.device, os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 4096, 0)
        served.silent = True
        refusal(lambda: DRIVER.release(attachment.index, force=True, flush_limit=0.5))
        assert "is disconnected before all of it was written" in caplog.text


def test_a_device_attached_by_ioctl_is_released_when_its_server_leaves(attach, responder):
    served = responder()
    attachment = attach(served, use_ioctl=True)
    served.close()
    assert attachment.wait_released(5)
    wait_until(lambda: DRIVER.devices.connected(attachment.index) is None, 5, "a free device")


def test_a_device_attached_by_netlink_stays_when_its_server_leaves(attach, responder):
    served = responder()
    attachment = attach(served)
    served.close()
    assert not attachment.wait_released(0.5)
    attachment.disconnect()
    assert attachment.wait_released(0)
