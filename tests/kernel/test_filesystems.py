"""What people keep on a device: a live ext4 through every take-over, snapshots of it, LUKS."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.kernel.test_map import mounted, run
from tests.kernel.test_take_over import process_of, requests, succeed
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

Rbd = Callable[..., str]
MakeImage = Callable[..., str]

HOOK = Path(__file__).resolve().parents[2] / "contrib/rbd-nbd_quiesce"


@pytest.fixture
def device(rbdnbd: Command, image: MakeImage) -> Iterator[str]:
    """An image of 128 MiB with an ext4, mapped."""
    device = succeed(rbdnbd("map", image("128M"), "--reattach-timeout", "120"))
    run("mkfs.ext4", "-q", device)
    yield device
    succeed(rbdnbd("unmap", device))


def test_a_live_ext4_survives_detach_kill_and_replacement_of_its_process(
    rbdnbd: Command, device: str, tmp_path: Path
) -> None:
    with mounted(device, tmp_path / "mnt") as mnt:
        fio = (
            f"fio --name=io --directory={mnt} --rw=randrw --bs=4k --size=8m --ioengine=libaio"
            " --direct=1 --iodepth=8 --fsync=16 --verify=crc32c --verify_backlog=64"
            " --verify_fatal=1 --verify_state_save=0"
        )
        again_and_again = f"until [ -e {tmp_path}/stop ]; do {fio} || exit 1; done"
        writer = subprocess.Popen(
            ["sh", "-c", again_and_again], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            goes_on(device)
            succeed(rbdnbd("detach", device))
            succeed(rbdnbd("attach", "--device", device))
            goes_on(device)
            os.kill(process_of(rbdnbd, device), signal.SIGKILL)
            succeed(rbdnbd("attach", "--device", device))
            goes_on(device)
            succeed(rbdnbd("attach", "--replace", "--device", device))
            goes_on(device)
        finally:
            (tmp_path / "stop").touch()
            said, _ = writer.communicate(timeout=180)
        assert writer.returncode == 0, said.decode()
    run("e2fsck", "-fn", device)


def goes_on(device: str) -> None:
    """Wait until requests are answered."""
    before = requests(device)
    wait_until(lambda: requests(device) > before + 50, 60, "IO goes on")


def test_a_snapshot_with_the_hook_needs_no_recovery(
    rbdnbd: Command, image: MakeImage, rbd: Rbd, tmp_path: Path
) -> None:
    spec = image("64M")
    device = succeed(rbdnbd("map", spec, "--quiesce", "--quiesce-hook", str(HOOK)))
    run("mkfs.ext4", "-q", device)
    with mounted(device, tmp_path / "mnt") as mnt:
        (mnt / "file").write_bytes(b"before the snapshot")
        rbd("snap", "create", "--no-progress", f"{spec}@frozen")
        (mnt / "file").write_bytes(b"and after it is not frozen any more")
    succeed(rbdnbd("unmap", device))
    device = succeed(rbdnbd("map", f"{spec}@frozen"))
    assert "needs_recovery" not in run("dumpe2fs", "-h", device)
    with mounted(device, tmp_path / "mnt", "-o", "ro") as mnt:
        assert (mnt / "file").read_bytes() == b"before the snapshot"
    succeed(rbdnbd("unmap", device))


@pytest.mark.parametrize("form", ["luks1", "luks2"])
def test_an_encrypted_image_is_mapped_in_blocks_of_4096_bytes_and_stored_encrypted(
    form: str, rbdnbd: Command, image: MakeImage, rbd: Rbd, tmp_path: Path
) -> None:
    spec, secret = image("64M"), tmp_path / "passphrase"
    secret.write_text("open sesame")
    rbd("encryption", "format", spec, form, str(secret))
    options = ("--encryption-format", form, "--encryption-passphrase-file", str(secret))
    device = succeed(rbdnbd("map", spec, *options))
    assert run("blockdev", "--getss", device).strip() == "4096"
    with open(device, "r+b", buffering=0) as disk:
        disk.write(b"plain text".ljust(4096))
    succeed(rbdnbd("unmap", device))
    rbd("export", "--no-progress", spec, str(tmp_path / "export"))
    assert b"plain text" not in (tmp_path / "export").read_bytes()
    device = succeed(rbdnbd("map", spec, *options))
    with open(device, "rb") as disk:
        assert disk.read(10) == b"plain text"
    succeed(rbdnbd("unmap", device))


def test_discard_gives_space_back_unless_trim_is_not_offered(
    rbdnbd: Command, image: MakeImage, rbd: Rbd
) -> None:
    spec = image("16M")
    device = succeed(rbdnbd("map", spec, "--notrim"))
    run("dd", "if=/dev/urandom", f"of={device}", "bs=4M", "count=4", "oflag=direct")
    refused = subprocess.run(["blkdiscard", device], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    used = json.loads(rbd("du", "--format", "json", spec))["images"][0]["used_size"]
    assert used == 16 << 20
    succeed(rbdnbd("unmap", device))
