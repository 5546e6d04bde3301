"""rbd-nbd replaced by ours, on a real kernel: the calls of `rbd device`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.rbd_nbd import Run, printed

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]


def test_rbd_device_maps_lists_and_unmaps(beside_ours: Run, image: MakeImage) -> None:
    spec = image("16M")
    device = printed(beside_ours("device", "map", "-t", "nbd", spec)).strip()
    assert device.startswith("/dev/nbd")
    (listed,) = json.loads(printed(beside_ours("device", "list", "-t", "nbd", "--format", "json")))
    assert (listed["device"], listed["image"]) == (device, spec.removeprefix("rbd/"))
    printed(beside_ours("device", "unmap", "-t", "nbd", device))
    assert printed(beside_ours("device", "list", "-t", "nbd")) == ""


def test_rbd_device_detaches_and_attaches(beside_ours: Run, image: MakeImage) -> None:
    spec = image("16M")
    line = printed(beside_ours("device", "map", "-t", "nbd", "--show-cookie", spec))
    device, cookie = line.split()
    printed(beside_ours("device", "detach", "-t", "nbd", device))
    assert printed(beside_ours("device", "list", "-t", "nbd")) == ""
    options = ("--device", device, "--cookie", cookie)
    assert printed(beside_ours("device", "attach", "-t", "nbd", *options, spec)).strip() == device
    printed(beside_ours("device", "unmap", "-t", "nbd", spec))


def test_without_trim_the_device_has_no_discard(ours: Run, image: MakeImage) -> None:
    device = printed(ours("map", image("16M"), "--notrim")).strip()
    assert Path(f"/sys/block/{Path(device).name}/queue/discard_max_bytes").read_text() == "0\n"
    printed(ours("unmap", device))
