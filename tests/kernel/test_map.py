"""rbdnbd as a user runs it: map, list, mount, verify, unmap, with the kernel as the client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

ways = pytest.mark.parametrize(
    "way", [(), ("--ioctl",), ("--io-engine", "events")], ids=["netlink", "ioctl", "events"]
)

Rbd = Callable[..., str]
MakeImage = Callable[..., str]
Map = Callable[..., str]


def run(*argv: str) -> str:
    """Run a command that has to succeed, and return what it prints."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def map_image(rbdnbd: Command) -> Map:
    """Map an image and return its device."""

    def map_image(*arguments: str) -> str:
        done = rbdnbd("map", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("/dev/nbd")
        assert done.stdout.endswith("\n")
        return done.stdout.strip()

    return map_image


@pytest.fixture
def unmap(rbdnbd: Command) -> Callable[[str], None]:
    """Unmap, silently, a device or an image."""

    def unmap(target: str) -> None:
        done = rbdnbd("unmap", target)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    return unmap


@contextmanager
def mounted(device: str, directory: Path, *options: str) -> Iterator[Path]:
    """Mount a device for the time of a `with`."""
    directory.mkdir(exist_ok=True)
    run("mount", *options, device, str(directory))
    try:
        yield directory
    finally:
        run("umount", str(directory))


def mapping(rbdnbd: Command, device: str) -> dict[str, object]:
    """Return what list-mapped says of a device."""
    (found,) = (
        entry
        for entry in json.loads(rbdnbd("list-mapped", "--format", "json").stdout)
        if entry["device"] == device
    )
    return dict(found)


@ways
@pytest.mark.parametrize(("filesystem", "size"), [("ext4", "48M"), ("xfs", "320M")])
def test_a_file_survives_unmap_and_map(
    way: tuple[str, ...],
    filesystem: str,
    size: str,
    image: MakeImage,
    map_image: Map,
    unmap: Callable[[str], None],
    tmp_path: Path,
) -> None:
    spec, noise = image(size), os.urandom(4 << 20)
    device = map_image(spec, *way)
    run(f"mkfs.{filesystem}", "-q", device)
    with mounted(device, tmp_path / "mnt") as mnt:
        (mnt / "noise").write_bytes(noise)
    unmap(device)
    device = map_image(spec, *way)
    with mounted(device, tmp_path / "mnt") as mnt:
        assert (mnt / "noise").read_bytes() == noise
    unmap(spec)


@ways
def test_what_is_written_to_the_device_is_bit_for_bit_what_rbd_exports(
    way: tuple[str, ...],
    image: MakeImage,
    map_image: Map,
    unmap: Callable[[str], None],
    rbd: Rbd,
    tmp_path: Path,
) -> None:
    spec, noise = image("32M"), os.urandom(12 << 20)
    device = map_image(spec, *way)
    with open(device, "r+b", buffering=0) as disk:
        assert os.pwrite(disk.fileno(), noise, 5 << 20) == len(noise)
    unmap(device)
    rbd("export", "--no-progress", spec, str(tmp_path / "export"))
    exported = (tmp_path / "export").read_bytes()
    assert exported == bytes(5 << 20) + noise + bytes(15 << 20)


@ways
def test_fio_verifies_random_writes_trims_and_reads_through_the_kernel(
    way: tuple[str, ...], image: MakeImage, map_image: Map, unmap: Callable[[str], None]
) -> None:
    device = map_image(image("64M"), *way)
    run(
        *("fio", "--name=verify", f"--filename={device}", "--direct=1", "--ioengine=libaio"),
        *("--rw=randwrite", "--bsrange=4k-256k", "--iodepth=32", "--size=64m", "--io_size=32m"),
        *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
    )
    unmap(device)


def test_two_images_are_mapped_at_once_and_kept_apart(
    image: MakeImage, map_image: Map, unmap: Callable[[str], None], rbdnbd: Command
) -> None:
    specs = [image("16M"), image("16M")]
    devices = [map_image(spec) for spec in specs]
    for number, device in enumerate(devices):
        with open(device, "r+b", buffering=0) as disk:
            disk.write(bytes([number + 1]) * 4096)
            os.fsync(disk.fileno())
    for number, device in enumerate(devices):
        with open(device, "rb") as disk:
            assert disk.read(4096) == bytes([number + 1]) * 4096
    listed = json.loads(rbdnbd("list-mapped", "--format", "json").stdout)
    assert [f"{entry['pool']}/{entry['image']}" for entry in listed] == specs
    for target in (devices[0], specs[1]):
        unmap(target)


def test_list_mapped_prints_a_table_and_nothing_when_nothing_is_mapped(
    image: MakeImage, map_image: Map, unmap: Callable[[str], None], rbdnbd: Command
) -> None:
    spec = image("16M")
    device = map_image(spec)
    found = mapping(rbdnbd, device)
    header, row = rbdnbd("list-mapped").stdout.splitlines()
    assert header.split() == ["id", "pool", "namespace", "image", "snap", "device", "cookie"]
    assert row.split() == [str(found["id"]), *spec.split("/"), "-", device, str(found["cookie"])]
    unmap(spec)
    assert rbdnbd("list-mapped").stdout == ""
    assert rbdnbd("list-mapped", "--format", "json").stdout == "[]\n"


def test_a_mounted_device_is_not_unmapped_but_by_force(
    image: MakeImage, map_image: Map, rbdnbd: Command, tmp_path: Path
) -> None:
    device = map_image(image("32M"))
    run("mkfs.ext4", "-q", device)
    with mounted(device, tmp_path / "mnt") as mnt:
        refused = rbdnbd("unmap", device)
        assert refused.returncode == 1
        assert refused.stderr == (
            f"rbdnbd: {device} is mounted on {mnt}: unmount it first, or use --force\n"
        )
        (mnt / "still").write_text("writable")
        os.sync()
        assert rbdnbd("unmap", "--force", device).returncode == 0
    assert rbdnbd("list-mapped").stdout == ""


def test_a_device_under_a_mounted_partition_is_held_too(
    image: MakeImage, map_image: Map, unmap: Callable[[str], None], rbdnbd: Command, tmp_path: Path
) -> None:
    spec = image("64M")
    device = map_image(spec)
    subprocess.run(["sfdisk", "-q", device], input="size=16M\nsize=16M\n", text=True, check=True)
    unmap(device)
    device = map_image(spec)
    assert Path(f"{device}p1").is_block_device()
    assert Path(f"{device}p2").is_block_device()
    run("mkfs.ext4", "-q", f"{device}p2")
    with mounted(f"{device}p2", tmp_path / "mnt"):
        refused = rbdnbd("unmap", spec)
        assert refused.returncode == 1
        assert f"{device}p2 is mounted on {tmp_path}/mnt" in refused.stderr
    unmap(spec)


def test_blkdiscard_gives_the_space_back_to_the_cluster(
    image: MakeImage, map_image: Map, unmap: Callable[[str], None], rbd: Rbd
) -> None:
    spec = image("32M", "--image-feature", "layering,exclusive-lock,object-map,fast-diff")
    device = map_image(spec)
    run("dd", "if=/dev/urandom", f"of={device}", "bs=4M", "count=8", "oflag=direct")
    assert used(rbd, spec) == 32 << 20
    run("blkdiscard", device)
    assert used(rbd, spec) == 0
    assert Path(device).read_bytes() == bytes(32 << 20)
    unmap(device)


def used(rbd: Rbd, spec: str) -> int:
    """Return the bytes that the cluster has stored of an image."""
    return int(json.loads(rbd("du", "--format", "json", spec))["images"][0]["used_size"])


@pytest.mark.parametrize(("size", "offset"), [("3G", (3 << 30) - 8192), ("3T", (2 << 40) + 4096)])
@ways
def test_images_over_2_gib_and_2_tib_are_reached_to_their_end(
    way: tuple[str, ...],
    size: str,
    offset: int,
    image: MakeImage,
    map_image: Map,
    unmap: Callable[[str], None],
    rbd: Rbd,
) -> None:
    spec = image(size)
    device = map_image(spec, *way)
    expected = int(json.loads(rbd("info", "--format", "json", spec))["size"])
    assert int(run("blockdev", "--getsize64", device)) == expected
    with open(device, "r+b", buffering=0) as disk:
        for place in (offset, expected - 4096):
            os.pwrite(disk.fileno(), b"far away".ljust(4096, b"."), place)
        os.fsync(disk.fileno())
    unmap(device)
    device = map_image(spec, *way)
    with open(device, "rb", buffering=0) as disk:
        for place in (offset, expected - 4096):
            assert os.pread(disk.fileno(), 8, place) == b"far away"
    unmap(device)


@pytest.mark.parametrize("size", ["512", "1024", "2048", "4096"])
def test_the_block_size_is_the_one_asked_for(
    size: str, image: MakeImage, map_image: Map, unmap: Callable[[str], None]
) -> None:
    device = map_image(image("16M"), "--block-size", size)
    assert run("blockdev", "--getss", device).strip() == size
    run("dd", "if=/dev/zero", f"of={device}", f"bs={size}", "count=3", "oflag=direct")
    unmap(device)


@pytest.mark.parametrize("option", ["--read-only", "snapshot"])
def test_read_only_mappings_and_snapshots_refuse_writes(
    option: str, image: MakeImage, map_image: Map, unmap: Callable[[str], None], rbd: Rbd
) -> None:
    spec = image("16M")
    if option == "snapshot":
        rbd("snap", "create", "--no-progress", f"{spec}@before")
        spec += "@before"
        device = map_image(spec)
    else:
        device = map_image("--read-only", spec)
    assert run("blockdev", "--getro", device).strip() == "1"
    with open(device, "r+b", buffering=0) as disk, pytest.raises(PermissionError):
        disk.write(bytes(4096))
    unmap(spec if option == "snapshot" else device)


@pytest.mark.parametrize(
    ("way", "number"),
    [((), signal.SIGINT), (("--ioctl",), signal.SIGINT), (("--ioctl",), signal.SIGTERM)],
    ids=["netlink-INT", "ioctl-INT", "ioctl-TERM"],
)
def test_a_signal_writes_out_what_is_unwritten_and_leaves_no_lock_or_watcher(
    way: tuple[str, ...],
    number: signal.Signals,
    image: MakeImage,
    map_image: Map,
    rbdnbd: Command,
    rbd: Rbd,
    tmp_path: Path,
) -> None:
    spec = image("16M")
    device = map_image(spec, *way)
    noise = os.urandom(1 << 20)
    with open(device, "r+b") as disk:
        disk.write(noise)  # in the page cache only
    pid = int(str(mapping(rbdnbd, device)["id"]))
    os.kill(pid, number)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60, "the process is gone")
    assert not Path(f"/sys/block/{Path(device).name}/pid").exists()
    assert json.loads(rbd("status", "--format", "json", spec)) == {"watchers": []}
    assert json.loads(rbd("lock", "ls", "--format", "json", spec)) == []
    export = tmp_path / "export"
    rbd("export", "--no-progress", spec, str(export))
    assert export.read_bytes()[: 1 << 20] == noise


def test_map_in_the_foreground_prints_the_device_and_ends_with_the_unmap(
    image: MakeImage, rbdnbd: Command, ceph_conf: Path, unmap: Callable[[str], None]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rbdnbd", "map", "-f", "-c", str(ceph_conf), image("16M")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    device = process.stdout.readline().strip()
    assert device.startswith("/dev/nbd")
    unmap(device)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"is mapped to {device}" in log
