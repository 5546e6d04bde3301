"""The programs that people use: nbdinfo, nbdcopy, qemu-img, qemu-io, fio, nbd-client."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.support.memory import MemoryImage

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def image() -> MemoryImage:
    return MemoryImage(SIZE)


def run(*command: str | Path) -> str:
    """Run a program that must succeed and complain of nothing; return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, ""), f"{command[0]}: {done.stdout}{done.stderr}"
    return done.stdout


def test_nbdinfo_describes_the_export(door):
    (export,) = json.loads(run("nbdinfo", "--json", door.uri))["exports"]
    assert (export["export-name"], export["export-size"]) == ("rbd/image", SIZE)
    can = ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero")
    assert all(export[each] for each in can)
    cannot = ("is_read_only", "is_rotational", "can_cache", "can_df", "can_fast_zero")
    assert not any(export[each] for each in cannot)
    assert [export[f"block_size_{each}"] for each in ("minimum", "preferred", "maximum")] == [
        1,
        4096,
        32 * MIB,
    ]


def test_nbdinfo_lists_the_export(door):
    found = json.loads(run("nbdinfo", "--list", "--json", door.uri.replace("image", "")))
    assert [export["export-name"] for export in found["exports"]] == ["rbd/image"]


def test_nbdinfo_tells_the_size(door):
    assert run("nbdinfo", "--size", door.uri) == f"{SIZE}\n"


def test_nbdcopy_copies_in_and_out_bit_for_bit(door, image, tmp_path):
    """Some of it is zeroes, which nbdcopy does not send as data."""
    data = os.urandom(5 * MIB) + bytes(6 * MIB) + os.urandom(5 * MIB)
    (tmp_path / "in").write_bytes(data)
    run("nbdcopy", "--flush", tmp_path / "in", door.uri)
    assert image.read(0, SIZE) == data
    assert "write_zeroes" in image.calls and "flush" in image.calls
    run("nbdcopy", door.uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


def test_qemu_img_knows_the_export(door):
    found = json.loads(run("qemu-img", "info", "--output=json", door.uri))
    assert (found["format"], found["virtual-size"]) == ("raw", SIZE)


def test_qemu_img_converts_in_and_out_bit_for_bit(door, image, tmp_path):
    data = os.urandom(3 * MIB) + bytes(6 * MIB) + os.urandom(7 * MIB)
    (tmp_path / "in").write_bytes(data)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "in", door.uri)
    assert image.read(0, SIZE) == data
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "in", door.uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", door.uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


def qemu_io(uri: str, *commands: str) -> str:
    """Run commands of qemu-io, which tells of most failures in its output only."""
    options = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", "-f", "raw", "-t", "none", *options, uri)
    assert "fail" not in output.lower() and "error" not in output.lower(), output
    return output


def test_qemu_io_reads_the_pattern_it_has_written(door):
    qemu_io(
        door.uri, "write -P 0xab 512 65536", "flush", "read -P 0xab 512 65536", "read -P 0 0 512"
    )


def test_qemu_io_reads_zeroes_where_it_has_discarded_or_zeroed(door, image):
    qemu_io(
        door.uri,
        "write -P 0xcd 0 4M",
        "discard 1M 1M",
        "write -z 2M 512k",
        "write -z -u 2560k 512k",
        "read -P 0xcd 0 1M",
        "read -P 0 1M 2M",
        "read -P 0xcd 3M 1M",
    )
    assert {"discard", "write_zeroes", "write_zeroes_no_hole"} <= set(image.calls)


def test_qemu_io_writes_with_fua(unix, image):
    qemu_io(unix.uri, "write -f -P 1 0 4096")
    assert image.calls[:2] == ["write", "flush"]


def test_qemu_io_has_many_requests_in_flight(door):
    writes = [f"aio_write -P {n + 1} {n * 65536} 65536" for n in range(64)]
    reads = [f"aio_read -P {n + 1} {n * 65536} 65536" for n in range(64)]
    qemu_io(door.uri, *writes, "aio_flush", *random.sample(reads, 64), "aio_flush")


def test_qemu_io_may_not_write_to_a_read_only_export(serve, image):
    door = serve(image, read_only=True)
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", door.uri],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode != 0
    assert "denied" in done.stderr.lower()
    assert "write" not in image.calls
    qemu_io_reads = run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 512", door.uri)
    assert "read 512/512" in qemu_io_reads


def test_fio_verifies_what_it_has_written_at_random_at_depth_32(door, tmp_path):
    job = tmp_path / "job.fio"
    job.write_text(
        f"""
[global]
ioengine=nbd
uri={door.uri}
rw=randrw
bsrange=512-64k
blockalign=512
iodepth=32
size={SIZE}
io_size=64M
verify=crc32c
verify_fatal=1
verify_backlog=256
verify_state_save=0
randseed=7
[one]
"""
    )
    output = run("fio", "--output-format=json", job)  # greets the server before the report
    (found,) = json.loads(output[output.index("{\n") :])["jobs"]
    assert found["error"] == 0
    assert found["write"]["total_ios"] > 100 and found["read"]["total_ios"] > 100


def test_nbd_client_lists_the_export(serve, image):
    door = serve(image, "tcp")
    host, port = door.address
    assert "rbd/image" in run("nbd-client", "-l", host, str(port))
