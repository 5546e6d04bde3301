"""The record of a mapping: who owns it, what a successor finds, and what is never believed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rbdnbd.errors import Busy, RbdnbdError
from rbdnbd.record import Ownership, Record, find, owned
from rbdnbd.spec import ClusterOptions, ImageSpec

COOKIE = "a cookie with blanks / and slashes"
RECORD = Record(
    cookie=COOKIE,
    spec=ImageSpec("rbd", "ns", "vol", "snap"),
    image_id="10d4",
    address="198.18.1.1:0/42",
    cluster=ClusterOptions(name="client.kube", settings=(("rbd_cache", "false"),)),
    options={"encryption": []},
)
OWNER = f"""
import sys
from pathlib import Path
from rbdnbd.record import Ownership
ownership = Ownership({COOKIE!r}, Path(sys.argv[1]))
print("owned", flush=True)
sys.stdin.read()
"""


def test_a_successor_finds_what_was_written(tmp_path: Path) -> None:
    Ownership(COOKIE, tmp_path).write(RECORD)
    assert find(COOKIE, tmp_path) == RECORD


def test_of_another_cookie_nothing_is_known(tmp_path: Path) -> None:
    Ownership(COOKIE, tmp_path).write(RECORD)
    assert find("another", tmp_path) is None
    assert not owned("another", tmp_path)


def test_a_record_is_owned_until_it_is_given_up(tmp_path: Path) -> None:
    ownership = Ownership(COOKIE, tmp_path)
    ownership.write(RECORD)
    assert owned(COOKIE, tmp_path)
    ownership.give_up()
    assert not owned(COOKIE, tmp_path)
    assert find(COOKIE, tmp_path) == RECORD


def test_a_detached_record_says_so(tmp_path: Path) -> None:
    ownership = Ownership(COOKIE, tmp_path)
    ownership.write(RECORD)
    ownership.detach()
    found = find(COOKIE, tmp_path)
    assert found is not None
    assert found.detached
    assert not owned(COOKIE, tmp_path)


def test_a_removed_record_leaves_nothing(tmp_path: Path) -> None:
    ownership = Ownership(COOKIE, tmp_path)
    ownership.write(RECORD)
    ownership.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_process_owns_is_refused_and_what_a_killed_one_did_is_not(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        with pytest.raises(Busy):
            Ownership(COOKIE, tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        Ownership(COOKIE, tmp_path).give_up()


def test_a_shorter_record_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    ownership = Ownership(COOKIE, tmp_path)
    ownership.write(RECORD)
    ownership.write(Record(**{**_fields(RECORD), "address": ""}))
    assert find(COOKIE, tmp_path) == Record(**{**_fields(RECORD), "address": ""})


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"cookie": 1}', b"\xff\xfe"])
def test_what_cannot_be_read_is_no_record(tmp_path: Path, text: bytes) -> None:
    Ownership(COOKIE, tmp_path).give_up()
    (file,) = tmp_path.iterdir()
    file.write_bytes(text)
    assert find(COOKIE, tmp_path) is None


def test_a_secret_on_the_command_line_is_not_written_down(tmp_path: Path) -> None:
    secret = ClusterOptions(settings=(("key", "c2VjcmV0"), ("rbd_cache", "false")))
    Ownership(COOKIE, tmp_path).write(Record(**{**_fields(RECORD), "cluster": secret}))
    (file,) = tmp_path.iterdir()
    assert "c2VjcmV0" not in file.read_text()
    found = find(COOKIE, tmp_path)
    assert found is not None
    assert found.cluster.settings == (("rbd_cache", "false"),)


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    Ownership(COOKIE, tmp_path).write(RECORD)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RbdnbdError, match="cannot write"):
        Ownership(COOKIE, tmp_path / "file" / "run")


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ownership = Ownership(COOKIE, tmp_path)
    ownership.write(RECORD)
    find(COOKIE, tmp_path)
    owned(COOKIE, tmp_path)
    ownership.remove()
    assert len(os.listdir("/proc/self/fd")) == before


def _fields(record: Record) -> dict[str, object]:
    return {name: getattr(record, name) for name in Record.__slots__}
