"""Our rbd-nbd and Ceph's of Debian 12 side by side, where a device or an image says no.

Both are asked the same in the same test. Where docs/compatibility.md says that ours differs, the
test holds both to it.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.rbd_nbd import Done, Run, printed, refused
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]

MAPPED = "/dev/nbd3"
FREE = "/dev/nbd5"


@pytest.fixture(params=["stock", "ours"])
def program(request: pytest.FixtureRequest) -> Run:
    """Either program, the one that maps; a test that wants the other one asks for it by name."""
    run: Run = request.getfixturevalue(request.param)
    return run


@pytest.fixture
def mapping(program: Run, image: MakeImage) -> Iterator[tuple[str, int]]:
    """An image that `program` has mapped to MAPPED with the cookie C 1, and its process."""
    spec = image("16M")
    words = ("--device", MAPPED, "--cookie", "C 1", "--try-netlink")
    assert printed(program("map", spec, *words)) == f"{MAPPED}\n"
    (listed,) = json.loads(printed(program("list-mapped", "--format", "json")))
    yield spec, listed["id"]
    printed(program("unmap", MAPPED))
    wait_until(lambda: not Path(f"/proc/{listed['id']}").exists(), 20, "its process is gone")


def test_a_device_that_has_a_process_is_neither_mapped_nor_attached(
    program: Run, stock: Run, ours: Run, mapping: tuple[str, int]
) -> None:
    spec, pid = mapping
    device = ("--device", MAPPED)
    for words, sentence in (
        (("map", spec, *device), f"the device {MAPPED} is busy"),
        (("attach", spec, *device), "must specify cookie to attach"),
        (("attach", spec, *device, "--cookie", "C 2"), "cookie mismatch"),
        (("attach", spec, *device, "--cookie", "C"), "cookie mismatch"),
        (("attach", spec, *device, "--cookie", "C 1"), f"{MAPPED} has process {pid} connected"),
    ):
        assert program(*words) == refused(sentence), words
    # Asked for netlink, Ceph's has other words for a device that is busy.
    by_netlink = ("map", spec, *device, "--try-netlink")
    assert stock(*by_netlink) == refused("netlink connect failed: Object busy")
    assert ours(*by_netlink) == refused(f"the device {MAPPED} is busy")


def test_ours_leaves_alone_what_cephs_has_mapped(stock: Run, ours: Run, image: MakeImage) -> None:
    spec = image("16M")
    words = ("--device", MAPPED, "--cookie", "C 1", "--try-netlink")
    printed(stock("map", spec, *words))
    attach = ours("attach", spec, "--device", MAPPED, "--cookie", "C 1")
    assert attach == refused(f"{MAPPED} still has a server: end that first")
    assert ours("detach", MAPPED) == refused(f"no process attached to {MAPPED} found")
    assert ours("unmap", spec) == refused(f"{spec} is not mapped")
    unmap = ours("unmap", MAPPED)
    assert (unmap.status, unmap.out) == (1, "")
    assert f"{MAPPED} is connected, but no rbdnbd process answers for it" in unmap.err
    Path(MAPPED).write_bytes(b"still served")
    printed(stock("unmap", MAPPED))


def test_a_free_device_has_no_process_and_is_not_attached(
    stock: Run, ours: Run, image: MakeImage
) -> None:
    words = ("detach", FREE)
    assert ours(*words) == stock(*words) == refused(f"no process attached to {FREE} found")
    # Ceph's tells neither what it has not unmapped nor why it does not attach.
    assert stock("unmap", FREE) == Done(0, "", "")
    assert ours("unmap", FREE) == refused(f"{FREE} is not mapped")
    attach = ("attach", image("16M"), "--device", FREE, "--cookie", "C")
    assert stock(*attach) == refused("kernel does not have cookie support")
    assert ours(*attach) == refused(f"{FREE} is not mapped")


def test_after_kill_9_ours_is_found_by_its_image_and_cephs_is_not(
    stock: Run, ours: Run, image: MakeImage, evict: Callable[[str], None]
) -> None:
    for program in (stock, ours):
        spec = image("16M")
        device = printed(program("map", spec, "--try-netlink")).strip()
        (listed,) = json.loads(printed(program("list-mapped", "--format=json")))
        os.kill(listed["id"], signal.SIGKILL)
        wait_until(lambda run=program: run("list-mapped") == Done(0, "", ""), 20, "not listed")
        assert program("detach", device) == refused(f"no process attached to {device} found")
        if program is stock:
            assert program("unmap", spec) == refused(f"{spec} is not mapped")
            assert program("unmap", device) == Done(0, "", "")
        else:
            lost = f"rbd-nbd: {device} is disconnected before all of it was written\n"
            assert program("unmap", spec) == Done(0, "", lost)
        assert program("unmap", spec) == refused(f"{spec} is not mapped")
        evict(spec)


def test_a_device_path_that_is_none_is_refused_alike(
    stock: Run, ours: Run, image: MakeImage
) -> None:
    spec = image("16M")
    for words in (
        ("map", spec, "--device", "/dev/sda"),
        ("attach", spec, "--device", "/dev/sda"),
        ("map", spec, "--device", "/dev/nbdx", "--try-netlink"),
    ):
        device = words[3]
        sentence = f"invalid device path: {device} (expected /dev/nbd{{num}})"
        assert ours(*words) == stock(*words) == refused(sentence)


def test_a_device_that_is_not_there_yet_is_made_for_ours(
    stock: Run, ours: Run, image: MakeImage
) -> None:
    words = ("map", image("16M"), "--device", "/dev/nbd77")
    assert stock(*words) == refused("failed to open device: /dev/nbd77")
    assert printed(ours(*words)) == "/dev/nbd77\n"
    printed(ours("unmap", "/dev/nbd77"))


def test_a_lock_that_is_kept_is_not_had_by_either(stock: Run, ours: Run, image: MakeImage) -> None:
    spec = image("16M")
    beginning = "rbd-nbd: failed to acquire exclusive lock: "
    for first in (stock, ours):
        device = printed(first("map", spec, "--exclusive")).strip()
        done = stock("map", spec, "--exclusive")  # librados' log comes anywhere between its words
        assert (done.status, done.out) == (1, "")
        assert "failed to acquire exclusive lock: " in done.err
        assert "(30) Read-only file system" in done.err
        done = ours("map", spec, "--exclusive")
        assert (done.status, done.out) == (1, "")
        assert re.fullmatch(rf"{beginning}another client keeps it \([0-9.:/]+\)\n", done.err)
        printed(first("unmap", device))


def test_of_what_does_not_exist_cephs_says_nothing_and_ours_one_sentence(
    stock: Run, ours: Run, image: MakeImage
) -> None:
    spec = image("16M")
    for missing, sentence in (
        ("rbd/no-such-image", "image rbd/no-such-image does not exist"),
        ("no-such-pool/image", "pool no-such-pool does not exist"),
        (f"{spec}@no-such", f"image {spec} has no snapshot no-such"),
    ):
        assert stock("map", missing) == Done(1, "", "")
        assert ours("map", missing) == refused(sentence)
