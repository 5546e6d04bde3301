"""`rbdnbd serve` as a user runs it, with other people's NBD clients and a real image behind it."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.client import READ, WRITE, RawClient
from tests.support.trace import records

Rbd = Callable[..., str]
MakeImage = Callable[..., str]
Serve = Callable[..., "subprocess.Popen[str]"]


def run(*argv: str) -> str:
    """Run a command that has to succeed, and return what it prints."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def serving(ceph_conf: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve an image for the time of a `with`; give the URI that was printed and the process."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rbdnbd", "serve", "-c", str(ceph_conf), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(params=["unix", "tcp", "events"])
def listen(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ...]:
    """Where to listen, and with which engine, in the words of the command line."""
    if request.param == "unix":
        return "--socket", str(tmp_path / "nbd.sock")
    if request.param == "events":
        return "--socket", str(tmp_path / "nbd.sock"), "--io-engine", "events"
    return "--listen", "127.0.0.1:0"


def test_what_nbdcopy_copies_in_is_what_rbd_exports(
    image: MakeImage, ceph_conf: Path, rbd: Rbd, listen: tuple[str, ...], tmp_path: Path
) -> None:
    spec = image("64M")
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(64 << 20))
    with serving(ceph_conf, spec, *listen) as (uri, _):
        run("nbdcopy", "--flush", str(noise), uri)
        rbd("export", "--no-progress", spec, str(tmp_path / "export"))
        assert (tmp_path / "export").read_bytes() == noise.read_bytes()
        run("nbdcopy", uri, str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == noise.read_bytes()


def test_fio_verifies_what_it_has_written_at_depth_32(
    image: MakeImage, ceph_conf: Path, tmp_path: Path
) -> None:
    with serving(ceph_conf, image("64M"), "--socket", str(tmp_path / "s")) as (uri, _):
        run(
            *("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite"),
            *("--bsrange=4k-256k", "--iodepth=32", "--size=64m", "--verify=crc32c"),
            *("--verify_fatal=1", "--verify_state_save=0"),
        )


def test_qemu_io_finds_its_patterns_zeroes_and_discards(
    image: MakeImage, ceph_conf: Path, tmp_path: Path
) -> None:
    commands = (
        *("write -P 1 0 32M", "write -P 2 32M 32M", "read -P 1 0 32M", "write -z 4M 8M"),
        *("read -P 0 4M 8M", "read -P 1 12M 20M", "discard 32M 4M", "read -P 2 36M 28M", "flush"),
    )
    with serving(ceph_conf, image("64M"), "--socket", str(tmp_path / "s")) as (uri, _):
        words = [word for command in commands for word in ("-c", command)]
        assert "ailed" not in run("qemu-io", "-f", "raw", *words, uri)


def test_nbdinfo_is_told_size_name_and_abilities(
    image: MakeImage, ceph_conf: Path, tmp_path: Path
) -> None:
    spec = image("64M")
    with serving(ceph_conf, spec, "--socket", str(tmp_path / "s")) as (uri, _):
        (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
        assert uri == f"nbd+unix:///{spec}?socket={tmp_path}/s"
    assert export["export-size"] == 64 << 20
    assert not export["is_read_only"]
    for ability in ("flush", "fua", "trim", "zero", "multi_conn"):
        assert export[f"can_{ability}"], ability


def test_a_read_only_server_refuses_writes(
    image: MakeImage, ceph_conf: Path, tmp_path: Path
) -> None:
    with serving(ceph_conf, image("16M"), "--read-only", "--socket", str(tmp_path / "s")) as (
        uri,
        _,
    ):
        (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
        assert export["is_read_only"]
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 4k", uri], capture_output=True, check=False
        )
        assert done.returncode != 0


@pytest.mark.parametrize("engine", ["threads", "events"])
def test_a_trace_shows_what_a_client_asked_and_how_it_was_answered(
    engine: str, image: MakeImage, ceph_conf: Path, tmp_path: Path
) -> None:
    """Seen to fail with an engine that was not given the trace."""
    trace = tmp_path / "trace"
    options = ("--socket", str(tmp_path / "s"), "--io-engine", engine, "--trace", str(trace))
    with serving(ceph_conf, image("16M"), *options) as (uri, _):
        run("qemu-io", "-f", "raw", "-c", "write -f 1M 4k", uri)
    found = records(trace)
    (write,) = (record for record in found if record[0] == ">" and record[2] == "NBD_CMD_WRITE")
    assert write[3:] == ("FUA", 1 << 20, 4096)
    assert ("<", write[1], 0) in found[found.index(write) :]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_the_image_closed_and_the_socket_gone(
    number: signal.Signals, image: MakeImage, ceph_conf: Path, rbd: Rbd, tmp_path: Path
) -> None:
    spec, path = image("16M"), tmp_path / "s"
    with serving(ceph_conf, spec, "--socket", str(path)) as (uri, process):
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 4k", uri)
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert not path.exists()
    assert json.loads(rbd("status", "--format", "json", spec))["watchers"] == []
    rbd("export", "--no-progress", spec, str(tmp_path / "export"))
    assert (tmp_path / "export").read_bytes()[:4096] == b"\7" * 4096


def test_the_socket_is_its_owners_alone(image: MakeImage, ceph_conf: Path, tmp_path: Path) -> None:
    with serving(ceph_conf, image("16M"), "--socket", str(tmp_path / "s")):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_a_second_server_on_the_same_socket_is_refused_and_the_first_goes_on(
    image: MakeImage, ceph_conf: Path, tmp_path: Path
) -> None:
    spec, path = image("16M"), tmp_path / "s"
    with serving(ceph_conf, spec, "--socket", str(path)) as (uri, _):
        with serving(ceph_conf, spec, "--socket", str(path)) as (nothing, second):
            _, said = second.communicate(timeout=30)
        assert (nothing, second.returncode) == ("", 1)
        assert said == f"rbdnbd: cannot listen on {path}: another server is listening there\n"
        run("nbdinfo", uri)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("nope/x", "pool nope does not exist"),
        ("rbd/nope", "image rbd/nope does not exist"),
    ],
)
def test_a_failure_is_one_sentence_and_status_1(
    spec: str, sentence: str, ceph_conf: Path, tmp_path: Path
) -> None:
    with serving(ceph_conf, spec, "--socket", str(tmp_path / "s")) as (nothing, process):
        _, said = process.communicate(timeout=30)
    assert (nothing, process.returncode, said) == ("", 1, f"rbdnbd: {sentence}\n")


@pytest.mark.parametrize("engine", ["threads", "events"])
def test_clients_that_garble_stall_and_hoard_neither_stop_others_nor_touch_the_image(
    engine: str, image: MakeImage, ceph_conf: Path, rbd: Rbd, tmp_path: Path
) -> None:
    """Twelve ask for 2 GiB each and take none of it, three hundred say nothing, some break off.

    Seen to fail with memory that is not counted, and with a server that takes any magic.
    """
    spec, path, noise = image("32M"), tmp_path / "s", tmp_path / "noise"
    noise.write_bytes(os.urandom(32 << 20))
    words = ("--socket", str(path), "--io-engine", engine)
    with serving(ceph_conf, spec, *words) as (uri, server), ExitStack() as stack:

        def connect() -> RawClient:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(path))
            return RawClient(sock)

        run("nbdcopy", "--flush", str(noise), uri)
        clients = [connect() for _ in range(12)]
        for client in clients:
            client.go()
            for _ in range(64):
                client.request(READ, 0, 32 << 20)
        for _ in range(300):
            connect()
        for data in (
            b"\xff" * 100,
            struct.pack(">IHHQQI", 0x25609514, 0, WRITE, 1, 0, 4) + b"evil",
        ):
            client = connect().go()
            client.send(data)
            assert client.ended()
        for _ in range(20):
            client = connect().go()
            client.request(WRITE, 0, 32 << 20)
            client.send(b"evil" * 1000)
            client.sock.close()
        run("nbdcopy", uri, str(tmp_path / "back"))
        status = Path(f"/proc/{server.pid}/status").read_text()
    most = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert most < 768 << 10, f"{most >> 10} MiB"
    rbd("export", "--no-progress", spec, str(tmp_path / "export"))
    assert (tmp_path / "back").read_bytes() == noise.read_bytes()
    assert (tmp_path / "export").read_bytes() == noise.read_bytes()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (":0", ""),
        ("0.0.0.0:0", "whoever reaches 0.0.0.0 port 0 can read and write the image"),
    ],
    ids=["loopback", "everybody"],
)
def test_it_listens_on_loopback_and_says_so_if_it_is_open_to_others(
    address: str, said: str, image: MakeImage, ceph_conf: Path
) -> None:
    """Seen to fail with another default, and without the warning."""
    where = ("--listen", address)
    with serving(ceph_conf, image("16M"), *where) as (uri, process):
        host = uri.removeprefix("nbd://").partition(":")[0]
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert host == ("0.0.0.0" if said else "127.0.0.1")
    warnings = [line for line in log.splitlines() if "whoever" in line]
    assert warnings == ([f"rbdnbd: {said}"] if said else [])
