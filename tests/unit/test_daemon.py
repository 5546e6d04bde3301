"""Starting in the background, with real children, which run the script that they are given."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rbdnbd import background, daemon
from rbdnbd.errors import RbdnbdError
from tests.support.waiting import wait_until

MAIN = """
import os, signal, sys, threading, time
from rbdnbd import daemon
from rbdnbd.errors import RbdnbdError

exec(sys.argv[1])
"""
PROGRAM = ("-c", MAIN)


@pytest.fixture(autouse=True)
def nobody_waits_for_us(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)


def start(script: str, seconds: float = 20.0) -> tuple[dict[str, str], list[str]]:
    said: list[str] = []
    return background.start([script], said.append, seconds, PROGRAM), said


def refusal(script: str, seconds: float = 20.0) -> RbdnbdError:
    with pytest.raises(RbdnbdError) as refused:
        start(script, seconds)
    return refused.value


def gone(pid: int) -> bool:
    """Whether a child of ours has ended, which reaps it."""
    try:
        return os.waitpid(pid, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return True


@pytest.fixture
def pid_file(tmp_path) -> Iterator[Path]:
    """Where a child writes its id; it is ended after the test."""
    path = tmp_path / "pid"
    yield path
    if path.exists():
        pid = int(path.read_text())
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: gone(pid), 10, f"the end of {pid}")


def writes(path: Path) -> str:
    """The line of a script that tells the test its process id."""
    return f"open({str(path)!r}, 'w').write(str(os.getpid()))\n"


def written(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text(), 20, f"a process id in {path}")
    return int(path.read_text())


LIVES = "daemon.ready(X_RBDNBD_DEVICE='/dev/nbd7', STATUS='vol is /dev/nbd7')\ntime.sleep(60)\n"


def test_the_fields_of_a_child_that_is_ready_are_returned(pid_file):
    fields, said = start(writes(pid_file) + LIVES)
    assert fields == {"READY": "1", "X_RBDNBD_DEVICE": "/dev/nbd7", "STATUS": "vol is /dev/nbd7"}
    assert said == []


def test_a_child_that_is_ready_lives_on_in_a_session_and_a_directory_of_its_own(pid_file):
    start(writes(pid_file) + LIVES)
    pid = written(pid_file)
    assert os.getsid(pid) == pid
    wait_until(lambda: os.readlink(f"/proc/{pid}/cwd") == "/", 10, "cwd is /")


def test_a_child_that_is_ready_holds_on_to_nothing_of_its_parent(pid_file):
    start(writes(pid_file) + LIVES)
    pid = written(pid_file)

    def descriptors() -> dict[str, str]:
        directory = Path(f"/proc/{pid}/fd")
        return {entry.name: os.readlink(entry) for entry in directory.iterdir()}

    null = "/dev/null"
    wait_until(lambda: descriptors() == {"0": null, "1": null, "2": null}, 10, "only /dev/null")


def test_a_caller_that_reads_to_the_end_gets_there_while_the_child_lives(pid_file):
    child = f"{writes(pid_file)}daemon.ready(STDIN=os.readlink('/proc/self/fd/0'))\ntime.sleep(60)"
    started = f"background.start([{child!r}], print, 20, {PROGRAM!r})"
    parent = f"from rbdnbd import background\nprint({started}['STDIN'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", parent],
        input=b"for the parent alone",
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"/dev/null\n", b"")


def test_what_a_child_says_before_it_is_ready_goes_to_stderr(capfd, pid_file):
    start(writes(pid_file) + "os.write(2, b'a warning')\n" + LIVES)
    assert capfd.readouterr().err == "a warning"


def test_a_child_that_fails_is_quoted_with_its_errno():
    refused = refusal("daemon.failed('pool x does not exist', 2); sys.exit(1)")
    assert (refused.message, refused.errno) == ("pool x does not exist", errno.ENOENT)


def test_a_child_that_fails_and_is_gone_at_once_is_quoted_all_the_same(
    monkeypatch, tmp_path, pid_file
):
    monkeypatch.setattr(background, "_SAY_EVERY", 0.05)
    go = tmp_path / "go"
    script = (
        f"{writes(pid_file)}while not os.path.exists({str(go)!r}): time.sleep(0.02)\n"
        "daemon.failed('pool x does not exist', 2); sys.exit(1)"
    )

    def let_it_end(_: str) -> None:
        status = Path(f"/proc/{written(pid_file)}/status")
        go.touch()
        wait_until(lambda: "State:\tZ" in status.read_text(), 20, "the end of the child")

    with pytest.raises(RbdnbdError, match="pool x does not exist"):
        background.start([script], let_it_end, 20, PROGRAM)


def test_a_reason_of_two_lines_is_told_in_one():
    assert refusal("daemon.failed('one\\ntwo', 0); sys.exit(1)").message == "one two"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.exit(3)", "the process exited with status 3 while starting"),
        ("sys.exit(0)", "the process exited with status 0 while starting"),
        (
            "daemon.notify(STATUS='opening vol'); os.kill(os.getpid(), signal.SIGKILL)",
            "the process was ended by SIGKILL while opening vol",
        ),
    ],
)
def test_a_child_that_ends_without_a_word_is_told_by_how_it_ended(script, message):
    assert refusal(script).message == message


def test_the_words_that_are_passed_on_are_a_command_line_of_rbdnbd():
    """Seen to fail with the child's exit status left out."""
    with pytest.raises(RbdnbdError) as refused:
        background.start(["list-mapped", "--format", "xml"], print, 20)
    assert "'xml' is not one of" in refused.value.message
    assert refused.value.exit_status == 2


def test_a_child_that_is_not_ready_in_time_is_ended_even_if_it_does_not_want_to(
    monkeypatch, pid_file
):
    monkeypatch.setattr(background, "_SAY_EVERY", 0.1)
    monkeypatch.setattr(background, "_END_SECONDS", 0.2)
    script = (
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{writes(pid_file)}"
        "daemon.notify(STATUS='opening vol')\ntime.sleep(60)"
    )
    assert refusal(script, seconds=3).message == "gave up after 3 s of opening vol"
    assert gone(written(pid_file))


def test_what_takes_long_is_said_again_and_again(monkeypatch, pid_file):
    monkeypatch.setattr(background, "_SAY_EVERY", 0.05)
    script = f"{writes(pid_file)}daemon.notify(STATUS='opening vol')\ntime.sleep(0.5)\n{LIVES}"
    _, said = start(script)
    opening = [line for line in said if re.fullmatch(r"still opening vol \(\d+ s\)", line)]
    assert len(opening) > 1
    assert all(line.startswith(("still starting (", "still opening vol (")) for line in said)


def test_progress_is_not_readiness(pid_file):
    fields, _ = start(f"{writes(pid_file)}daemon.notify(STATUS='a'); daemon.notify(B='c')\n{LIVES}")
    assert fields["X_RBDNBD_DEVICE"] == "/dev/nbd7"


def test_an_interrupted_parent_lets_its_child_end_in_its_own_way(tmp_path, pid_file):
    undone = tmp_path / "undone"
    script = (
        f"signal.signal(signal.SIGTERM, lambda *_: open({str(undone)!r}, 'w') and sys.exit())\n"
        f"{writes(pid_file)}time.sleep(60)"
    )

    def interrupt() -> None:
        written(pid_file)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        start(script)
    assert gone(written(pid_file))
    assert undone.exists()


def test_a_parent_is_left_with_no_descriptor_more(pid_file):
    """Seen to fail with the pidfd left open."""
    before = os.listdir("/proc/self/fd")
    start(writes(pid_file) + LIVES)
    refusal("sys.exit(1)")
    assert os.listdir("/proc/self/fd") == before


def test_a_descriptor_that_the_parent_was_left_does_not_go_on_to_the_child(tmp_path, pid_file):
    """A lock that a shell's script holds by it would last. Seen to fail with all left as it is."""
    with open(tmp_path / "lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        start(writes(pid_file) + LIVES)
    links = [os.readlink(each) for each in Path(f"/proc/{written(pid_file)}/fd").iterdir()]
    assert not [link for link in links if link.endswith("/lock")]


def test_a_child_whose_parent_is_gone_learns_that_nobody_waits(tmp_path):
    report = tmp_path / "report"
    child = f"""
while os.getppid() == {{parent}}:
    time.sleep(0.02)
try:
    daemon.ready(X_RBDNBD_DEVICE='/dev/nbd7')
except RbdnbdError as error:
    open({str(report)!r}, 'w').write(error.message + '.')
"""
    parent = f"""
import os, threading
from rbdnbd import background
def die():
    os._exit(9)
threading.Timer(0.2, die).start()
background.start([{child!r}.format(parent=os.getpid())], print, 20, {PROGRAM!r})
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", parent],
        timeout=30,
        check=False,
    )
    assert done.returncode == 9
    wait_until(lambda: report.exists() and report.read_text().endswith("."), 20, "a report")
    assert report.read_text() == (
        "nobody waits for this process to be ready any more: Broken pipe."
    )


def test_a_child_knows_that_it_is_in_the_background(pid_file):
    assert not daemon.in_background()
    script = f"{writes(pid_file)}daemon.ready(IS=daemon.in_background())\ntime.sleep(60)"
    assert start(script)[0]["IS"] == "True"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe as a parent's: where it is read, and where it is written."""
    reading, writing = os.pipe2(os.O_DIRECT)
    yield reading, writing
    for descriptor in (reading, writing):
        with suppress(OSError):  # a test has closed it
            os.close(descriptor)


@pytest.fixture
def listening(tmp_path_factory) -> Iterator[tuple[socket.socket, str]]:
    """A datagram socket as systemd has one, and its path."""
    path = str(tmp_path_factory.mktemp("n") / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(10)
        yield sock, path


def test_a_notification_goes_to_the_path_that_the_environment_names(monkeypatch, listening):
    sock, path = listening
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    daemon.notify(READY=1, STATUS="vol is /dev/nbd0")
    assert sock.recv(4096) == b"READY=1\nSTATUS=vol is /dev/nbd0"


def test_a_notification_goes_to_an_abstract_address(monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # the kernel makes up an abstract address
        sock.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + sock.getsockname()[1:].decode())
        daemon.notify(STOPPING=1)
        assert sock.recv(4096) == b"STOPPING=1"


def test_nobody_is_notified_when_nobody_asked():
    daemon.notify(READY=1)
    daemon.ready()
    assert not daemon.failed("no", 1)


def test_a_failure_is_notified_on_one_line_and_a_person_in_the_foreground_told_as_well(
    monkeypatch, listening
):
    sock, path = listening
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    assert not daemon.failed("one\ntwo", errno.ENOENT)
    assert sock.recv(4096) == b"ERRNO=2\nX_RBDNBD_EXIT_STATUS=1\nSTATUS=one two"


def test_a_failure_that_a_parent_waits_for_is_told_by_that_one(monkeypatch, pipe):
    reading, writing = pipe
    monkeypatch.setenv("RBDNBD_BACKGROUND", str(writing))
    assert daemon.failed("no", 1)
    assert os.read(reading, 4096) == b"ERRNO=1\nX_RBDNBD_EXIT_STATUS=1\nSTATUS=no"


def test_a_failure_that_no_parent_waits_for_any_more_is_told_here(monkeypatch, pipe):
    reading, writing = pipe
    monkeypatch.setenv("RBDNBD_BACKGROUND", str(writing))
    os.close(reading)
    assert not daemon.failed("no", 1)


def test_whoever_is_ready_writes_to_no_pipe_any_more(pid_file, tmp_path):
    """Its number may be a socket's by then. Seen to fail with the number kept."""
    file, told = tmp_path / "file", tmp_path / "told"
    script = (
        f"{writes(pid_file)}daemon.ready()\nopened = os.open({str(file)!r}, 0o101)\n"
        f"daemon.notify(STOPPING=1)\nopen({str(told)!r}, 'w').write(str(opened))\ntime.sleep(60)"
    )
    start(script)
    wait_until(lambda: told.exists() and told.read_text(), 20, "the end of the script")
    assert (told.read_text(), file.read_bytes()) == ("3", b"")


def test_readiness_that_nobody_waits_for_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with pytest.raises(RbdnbdError) as refused:
        daemon.ready()
    assert refused.value.message == (
        "nobody waits for this process to be ready any more: No such file or directory"
    )


def test_a_process_that_is_gone_needs_no_waiting():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    with daemon.watching(process.pid) as gone:
        assert gone(0)


def test_a_process_that_stays_is_waited_for_as_long_as_was_said():
    begin = time.monotonic()
    with daemon.watching(os.getpid()) as gone:
        assert not gone(0.1)
    assert time.monotonic() - begin >= 0.1


def test_the_waiting_ends_with_the_process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.stdin
        threading.Timer(0.1, process.stdin.close).start()
        with daemon.watching(process.pid) as gone:
            assert gone(20)


def test_waiting_leaves_no_descriptor():
    before = os.listdir("/proc/self/fd")
    with daemon.watching(os.getpid()) as gone:
        gone(0)
    assert os.listdir("/proc/self/fd") == before


def test_progress_that_nobody_listens_to_any_more_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    daemon.notify(STOPPING=1, STATUS="draining")


def test_a_name_with_a_line_break_does_not_forge_a_field(pid_file):
    script = (
        "daemon.notify(STATUS='opening rbd/a\\nREADY=1\\nX_RBDNBD_DEVICE=/dev/nbd0')\n"
        f"{writes(pid_file)}{LIVES}"
    )
    assert start(script)[0]["X_RBDNBD_DEVICE"] == "/dev/nbd7"


def test_a_parent_that_ignores_the_end_of_children_is_told_of_it_all_the_same():
    """Whoever starts us may ignore SIGCHLD. Seen to fail with waitpid's error let out."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert refusal("sys.exit(3)").message == "the process ended while starting"
    finally:
        signal.signal(signal.SIGCHLD, before)
