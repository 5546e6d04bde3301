"""Which mapping is meant, and the end of it: real control sockets, a make-believe driver."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rbdnbd import mapped as room
from rbdnbd.control import Control, Document
from rbdnbd.errors import Busy, RbdnbdError, UsageError
from rbdnbd.kernel import NbdDriver
from rbdnbd.mapped import left_behind, mapped, spec_of, unmap
from rbdnbd.netlink import FamilyNotFoundError
from rbdnbd.record import Ownership, Record
from rbdnbd.spec import ClusterOptions, ImageSpec
from tests.support.nbd_driver import FakeDriver

GONE = 1 << 22
"""No process has this id: the kernel counts below PID_MAX_LIMIT."""


def no_family() -> None:
    raise FamilyNotFoundError(errno.ENOENT, "no generic-netlink family nbd")


class Host:
    """A run directory and a driver, with mappings that answer as long as the test lasts."""

    def __init__(self, fake: FakeDriver, run_dir, stack: ExitStack) -> None:
        self.fake, self.run_dir, self._stack = fake, run_dir, stack
        self.driver = NbdDriver(fake.devices, fake.ioctls, no_family)
        self.said: list[str] = []
        self.blocklisted = False

    def device(self, index: int) -> str:
        return str(self.fake.devices.path(index))

    def answers(self, index: int, spec: str, pid: int = GONE) -> None:
        """Have somebody say that the image is on the device."""
        image = ImageSpec.parse(spec)
        document: Document = {
            "id": pid,
            "pool": image.pool,
            "namespace": image.namespace,
            "image": image.image,
            "snap": image.snap,
            "snap_id": image.snap_id,
            "device": self.device(index),
            "cookie": f"cookie of {spec}",
            "in_flight": [],
        }
        self._stack.enter_context(
            Control(lambda: document | {"blocklisted": self.blocklisted}, self.run_dir)
        )

    def maps(self, index: int, spec: str, pid: int = GONE) -> None:
        """Have the kernel and a process agree that the image is on the device."""
        self.fake.connect(index, 1 << 20)
        self.answers(index, spec, pid)

    def loses(self, index: int, spec: str) -> None:
        """Have a process die that has served the image on the device."""
        self.fake.connect(index, 1 << 20)
        self.fake.show(index, "backend", f"cookie of {spec}")
        owner = Ownership(f"cookie of {spec}", self.run_dir)
        details = {"image_id": "", "address": "", "cluster": ClusterOptions(), "options": {}}
        image = ImageSpec.parse(spec)
        owner.write(Record(cookie=f"cookie of {spec}", spec=image, **details))
        owner.give_up()

    def left_behind(self, spec: str) -> str | None:
        image = ImageSpec.parse(spec)
        return left_behind(image, ClusterOptions(), self.fake.devices, self.run_dir)

    def listed(self) -> list[str]:
        return [
            f"{document['device']} {spec_of(document)}"
            for document in mapped(self.fake.devices, self.run_dir)
        ]

    def unmap(self, target: str, *, force: bool = False) -> None:
        unmap(
            target,
            ClusterOptions(),
            force=force,
            say=self.said.append,
            driver=self.driver,
            run_dir=self.run_dir,
        )

    def refusal(self, target: str, *, force: bool = False) -> str:
        with pytest.raises(RbdnbdError) as refused:
            self.unmap(target, force=force)
        return refused.value.message

    def connected(self, index: int) -> bool:
        return self.fake.devices.connected(index) is not None


@pytest.fixture
def host(tmp_path, tmp_path_factory) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(FakeDriver(tmp_path, count=12), tmp_path_factory.mktemp("run"), stack)


def test_a_device_that_process_and_kernel_agree_on_is_mapped(host):
    host.maps(0, "rbd/ns/vol@s")
    assert host.listed() == [f"{host.device(0)} rbd/ns/vol@s"]


def test_a_device_that_the_kernel_has_let_go_is_not_mapped_whatever_its_process_says(host):
    host.answers(0, "rbd/vol")
    assert host.listed() == []


def test_a_device_that_nobody_answers_for_is_not_ours(host):
    host.fake.connect(0, 1 << 20)
    assert host.listed() == []


def test_the_mappings_are_in_the_order_of_their_devices(host):
    for index, spec in ((10, "rbd/a"), (2, "rbd/b")):
        host.maps(index, spec)
    assert host.listed() == [f"{host.device(2)} rbd/b", f"{host.device(10)} rbd/a"]


def test_a_device_is_unmapped_by_its_path(host):
    host.maps(0, "rbd/vol")
    host.maps(1, "rbd/other")
    host.unmap(host.device(0))
    assert (host.connected(0), host.connected(1)) == (False, True)


@pytest.mark.parametrize("spec", ["rbd/vol", "rbd/ns/vol", "rbd/vol@s", "my pool/my vol"])
def test_a_device_is_unmapped_by_the_name_of_its_image(host, spec):
    host.maps(0, "rbd/another")
    host.maps(1, spec)
    host.unmap(spec)
    assert (host.connected(0), host.connected(1)) == (True, False)


def test_an_image_without_a_pool_is_the_one_in_the_default_pool(host, monkeypatch):
    monkeypatch.setattr(room, "default_pool", lambda options: "blue")
    host.maps(0, "rbd/vol")
    host.maps(1, "blue/vol")
    host.unmap("vol")
    assert (host.connected(0), host.connected(1)) == (True, False)


def test_an_image_with_a_pool_needs_no_ceph_to_be_unmapped(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "rados", None)
    host.maps(0, "rbd/vol")
    host.unmap("rbd/vol")
    assert not host.connected(0)


def test_a_device_that_is_not_mapped_is_refused(host):
    assert host.refusal(host.device(0)) == f"{host.device(0)} is not mapped"


def test_a_device_that_is_not_mapped_is_refused_by_force_as_well(host):
    assert host.refusal(host.device(0), force=True) == f"{host.device(0)} is not mapped"


@pytest.mark.parametrize("other", ["rbd/vol", "rbd/ns/vol@s", "rbd/ns/volume", "blue/ns/vol"])
def test_another_image_is_not_taken_for_the_one_that_is_named(host, other):
    host.maps(0, other)
    assert host.refusal("rbd/ns/vol") == "rbd/ns/vol is not mapped"
    assert host.connected(0)


def test_an_image_on_two_devices_is_refused_with_both(host):
    host.maps(0, "rbd/vol")
    host.maps(1, "rbd/vol")
    assert host.refusal("rbd/vol") == (
        f"rbd/vol is mapped to {host.device(0)} and {host.device(1)}: name the device"
    )
    assert host.connected(0)
    assert host.connected(1)


def test_either_device_of_an_image_on_two_is_unmapped_by_its_path(host):
    host.maps(0, "rbd/vol")
    host.maps(1, "rbd/vol")
    host.unmap(host.device(1))
    assert (host.connected(0), host.connected(1)) == (True, False)


def test_a_strangers_device_is_refused(host):
    host.fake.connect(0, 1 << 20, pid=4711)
    assert host.refusal(host.device(0)) == (
        f"{host.device(0)} is connected, but no rbdnbd process answers for it (process 4711 "
        "attached it): --force disconnects it all the same"
    )
    assert host.connected(0)


def test_a_strangers_device_is_disconnected_by_force(host):
    host.fake.connect(0, 1 << 20, pid=4711)
    host.unmap(host.device(0), force=True)
    assert not host.connected(0)


@pytest.mark.parametrize("target", ["nbd", "nbd0p1", "sda", "rbd/rbd/vol"])
def test_a_path_that_is_no_nbd_device_is_a_mistake_of_the_command_line(host, target):
    with pytest.raises(UsageError, match="invalid device path"):
        host.unmap(f"{host.fake.devices.dev}/{target}")


def test_a_malformed_image_is_a_mistake_of_the_command_line(host):
    with pytest.raises(UsageError, match="invalid spec 'rbd//vol'"):
        host.unmap("rbd//vol")


def test_unmap_returns_when_the_process_has_closed_the_image(host):
    pid_file = host.fake.devices.sys / "block/nbd0/pid"
    script = "import os, sys, time\nwhile os.path.exists(sys.argv[1]): time.sleep(0.02)"
    with subprocess.Popen([sys.executable, "-c", script, str(pid_file)]) as process:
        host.maps(0, "rbd/vol", pid=process.pid)
        try:
            host.unmap("rbd/vol")
            assert process.poll() == 0
        finally:
            process.kill()
    assert host.said == []


def test_a_process_that_keeps_the_image_open_is_said_at_first_and_refused_at_last(
    host, monkeypatch
):
    monkeypatch.setattr(room, "EXIT_SECONDS", 0.1)
    host.maps(0, "rbd/vol", pid=os.getpid())
    assert host.refusal("rbd/vol") == (
        f"{host.device(0)} is free, but after 0 s process {os.getpid()} still has rbd/vol open "
        "(are the OSDs up?)"
    )
    assert host.said == [f"waiting for process {os.getpid()} to flush and close rbd/vol"]
    assert not host.connected(0)


def test_by_force_a_process_that_does_not_end_is_killed_and_its_record_removed(host, monkeypatch):
    """Seen to fail without the kill, and without the removal."""
    monkeypatch.setattr(room, "FORCED_SECONDS", 0.1)
    host.loses(0, "rbd/vol")
    with subprocess.Popen(["sleep", "60"]) as process:
        host.answers(0, "rbd/vol", pid=process.pid)
        host.unmap("rbd/vol", force=True)
        assert process.wait(10) == -signal.SIGKILL
    assert host.said == [
        f"process {process.pid} cannot flush and close rbd/vol: it is killed, "
        "its newest writes may be lost"
    ]
    assert not host.connected(0)
    assert not list(host.run_dir.glob("*.json"))


def test_only_the_process_of_the_device_that_is_named_is_waited_for(host, monkeypatch):
    monkeypatch.setattr(room, "EXIT_SECONDS", 0)
    host.maps(0, "rbd/vol", pid=os.getpid())
    host.maps(1, "rbd/other")
    host.unmap(host.device(1))
    assert host.said == []


@pytest.fixture
def mounted(host, monkeypatch) -> Host:
    """The host, with a device that is mounted: every exclusive open fails."""

    def open_device(path: Path, flags: int = 0) -> int:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr("rbdnbd.release.open_device", open_device)
    host.maps(0, "rbd/vol")
    (host.fake.devices.proc / "self/mountinfo").write_text(
        f"40 21 43:0 / /mnt rw - ext4 {host.device(0)} rw\n"
    )
    return host


def test_a_device_that_is_mounted_is_not_unmapped(mounted):
    assert mounted.refusal("rbd/vol") == (
        f"{mounted.device(0)} is mounted on /mnt: unmount it first, or use --force"
    )
    assert mounted.connected(0)


def test_nothing_is_said_to_be_lost_of_a_blocklisted_mapping_that_stays_mounted(mounted):
    """Seen to fail with any refusal taken for a failed flush."""
    mounted.blocklisted = True
    assert "is mounted on /mnt" in mounted.refusal("rbd/vol")
    assert mounted.said == []
    assert mounted.connected(0)


def test_a_device_that_is_mounted_is_unmapped_by_force(mounted):
    mounted.unmap("rbd/vol", force=True)
    assert not mounted.connected(0)


def test_a_device_that_has_a_new_owner_is_not_taken_for_its_old_one(host):
    """Between the disconnect and the closing of its socket the old process answers still."""
    host.answers(0, "rbd/old")
    host.maps(0, "rbd/new")
    backend = host.fake.devices.sys / "block/nbd0/backend"
    backend.write_text("cookie of rbd/new\n")
    assert host.listed() == [f"{host.device(0)} rbd/new"]


def test_the_device_of_a_dead_process_is_found_by_its_image(host):
    host.loses(0, "rbd/other")
    host.loses(3, "rbd/vol")
    assert host.left_behind("rbd/vol") == host.device(3)


def test_an_image_that_nobody_has_mapped_has_left_no_device(host):
    host.loses(0, "rbd/other")
    assert host.left_behind("rbd/vol") is None


def test_an_image_that_a_living_process_has_mapped_is_busy(host):
    host.maps(2, "rbd/vol")
    with pytest.raises(Busy) as refused:
        host.left_behind("rbd/vol")
    assert refused.value.message == f"rbd/vol is mapped to {host.device(2)} by process {GONE}"


def test_a_device_that_is_just_being_attached_is_unmapped_when_its_process_answers(
    host, monkeypatch
):
    """Seen to fail ("is not mapped") with devices that were looked for only among those left."""
    host.loses(0, "rbd/vol")
    owner = Ownership("cookie of rbd/vol", host.run_dir)

    def owned(cookie: str, run_dir: Path) -> bool:
        host.answers(0, "rbd/vol")
        return True

    monkeypatch.setattr(room, "owned", owned)
    host.unmap("rbd/vol")
    owner.give_up()
    assert not host.connected(0)


def test_a_process_that_has_a_device_and_does_not_answer_is_refused_at_last(host, monkeypatch):
    """Seen to fail with devices that were looked for only among those left."""
    monkeypatch.setattr(room, "SETTLE_SECONDS", 0.1)
    host.loses(0, "rbd/vol")
    owner = Ownership("cookie of rbd/vol", host.run_dir)
    assert "no rbdnbd process answers for it" in host.refusal("rbd/vol")
    owner.give_up()
    assert host.connected(0)


def test_nobody_attaches_a_device_while_it_is_unmapped(host, monkeypatch):
    """Seen to fail with a record that was taken when the device was free already."""
    host.loses(0, "rbd/vol")
    release = host.driver.release

    def look(*arguments: object, **options: object) -> None:
        with pytest.raises(Busy):
            Ownership("cookie of rbd/vol", host.run_dir)
        release(*arguments, **options)

    monkeypatch.setattr(host.driver, "release", look)
    host.unmap("rbd/vol")
    assert list(host.run_dir.iterdir()) == []


def test_a_device_that_could_not_be_unmapped_can_still_be_attached(host, monkeypatch):
    """Seen to fail with a record that was removed whatever came out."""
    host.loses(0, "rbd/vol")
    monkeypatch.setattr(
        "rbdnbd.release.open_device", lambda *_: os.open("/nowhere/at/all", os.O_RDONLY)
    )
    host.refusal("rbd/vol")
    assert Ownership("cookie of rbd/vol", host.run_dir).record is not None


def test_a_record_that_is_removed_meanwhile_is_not_made_anew(host, monkeypatch):
    """Seen to fail with an empty file for which there was no device."""
    host.loses(0, "rbd/vol")
    Ownership("cookie of rbd/vol", host.run_dir).remove()
    monkeypatch.setattr(room, "find", lambda *_: object())
    assert "no rbdnbd process answers for it" in host.refusal(host.device(0))
    assert list(host.run_dir.iterdir()) == []
