"""Ceph 18.2's rbd and rbd-nbd of Debian 13, and ours beside them on Python 3.13 and librbd 18.2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed import places
from tests.kernel.test_map import run
from tests.support.debian13 import Debian13, debian13
from tests.support.rbd_nbd import LISTS, Done, Run, printed, refused

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]
Rbd = Callable[..., str]


@pytest.fixture(scope="module")
def newer(ceph_conf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian13]:
    """Debian 13."""
    root = places.debian13(print)
    with debian13(root, ceph_conf, tmp_path_factory.mktemp("debian13")) as found:
        yield found


def test_it_is_ceph_18(newer: Debian13) -> None:
    version = printed(newer.stock("--version"))
    assert version.startswith("ceph version 18.2.")
    assert printed(newer.ours("--version")) == version


@pytest.fixture
def snapshot(image: MakeImage, rbd: Rbd) -> Iterator[tuple[str, str]]:
    """An image with a snapshot that can be named by its id only: one of a group."""
    spec = image("16M")
    rbd("group", "create", "rbd/together")
    rbd("group", "image", "add", "rbd/together", spec)
    rbd("group", "snap", "create", "rbd/together@monday")
    (found,) = json.loads(rbd("snap", "ls", "--all", "--format", "json", spec))
    yield spec, str(found["id"])
    rbd("group", "rm", "rbd/together")


def test_rbd_device_maps_and_unmaps_a_snapshot_by_its_id(
    newer: Debian13, snapshot: tuple[str, str]
) -> None:
    spec, number = snapshot
    by_id = ("-t", "nbd", "--snap-id", number)
    options = ("-o", "notrim,io-timeout=0", "--cookie", "one", "--show-cookie")
    device, _ = printed(newer.rbd("device", "map", *by_id, *options, spec)).split()
    queue = Path(f"/sys/block/{Path(device).name}")
    assert run("blockdev", "--getro", device) == "1\n"
    assert (queue / "queue/discard_max_bytes").read_text() == "0\n"
    with open(device, "r+b", buffering=0) as disk, pytest.raises(PermissionError):
        disk.write(bytes(4096))
    (listed,) = json.loads(printed(newer.rbd("device", "list", "-t", "nbd", "--format", "json")))
    assert (listed["snap"], listed["device"]) == (f"@{number}", device)
    head = newer.rbd("device", "unmap", "-t", "nbd", spec)
    assert head.status != 0
    assert head.err.startswith(f"rbd-nbd: {spec} is not mapped\n")
    printed(newer.rbd("device", "detach", *by_id, spec))
    attach = ("--device", device, "--cookie", "one")
    assert printed(newer.rbd("device", "attach", *by_id, *attach, spec)) == f"{device}\n"
    printed(newer.rbd("device", "unmap", *by_id, spec))
    assert not (queue / "pid").exists()
    # Ceph's forgets that a snapshot cannot be written when it is named by its id.
    device = printed(newer.stock("map", "--snap-id", number, "--try-netlink", spec)).strip()
    assert run("blockdev", "--getro", device) == "0\n"
    printed(newer.stock("unmap", "--snap-id", number, spec))


def test_the_words_of_18_are_ours_too(newer: Debian13) -> None:
    for words in (
        "map rbd/i@s --snap-id 1",
        "unmap rbd/i@s --snap-id 1",
        "map rbd/i --snap-id x",
        "map rbd/i --snap-id -1",
        "map rbd/i --encryption-format luks3",
        "map rbd/i --encryption-format luks1",
        "map rbd/i --notrim --foo",
        "list-mapped --notrim --format=foo",
    ):
        ours, stock = newer.ours(*words.split()), newer.stock(*words.split())
        assert ours == stock, words
        assert ours.status == 1, words
    unmap = ("unmap", "rbd/i", "--snap-id", "3")
    assert newer.stock(*unmap) == refused("rbd/i is not mapped")
    assert newer.ours(*unmap) == refused("rbd/i@3 is not mapped")


def test_the_layers_of_a_clone_are_opened_with_a_format_each(
    newer: Debian13, image: MakeImage, rbd: Rbd, tmp_path: Path
) -> None:
    base = image("64M")
    clone = f"{base}-clone"
    secrets = {name: tmp_path / name for name in ("luks1", "luks2")}
    for name, secret in secrets.items():
        secret.write_text(f"the secret of {name}")

    def mapped(program: Run, spec: str, *formats: str) -> str:
        options = [
            word
            for name in formats
            for word in (
                *("--encryption-format", name),
                *("--encryption-passphrase-file", str(secrets[name])),
            )
        ]
        return printed(program("map", spec, "--try-netlink", *options)).strip()

    printed(newer.rbd("encryption", "format", base, "luks1", str(secrets["luks1"])))
    device = mapped(newer.ours, base, "luks1")
    write(device, 0, b"of the base")
    printed(newer.ours("unmap", base))
    rbd("snap", "create", "--no-progress", f"{base}@s")
    rbd("snap", "protect", f"{base}@s")
    printed(newer.rbd("clone", f"{base}@s", clone))
    try:
        printed(newer.rbd("encryption", "format", clone, "luks2", str(secrets["luks2"])))
        device = mapped(newer.ours, clone, "luks2", "luks1")
        assert run("blockdev", "--getss", device) == "4096\n"
        assert read(device, 0, 11) == b"of the base"
        write(device, 8192, b"of the clone")
        printed(newer.ours("unmap", device))
        device = mapped(newer.stock, clone, "luks2", "luks1")
        assert read(device, 0, 11) == b"of the base"
        assert read(device, 8192, 12) == b"of the clone"
        printed(newer.stock("unmap", device))
    finally:
        rbd("rm", "--no-progress", clone)
        rbd("snap", "unprotect", f"{base}@s")


def write(device: str, offset: int, data: bytes) -> None:
    with open(device, "r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), data.ljust(4096), offset)


def read(device: str, offset: int, length: int) -> bytes:
    with open(device, "rb", buffering=0) as disk:
        return os.pread(disk.fileno(), length, offset)


def test_a_device_goes_from_debian_12_to_13_and_is_listed_alike(
    newer: Debian13, ours: Run, image: MakeImage
) -> None:
    spec = image("16M")
    cookie = ("--device", "/dev/nbd2", "--cookie", "the same")
    printed(ours("map", spec, *cookie))
    write("/dev/nbd2", 0, b"before the upgrade")
    printed(ours("detach", "/dev/nbd2"))
    printed(newer.ours("attach", spec, *cookie))
    assert read("/dev/nbd2", 0, 18) == b"before the upgrade"
    (listed,) = json.loads(printed(newer.ours("list-mapped", "--format", "json")))
    printing = [printed(newer.ours(*words)) for words in LISTS]
    printed(ours("unmap", spec))
    printed(newer.stock("map", spec, *cookie, "--try-netlink"))
    (theirs,) = json.loads(printed(newer.stock("list-mapped", "--format", "json")))
    swapped = [text.replace(str(listed["id"]), str(theirs["id"])) for text in printing]
    assert [printed(newer.stock(*words)) for words in LISTS] == swapped
    assert printed(newer.stock("unmap", "/dev/nbd2")) == ""
    assert newer.ours("list-mapped") == Done(0, "", "")
