"""Keys stay with their process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rbdnbd.drop_in_args import has_value
from rbdnbd.secrecy import handed_key, handed_on, take_key

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
KEEPER = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from rbdnbd.secrecy import keep_no_core
os.setresgid(*[int(sys.argv[2])] * 3)
os.setresuid(*[int(sys.argv[2])] * 3)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as it is with every user's processes
keep_no_core()
print("kept", flush=True)
sys.stdin.read()
"""


@contextmanager
def keeper(user: int = 0, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process of a user's that keeps its memory to itself."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    argv = [sys.executable, "-c", KEEPER, str(ROOT), str(user)]
    with subprocess.Popen(argv, **pipes, **how) as process:
        assert process.stdout and process.stdout.readline() == b"kept\n"
        yield process
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize(
    ("words", "rest", "key"),
    [
        ("map x", "map x", ""),
        ("map x --key S", "map x", "S"),
        ("--key=S map x", "map x", "S"),
        ("--key A map x --key=B", "map x", "B"),
        ("map x --key", "map x --key", ""),
        ("map x --cookie --key S", "map x --cookie --key S", ""),
        ("map -i --key --keyring k", "map -i --key --keyring k", ""),
        ("map -- --key S", "map -- --key S", ""),
    ],
)
def test_a_key_is_taken_off_a_command_line(words: str, rest: str, key: str) -> None:
    """Seen to fail without `has_value`: a value that looks like the option was taken for it."""
    assert take_key(words.split(), has_value) == (rest.split(), key)


def test_a_key_is_handed_on_by_a_descriptor_and_taken_once() -> None:
    """Seen to fail with a key that stays in the environment."""
    read = "import os; from rbdnbd.secrecy import handed_key; print(handed_key(), handed_key())"
    with handed_on("c2VjcmV0") as inherited:
        assert "c2VjcmV0" not in str(os.environ)
        done = subprocess.run(
            [sys.executable, "-c", read], pass_fds=inherited, cwd=ROOT, capture_output=True
        )
    assert done.stdout == b"c2VjcmV0 \n"
    assert handed_key() == ""


def test_no_core_is_left_whatever_the_limit(tmp_path: Path) -> None:
    """Seen to fail without PR_SET_DUMPABLE."""

    def unlimited() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)

    with keeper(preexec_fn=unlimited, cwd=tmp_path) as process:
        process.send_signal(signal.SIGABRT)
        _, status = os.waitpid(process.pid, 0)
        process.returncode = -os.WTERMSIG(status)
    assert os.WTERMSIG(status) == signal.SIGABRT
    assert not os.WCOREDUMP(status)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["mem", "environ"])
def test_not_even_its_own_user_looks_into_it(file: str) -> None:
    """Seen to fail without PR_SET_DUMPABLE."""
    with keeper(NOBODY) as process:
        look = ["head", "--bytes=1", f"/proc/{process.pid}/{file}"]
        done = subprocess.run(look, user=NOBODY, group=NOBODY, capture_output=True, text=True)
    assert "Permission denied" in done.stderr
