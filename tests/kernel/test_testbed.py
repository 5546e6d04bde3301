"""The ground that the other kernel tests stand on: a driver, a cluster in reach, file systems."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


def test_the_kernel_offers_idle_nbd_devices(nbd_module: None) -> None:
    assert Path("/dev/nbd0").is_block_device()
    assert not Path("/sys/block/nbd0/pid").exists()


def test_the_cluster_is_reached_with_the_stock_command(
    rbd: Callable[..., str], image: Callable[..., str]
) -> None:
    spec = image("8M")
    assert spec.removeprefix("rbd/") in rbd("ls").split()


@pytest.mark.parametrize("name", ["ext4", "xfs"])
def test_the_kernel_knows_the_file_system(name: str) -> None:
    subprocess.run(["modprobe", name], check=True)
    assert name in Path("/proc/filesystems").read_text().split()
