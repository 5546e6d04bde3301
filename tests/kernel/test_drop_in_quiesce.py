"""--quiesce of our rbd-nbd and of Ceph's: what the hook does, and what becomes of the snapshot."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.rbd_nbd import Run, printed
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]

BOTH = ["quiesce", "unquiesce"]


class Outcome(NamedTuple):
    """How `rbd snap create` ended, whether there is a snapshot, and which calls the hook finished.

    `before` are those that it had finished when `rbd` returned.
    """

    status: int
    said: str
    made: bool
    before: list[str]
    calls: list[str]


def test_the_hook_decides_over_the_snapshot_as_cephs_does(
    stock: Run, ours: Run, image: MakeImage, ceph_conf: Path, tmp_path: Path
) -> None:
    theirs = outcomes(stock, image("16M"), ceph_conf, tmp_path, again=False)
    found = outcomes(ours, image("16M"), ceph_conf, tmp_path, again=True)
    failed = "rbd: failed to create snapshot: "
    assert found == [
        Outcome(0, "", True, BOTH[:1], BOTH),
        Outcome(22, f"{failed}(22) Invalid argument", False, BOTH[:1], BOTH),
        Outcome(0, "", True, BOTH[:1], BOTH),
        Outcome(2, f"{failed}(2) No such file or directory", False, [], []),
    ]
    # Ceph's does not run a hook again that has failed, and has no word for one that is missing.
    assert theirs == [
        found[0],
        found[1]._replace(calls=BOTH[:1]),
        found[2],
        Outcome(1, f"{failed}(1) Operation not permitted", False, [], []),
    ]


def outcomes(
    program: Run, spec: str, ceph_conf: Path, directory: Path, *, again: bool
) -> list[Outcome]:
    """Map with a hook, and make a snapshot for each way in which the hook may behave.

    `again` says that a hook that has failed is run again.
    """
    hook, calls = directory / "hook", directory / "calls"

    def snapshot(name: str, script: str | None) -> Outcome:
        calls.write_text("")
        if script is None:
            hook.unlink()
        else:
            finished = f'[ "$1" = {device} ] && echo "$2" >>{calls}'
            hook.write_text(f"#!/bin/sh\ntrap '{finished}' EXIT\n{script}\n")
        argv = ["rbd", "--conf", str(ceph_conf), "snap", "create", "--no-progress"]
        done = subprocess.run([*argv, f"{spec}@{name}"], capture_output=True, text=True)
        before = calls.read_text().splitlines()[:1]
        if script is not None and (done.returncode == 0 or again):
            wait_until(lambda: "unquiesce" in calls.read_text(), 20, "the hook is called again")
        found = json.loads(listing(ceph_conf, spec))
        said = [line for line in done.stderr.splitlines() if line.startswith("rbd: ")]
        made = name in [each["name"] for each in found]
        return Outcome(done.returncode, "".join(said), made, before, calls.read_text().splitlines())

    hook.touch(0o755)
    options = ("--quiesce", "--quiesce-hook", str(hook), "--try-netlink")
    device = printed(program("map", spec, *options)).strip()
    slow = '[ "$2" = unquiesce ] || sleep 7'
    found = [
        snapshot("a", ""),
        snapshot("b", "exit 22"),
        snapshot("c", slow),
        snapshot("d", None),
    ]
    printed(program("unmap", device))
    return found


def listing(ceph_conf: Path, spec: str) -> str:
    argv = ["rbd", "--conf", str(ceph_conf), "snap", "ls", "--format", "json", spec]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout
