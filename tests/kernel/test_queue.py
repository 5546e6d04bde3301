"""The settings of a device's queue: what is asked for, what is not inherited, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.kernel.test_take_over import succeed
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]
ASKED = {
    "scheduler": "mq-deadline",
    "nr_requests": "200",
    "max_sectors_kb": "512",
    "read_ahead_kb": "64",
    "rotational": "1",
    "discard_max_bytes": "1048576",
    "nomerges": "2",
    "rq_affinity": "2",
}
DEFAULTS = {
    "scheduler": "none",
    "nr_requests": "128",
    "max_sectors_kb": "4096",
    "read_ahead_kb": "8192",
    "rotational": "0",
    "discard_max_bytes": "2199023255040",
    "nomerges": "0",
    "rq_affinity": "1",
}


def settings(device: str) -> dict[str, str]:
    """Return what the queue of a device is set to."""
    queue = Path("/sys/block") / Path(device).name / "queue"
    found = {key: (queue / key).read_text().strip() for key in ASKED}
    chosen = found["scheduler"].partition("[")[2].partition("]")[0]
    return found | {"scheduler": chosen or found["scheduler"]}


def test_settings_hold_over_attach_and_resize_and_are_not_the_next_mappings(
    rbdnbd: Command, image: MakeImage, rbd: Callable[..., str]
) -> None:
    """Seen to fail with a resize that does not set the queue again: discard is the driver's."""
    words = [word for key, value in ASKED.items() for word in ("--queue", f"{key}={value}")]
    spec = image("16M")
    device = succeed(rbdnbd("map", spec, *words))
    assert settings(device) == ASKED
    succeed(rbdnbd("attach", "--replace", "--device", device))
    assert settings(device) == ASKED
    rbd("resize", "--no-progress", "--size", "32M", spec)
    sectors = Path("/sys/block") / Path(device).name / "size"
    wait_until(lambda: int(sectors.read_text()) == 32 * 2048, 15, "the new size")
    wait_until(lambda: settings(device) == ASKED, 5, "the settings are what they were")
    succeed(rbdnbd("unmap", device))
    assert succeed(rbdnbd("map", spec, "--device", device)) == device
    assert settings(device) == DEFAULTS
    succeed(rbdnbd("unmap", device))


def test_what_the_kernel_refuses_is_one_sentence_and_nothing_is_mapped(
    rbdnbd: Command, image: MakeImage
) -> None:
    """Seen to fail with a `tune` that logs every refusal."""
    refused = rbdnbd("map", image("16M"), "--device", "/dev/nbd3", "--queue", "nr_requests=2000")
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        1,
        "",
        "rbdnbd: /dev/nbd3 does not take nr_requests=2000: Invalid argument\n",
    )
    assert not Path("/sys/block/nbd3/pid").exists()
