"""Running the quiesce hook: what it gets from us, and what we learn from it."""

from __future__ import annotations

import errno
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rbdnbd.hook import run_hook

DEVICE = "/dev/nbd7"

Script = Callable[[str], str]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Make a hook of a shell script's lines; it runs in the directory of the test."""

    def make(lines: str) -> str:
        path = tmp_path / "hook"
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{lines}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def signals_blocked() -> Iterator[None]:
    """Block signals as a mapping does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_the_hook_is_told_the_device_and_the_command(script: Script, tmp_path: Path) -> None:
    assert run_hook(script('echo "$*" >out'), DEVICE, "unquiesce") == 0
    assert (tmp_path / "out").read_text() == "/dev/nbd7 unquiesce\n"


def test_its_exit_status_is_returned(script: Script) -> None:
    assert run_hook(script("exit 22"), DEVICE, "quiesce") == 22


def test_one_that_a_signal_ends_has_failed(script: Script) -> None:
    assert run_hook(script("kill -9 $$"), DEVICE, "quiesce") == errno.EIO


def test_one_that_is_missing_is_enoent_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert run_hook("/no/such/hook", DEVICE, "quiesce") == errno.ENOENT
    assert caplog.messages == ["the hook /no/such/hook cannot be run: No such file or directory"]


def test_one_that_may_not_be_run_is_eacces(tmp_path: Path) -> None:
    (tmp_path / "hook").write_text("#!/bin/sh\n")
    assert run_hook(str(tmp_path / "hook"), DEVICE, "quiesce") == errno.EACCES


def test_what_it_says_is_logged(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    hook = script("echo frozen; echo 'and more' >&2; exit 3")
    with caplog.at_level(logging.INFO):
        run_hook(hook, DEVICE, "quiesce")
    assert caplog.messages == [
        f"{hook} quiesce: frozen",
        f"{hook} quiesce: and more",
        f"{hook} {DEVICE} quiesce: exit status 3",
    ]


@pytest.mark.usefixtures("signals_blocked")
def test_it_has_no_signal_blocked_and_may_die_of_a_pipe(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):  # a shell would unblock them itself
        run_hook("grep", "Sig[BI][lg][kn]", "/proc/self/status")
    blocked, ignored = (int(line.split()[-1], 16) for line in caplog.messages[:2])
    assert blocked == 0
    assert not ignored & 1 << signal.SIGPIPE - 1


def test_it_does_not_get_the_variables_that_are_meant_for_us(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("RBDNBD_BACKGROUND", "1")
    monkeypatch.setenv("CEPH_CONF", "/etc/ceph/blue.conf")
    run_hook(script("env >out"), DEVICE, "quiesce")
    names = {line.partition("=")[0] for line in (tmp_path / "out").read_text().splitlines()}
    assert "CEPH_CONF" in names
    assert not names & {"NOTIFY_SOCKET", "RBDNBD_BACKGROUND"}


def test_it_is_not_waited_for_by_its_output_but_by_its_end(script: Script) -> None:
    assert run_hook(script("sleep 30 & exit 5"), DEVICE, "quiesce") == 5


def test_it_is_not_in_our_process_group(script: Script, tmp_path: Path) -> None:
    run_hook(script("echo $$ >pid; cut -d' ' -f5 /proc/self/stat >group"), DEVICE, "quiesce")
    assert (tmp_path / "group").read_text() == (tmp_path / "pid").read_text()
