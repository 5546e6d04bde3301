"""list-mapped of our rbd-nbd and of Ceph's, with devices that both have really mapped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.rbd_nbd import LISTS, Run, printed
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]
Rbd = Callable[..., str]
Document = dict[str, str | int]

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@pytest.fixture
def in_a_namespace(rbd: Rbd) -> Iterator[str]:
    """A snapshot of an image with a long name in a namespace."""
    rbd("namespace", "create", "rbd/tenant")
    rbd("create", "--size", "16M", "rbd/tenant/a-rather-long-name")
    rbd("snap", "create", "--no-progress", "rbd/tenant/a-rather-long-name@monday")
    yield "rbd/tenant/a-rather-long-name@monday"
    rbd("snap", "purge", "--no-progress", "rbd/tenant/a-rather-long-name")
    rbd("rm", "--no-progress", "rbd/tenant/a-rather-long-name")
    rbd("namespace", "rm", "rbd/tenant")


def listed(run: Run) -> dict[str, Document]:
    """Return what is listed, by device."""
    found = json.loads(printed(run("list-mapped", "--format", "json")))
    return {document["device"]: document for document in found}


def test_both_print_the_same_bytes_for_the_same_mappings(
    stock: Run, ours: Run, image: MakeImage, in_a_namespace: str
) -> None:
    rows = (
        (image("16M"), "/dev/nbd0", "11111111-2222-3333-4444-555555555555"),
        (in_a_namespace, "/dev/nbd1", "two words"),
    )
    LAST_PID.write_text("20000")  # five digits for both: a column is as wide as its widest number
    printings = []
    for program in (stock, ours):
        for spec, device, cookie in rows:
            words = ("--try-netlink", "--device", device, "--cookie", cookie, "--show-cookie")
            assert printed(program("map", spec, *words)) == f"{device} {cookie}\n"
        pids = [str(document["id"]) for document in listed(program).values()]
        printing = [printed(program(*words)) for words in LISTS]
        for number, pid in enumerate(pids):
            printing = [text.replace(pid, f"pid-{number}") for text in printing]
        printings.append(printing)
        for _, device, _ in rows:
            printed(program("unmap", device))
    assert printings[0] == printings[1]
    assert all(text.count("pid-") == 2 for text in printings[0])


def test_the_list_is_true_after_kill_attach_and_detach(ours: Run, image: MakeImage) -> None:
    spec, device = image("16M"), "/dev/nbd4"
    cookie = ("--device", device, "--cookie", "a b")
    printed(ours("map", spec, *cookie))
    before = listed(ours)[device]
    os.kill(int(before["id"]), signal.SIGKILL)
    wait_until(lambda: listed(ours) == {}, 20, "the dead one is not listed")
    printed(ours("attach", spec, *cookie))
    again = listed(ours)[device]
    assert Path(f"/proc/{again['id']}/comm").read_text() == "rbd-nbd\n"
    assert again == before | {"id": again["id"]}
    assert again["id"] != before["id"]
    printed(ours("detach", device))
    assert listed(ours) == {}
    printed(ours("attach", spec, *cookie))
    assert listed(ours)[device]["cookie"] == "a b"
    printed(ours("unmap", device))


@pytest.fixture
def with_blanks(rbd: Rbd) -> Iterator[str]:
    """An image whose name holds blanks."""
    rbd("create", "--size", "16M", "rbd/an image  of mine")
    yield "rbd/an image  of mine"
    rbd("rm", "--no-progress", "rbd/an image  of mine")


@pytest.fixture
def strangers(stock: Run, image: MakeImage, tmp_path: Path) -> Iterator[set[str]]:
    """Devices that qemu-nbd and Ceph's rbd-nbd have."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    theirs = {"/dev/nbd1", "/dev/nbd6"}
    qemu = ["qemu-nbd", "--connect=/dev/nbd1", "--format=raw", str(tmp_path / "disk")]
    process = subprocess.Popen(qemu)  # it stays in the foreground
    wait_until(lambda: Path("/sys/block/nbd1/pid").exists(), 30, "qemu-nbd has its device")
    printed(stock("map", image("16M"), "--device", "/dev/nbd6", "--try-netlink"))
    yield theirs
    printed(stock("unmap", "/dev/nbd6"))
    subprocess.run(["qemu-nbd", "--disconnect", "/dev/nbd1"], check=True, capture_output=True)
    assert process.wait(30) == 0


def test_blanks_are_whole_gaps_hide_nothing_and_strangers_are_not_listed(
    stock: Run, ours: Run, with_blanks: str, strangers: set[str]
) -> None:
    first, last = "/dev/nbd3", "/dev/nbd40"
    printed(ours("map", with_blanks, "--device", first))
    printed(ours("map", with_blanks, "--device", last, "--cookie", " x  y "))
    found = listed(ours)
    assert list(found) == [first, last]
    assert {document["image"] for document in found.values()} == {"an image  of mine"}
    assert found[last]["cookie"] == " x  y "
    assert list(listed(stock)) == ["/dev/nbd6"]
    row = printed(ours("list-mapped")).splitlines()[-1].rstrip()
    assert row == f"{found[last]['id']}  rbd              an image  of mine  -     {last}   x  y"
    for device in (first, last):
        printed(ours("unmap", device))
    assert listed(ours) == {}
    for device in strangers:
        assert ours("unmap", device).status == 1
