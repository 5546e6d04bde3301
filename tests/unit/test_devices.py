"""What is read from /sys and /proc, and how it is said."""

from __future__ import annotations

import pytest

from rbdnbd.devices import NbdDevices
from rbdnbd.errors import RbdnbdError

BLOCK = "sys/block/nbd0"


@pytest.fixture
def machine(tmp_path):
    """Write files below a root, and see the devices there as those of /."""

    class Machine(NbdDevices):
        def has(self, path: str, text: str) -> None:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

        def mountinfo(self, *lines: str) -> None:
            self.has("proc/self/mountinfo", "\n".join([MOUNTINFO_ROOT, *lines]))

    machine = Machine(sys=tmp_path / "sys", proc=tmp_path / "proc")
    machine.has(f"{BLOCK}/dev", "43:0\n")
    machine.has(f"{BLOCK}/nbd0p1/dev", "43:1\n")
    return machine


MOUNTINFO_ROOT = "21 1 0:20 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/l"


@pytest.mark.parametrize("index", [0, 3, 15, 999999])
def test_the_path_of_a_device_has_its_index(index):
    assert NbdDevices().index(f"/dev/nbd{index}") == index


@pytest.mark.parametrize(
    "path",
    ["/dev/nbd", "/dev/nbd03", "/dev/nbd0p1", "/dev/sda", "nbd0", "/dev/nbd-1", "/dev/nbd1\n",
     "/dev/nbd1000000", "/dev//nbd1", "/dev/nbd\u0663", ""],
)  # fmt: skip
def test_any_other_path_is_refused(path):
    with pytest.raises(RbdnbdError) as refused:
        NbdDevices().index(path)
    assert refused.value.message == f"invalid device path: {path} (expected /dev/nbdN)"


def test_the_driver_is_present_when_sysfs_has_the_module(machine):
    assert not machine.driver_present()
    machine.has("sys/module/nbd/parameters/nbds_max", "16\n")
    assert machine.driver_present()


def test_the_indexes_rise_as_numbers(machine):
    for name in ("nbd10", "nbd2", "nbd33", "nbd4", "sda", "nbdx"):
        machine.has(f"sys/block/{name}/size", "0\n")
    assert machine.indexes() == [0, 2, 4, 10, 33]


def test_a_device_with_a_pid_is_connected(machine):
    machine.has(f"{BLOCK}/pid", "4711\n")
    assert machine.connected(0) == 4711


def test_a_device_without_a_pid_or_without_anything_is_not_connected(machine):
    assert machine.connected(0) is None
    assert machine.connected(7) is None


def test_the_size_is_in_bytes(machine):
    machine.has(f"{BLOCK}/size", f"{(3 << 40) // 512}\n")
    assert machine.size(0) == 3 << 40


def test_a_device_that_is_not_there_has_no_size(machine):
    assert machine.size(7) == 0


def test_the_size_of_a_block_is_the_queues(machine):
    machine.has(f"{BLOCK}/queue/logical_block_size", "4096\n")
    assert (machine.block_size(0), machine.block_size(7)) == (4096, 512)


@pytest.mark.parametrize(("text", "backend"), [("rbd/ein Bild \n", "rbd/ein Bild "), ("\n", None)])
def test_the_backend_is_what_it_was_called_and_none_when_it_has_no_name(machine, text, backend):
    machine.has(f"{BLOCK}/backend", text)
    assert machine.backend(0) == backend


def test_a_device_that_ioctl_attached_has_no_backend(machine):
    assert machine.backend(0) is None


def test_a_free_device_that_is_refused_is_open_elsewhere(machine):
    assert machine.busy(0).message == "/dev/nbd0 is busy: another process has it open"


def test_a_taken_device_names_the_process_and_not_its_thread(machine):
    machine.has(f"{BLOCK}/pid", "4711\n")
    machine.has("proc/4711/status", "Name:\trbdnbd\nTgid:\t4700\nPid:\t4711\n")
    assert machine.busy(0).message == "/dev/nbd0 is already in use (by process 4700)"


def test_a_taken_device_names_the_thread_when_that_is_gone(machine):
    machine.has(f"{BLOCK}/pid", "4711\n")
    assert machine.busy(0).message == "/dev/nbd0 is already in use (by process 4711)"


def test_nothing_holds_a_device_that_nobody_uses(machine):
    machine.mountinfo()
    machine.has("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n")
    assert machine.holder(0) is None


def test_a_mount_holds_the_device(machine):
    machine.mountinfo("40 21 43:0 / /mnt rw - ext4 /dev/disk/by-label/data rw")
    assert machine.holder(0) == "/dev/nbd0 is mounted on /mnt: unmount it first"


def test_a_mounted_partition_is_named(machine):
    machine.mountinfo("40 21 43:1 / /mnt rw shared:2 master:1 - xfs /dev/nbd0p1 rw")
    assert machine.holder(0) == "/dev/nbd0p1 is mounted on /mnt: unmount it first"


def test_a_mount_with_a_device_number_of_its_own_is_found_by_name(machine):
    machine.mountinfo("40 21 0:37 / /mnt rw - btrfs /dev/nbd0 rw")
    assert machine.holder(0) == "/dev/nbd0 is mounted on /mnt: unmount it first"


def test_a_mount_point_with_blanks_is_said_as_it_is(machine):
    machine.mountinfo(r"40 21 43:0 / /mnt/my\040data rw - ext4 /dev/nbd0 rw")
    assert machine.holder(0) == "/dev/nbd0 is mounted on /mnt/my data: unmount it first"


def test_the_mount_of_another_device_holds_nothing(machine):
    machine.mountinfo("40 21 43:10 / /mnt rw - ext4 /dev/nbd01 rw")
    assert machine.holder(0) is None


def test_a_swap_area_holds_the_device(machine):
    machine.mountinfo()
    machine.has("proc/swaps", "Filename\tType\n/dev/nbd0p1    partition\t1048572\t0\t-2\n")
    assert machine.holder(0) == (
        "/dev/nbd0p1 is in use as swap space: run swapoff /dev/nbd0p1 first"
    )


def test_a_device_mapper_target_on_top_is_named(machine):
    machine.has(f"{BLOCK}/holders/dm-3/dm/name", "vg0-data\n")
    assert machine.holder(0) == "/dev/nbd0 is in use by /dev/mapper/vg0-data: remove that first"


def test_any_other_device_on_top_is_named(machine):
    machine.has(f"{BLOCK}/nbd0p1/holders/md0/dev", "9:0\n")
    assert machine.holder(0) == "/dev/nbd0p1 is in use by /dev/md0: remove that first"
