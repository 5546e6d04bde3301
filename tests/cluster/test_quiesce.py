"""The quiesce hook is run around the snapshots that anybody makes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rbdnbd.errors import RbdnbdError
from rbdnbd.hook import quiescing
from rbdnbd.image import RbdImage
from rbdnbd.spec import ClusterOptions
from testbed.processes import Unavailable
from tests.support.opening import opened
from tests.support.waiting import wait_until

DEVICE = "/dev/nbd7"
DONE = [f"{DEVICE} quiesce", f"{DEVICE} unquiesce"]

Rbd = Callable[..., str]
MakeImage = Callable[..., str]


class Hook:
    """A program that writes down how it is called, and then does what `script` says."""

    def __init__(self, directory: Path) -> None:
        self.path, self._calls = directory / "hook", directory / "calls"
        self._calls.touch()

    def does(self, script: str) -> str:
        self.path.write_text(f'#!/bin/sh\necho "$*" >>{self._calls}\n{script}\n')
        self.path.chmod(0o755)
        return str(self.path)

    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(tmp_path)


@pytest.fixture
def mapped(image: MakeImage, options: ClusterOptions) -> Iterator[RbdImage]:
    with opened(image("16M"), options) as opened_image:
        opened_image.write(0, b"x")
        yield opened_image


def snapshots(rbd: Rbd, image: RbdImage) -> list[str]:
    found = json.loads(rbd("snap", "ls", "--format", "json", str(image.spec)))
    return [each["name"] for each in found]


def snapshot(rbd: Rbd, image: RbdImage, name: str = "s") -> None:
    rbd("snap", "create", "--no-progress", f"{image.spec}@{name}")


def test_the_hook_runs_before_and_after_a_snapshot(mapped: RbdImage, hook: Hook, rbd: Rbd) -> None:
    with quiescing(mapped, DEVICE, hook.does("")):
        snapshot(rbd, mapped)
        wait_until(lambda: hook.calls() == DONE, 5, "the hook has run twice")
        snapshot(rbd, mapped, "t")
        wait_until(lambda: hook.calls() == 2 * DONE, 5, "the hook has run four times")


def test_the_snapshot_waits_for_a_hook_that_takes_7_s(
    mapped: RbdImage, hook: Hook, rbd: Rbd, tmp_path: Path
) -> None:
    slow = f'if [ "$2" = quiesce ]; then sleep 7; touch {tmp_path}/quiesced; fi'
    with quiescing(mapped, DEVICE, hook.does(slow)):
        snapshot(rbd, mapped)
        assert (tmp_path / "quiesced").exists()
    assert hook.calls() == DONE


def test_the_hooks_exit_status_is_what_the_snapshot_fails_with(
    mapped: RbdImage, hook: Hook, rbd: Rbd
) -> None:
    failing = hook.does("exit 22")
    with quiescing(mapped, DEVICE, failing):
        with pytest.raises(Unavailable, match=r"failed to create snapshot: \(22\) Invalid arg"):
            snapshot(rbd, mapped)
        assert snapshots(rbd, mapped) == []
    assert hook.calls() == DONE


def test_a_hook_that_is_missing_makes_the_snapshot_fail(mapped: RbdImage, rbd: Rbd) -> None:
    with quiescing(mapped, DEVICE, "/no/such/hook"):
        with pytest.raises(Unavailable, match=r"failed to create snapshot: \(2\) No such file"):
            snapshot(rbd, mapped)
        assert snapshots(rbd, mapped) == []


def test_a_snapshot_under_way_is_waited_for_at_the_end(
    mapped: RbdImage, hook: Hook, rbd: Rbd, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    waiting = f'[ "$2" = unquiesce ] || while [ ! -e {go} ]; do sleep 0.05; done'
    making = threading.Thread(target=snapshot, args=(rbd, mapped))
    with quiescing(mapped, DEVICE, hook.does(waiting)):
        making.start()
        wait_until(hook.calls, 5, "the hook is running")
        threading.Timer(0.5, go.touch).start()
    assert hook.calls() == DONE
    making.join()
    assert snapshots(rbd, mapped) == ["s"]


def test_afterwards_the_hook_is_not_run(mapped: RbdImage, hook: Hook, rbd: Rbd) -> None:
    with quiescing(mapped, DEVICE, hook.does("exit 22")):
        pass
    snapshot(rbd, mapped)
    assert hook.calls() == []
    status = json.loads(rbd("status", "--format", "json", str(mapped.spec)))
    assert [each["address"] for each in status["watchers"]] == [mapped.address]


def test_an_image_that_keeps_its_lock_is_quiesced_too(
    image: MakeImage, options: ClusterOptions, hook: Hook, rbd: Rbd
) -> None:
    with opened(image("16M"), options, exclusive=True) as ours:
        with quiescing(ours, DEVICE, hook.does("")):
            snapshot(rbd, ours)
        assert hook.calls() == DONE
        ours.write(0, b"still ours")


def test_an_image_in_a_namespace_is_quiesced_too(
    options: ClusterOptions, hook: Hook, rbd: Rbd
) -> None:
    rbd("namespace", "create", "rbd/quiet")
    rbd("create", "--size", "8M", "rbd/quiet/volume")
    try:
        with opened("rbd/quiet/volume", options) as ours:
            with quiescing(ours, DEVICE, hook.does("")):
                snapshot(rbd, ours)
            assert hook.calls() == DONE
    finally:
        rbd("snap", "purge", "--no-progress", "rbd/quiet/volume")
        rbd("rm", "--no-progress", "rbd/quiet/volume")
        rbd("namespace", "rm", "rbd/quiet")


def test_an_image_that_is_read_only_is_not_quiesced(
    image: MakeImage, options: ClusterOptions, hook: Hook, rbd: Rbd
) -> None:
    with opened(image("16M"), options, read_only=True) as ours:
        with quiescing(ours, DEVICE, hook.does("exit 22")):
            snapshot(rbd, ours)
        assert hook.calls() == []


def test_an_image_that_is_gone_cannot_be_watched(
    image: MakeImage, options: ClusterOptions, rbd: Rbd
) -> None:
    with opened(image("16M"), options) as ours:
        rbd("mv", str(ours.spec), f"{ours.spec}-moved")
        try:
            with pytest.raises(RbdnbdError) as raised, quiescing(ours, DEVICE, "/bin/true"):
                pass
        finally:
            rbd("mv", f"{ours.spec}-moved", str(ours.spec))
    assert raised.value.message == (
        f"cannot watch the snapshots of {ours.spec}: rbd_open: No such file or directory"
    )
