"""rbd-nbd's options on a real device, each for what the kernel or another client sees of it.

What `rbd` passes on is given to `rbd`. Ceph's own rbd-nbd is asked for the same where both can be.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

from rbdnbd.control import RUN_DIR
from tests.kernel.test_map import run
from tests.support.rbd_nbd import OURS, Done, Run, printed
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nbd_module")

MakeImage = Callable[..., str]
Rbd = Callable[..., str]

DEBUGFS = Path("/sys/kernel/debug")
DEPRECATED = "rbd-nbd: --timeout is deprecated (use --io-timeout)\n"


@pytest.fixture(scope="module")
def timeout() -> Iterator[Callable[[str], int]]:
    """Read the timeout that the driver has for a device, in jiffies."""
    subprocess.run(["mount", "-t", "debugfs", "debugfs", DEBUGFS], check=True)
    yield lambda device: int((DEBUGFS / "nbd" / Path(device).name / "timeout").read_text())
    subprocess.run(["umount", DEBUGFS], check=True)


def test_the_io_timeout_is_the_drivers(
    stock: Run, ours: Run, image: MakeImage, timeout: Callable[[str], int]
) -> None:
    spec = image("16M")
    for device, program, option, warning in (
        ("/dev/nbd3", stock, "--timeout=7", DEPRECATED),
        ("/dev/nbd4", ours, "--timeout=7", DEPRECATED),
        ("/dev/nbd5", ours, "--io-timeout=14", ""),
        ("/dev/nbd6", ours, "--io-timeout=0", ""),
    ):
        words = ("map", spec, "--device", device, "--try-netlink", option)
        assert program(*words) == Done(0, f"{device}\n", warning)
    seven = timeout("/dev/nbd3")
    found = [timeout(f"/dev/nbd{number}") for number in (4, 5, 6)]
    assert found == [seven, 2 * seven, 0]
    assert seven > 0
    printed(stock("unmap", "/dev/nbd3"))
    for device in ("/dev/nbd4", "/dev/nbd5", "/dev/nbd6"):
        printed(ours("unmap", device))


def test_a_key_is_in_no_arguments_list_record_log_or_core(
    ours: Run, image: MakeImage, ceph_conf: Path, evict: Callable[[str], None], tmp_path: Path
) -> None:
    """Seen to fail with a key that the background process gets as it was typed, and without
    PR_SET_DUMPABLE.
    """
    conf, log, cores = ConfigParser(), tmp_path / "log", Path("/proc/sys/kernel/core_pattern")
    conf.read(ceph_conf)
    key, spec, pattern = conf["client.admin"]["key"], image("16M"), cores.read_text()
    words = ("--keyring", "/nowhere", "--key", key, "--log-file", str(log), "--debug-rbd", "5")
    device = printed(ours("map", spec, *words)).strip()
    listed = printed(ours("list-mapped", "--format", "json"))
    server = json.loads(listed)[0]["id"]
    told = [listed, log.read_text(), *(file.read_text() for file in RUN_DIR.glob("*.json"))]
    told += [Path(f"/proc/{server}/{name}").read_text() for name in ("cmdline", "environ")]
    cores.write_text(f"{tmp_path}/core")
    resource.prlimit(server, resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
    os.kill(server, signal.SIGABRT)
    wait_until(lambda: not Path(f"/proc/{server}").exists(), 30, "the process is gone")
    cores.write_text(pattern)
    ours("unmap", device)
    evict(spec)
    assert [text for text in told if key in text] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_after_the_reattach_timeout_requests_fail(
    ours: Run, image: MakeImage, evict: Callable[[str], None]
) -> None:
    spec = image("16M")
    device = printed(ours("map", spec, "--reattach-timeout", "2")).strip()
    (listed,) = json.loads(printed(ours("list-mapped", "--format", "json")))
    os.kill(listed["id"], signal.SIGKILL)
    read = ["timeout", "60", "dd", f"if={device}", "of=/dev/null", "bs=4k", "count=1"]
    done = subprocess.run([*read, "iflag=direct"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Input/output error" in done.stderr
    ours("unmap", device)
    evict(spec)


def test_rbd_passes_on_pool_image_snapshot_and_cephs_options(
    ours: Run, beside_ours: Run, image: MakeImage, rbd: Rbd
) -> None:
    spec = image("16M")
    rbd("snap", "create", "--no-progress", f"{spec}@s")
    where = ("--pool", "rbd", "--image", spec.removeprefix("rbd/"), "--snap", "s")
    options = ("-o", "try-netlink,device=/dev/nbd3", "-o", "notrim", "--rbd-op-threads", "7")
    assert printed(beside_ours(*where, "device", "map", "-t", "nbd", *options)) == "/dev/nbd3\n"
    assert run("blockdev", "--getro", "/dev/nbd3") == "1\n"
    shown = run("ps", "-ww", "-C", "rbd-nbd", "-o", "args=").strip()
    words = "--device=/dev/nbd3 --notrim"
    assert shown.endswith(f"--rbd-op-threads 7 map {spec}@s --try-netlink {words}")
    printed(beside_ours(*where, "device", "unmap", "-t", "nbd"))
    assert ours("list-mapped") == Done(0, "", "")


def test_cephs_options_stand_anywhere_and_in_the_environment(
    ours: Run, image: MakeImage, ceph_conf: Path, tmp_path: Path
) -> None:
    spec, log = image("16M"), tmp_path / "log"
    environment = {"CEPH_CONF": "/nonexistent", "CEPH_ARGS": f"--conf {ceph_conf} --id admin"}
    name = spec.removeprefix("rbd/")
    words = (f"--log-file={log}", "map", "--debug_rbd=20", name, "--read-only", "--rbd-cache=false")
    device = printed(ours(*words, **environment)).strip()
    assert run("blockdev", "--getro", device) == "1\n"
    with open(device, "r+b", buffering=0) as disk, pytest.raises(PermissionError):
        disk.write(bytes(4096))
    printed(ours("unmap", name, **environment))
    assert "librbd" in log.read_text()


def test_a_shell_gets_the_device_and_both_its_streams_back(
    image: MakeImage, ceph_conf: Path
) -> None:
    script = (
        'device=$("$0" map "$1" 2>&1) && echo "$device" && blockdev --getsize64 "$device" &&'
        ' ps -C rbd-nbd -o comm= && "$0" unmap "$device" && ps -C rbd-nbd -o comm= || true'
    )
    environment = {**os.environ, "CEPH_CONF": str(ceph_conf)}
    done = subprocess.run(
        ["sh", "-c", script, *OURS, image("16M")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    device, size, *processes = done.stdout.splitlines()
    assert (device[:8], size, processes) == ("/dev/nbd", str(16 << 20), ["rbd-nbd"])


@pytest.mark.parametrize("option", ["-f", "-d"])
def test_in_the_foreground_it_prints_the_device_and_ends_with_it(
    option: str, ours: Run, image: MakeImage, ceph_conf: Path
) -> None:
    process = subprocess.Popen(
        [*OURS, "map", option, "--debug-rbd=20", image("16M")],
        env={**os.environ, "CEPH_CONF": str(ceph_conf)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    device = process.stdout.readline().strip()
    assert device.startswith("/dev/nbd")
    printed(ours("unmap", device))
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert ("librbd" in log) == (option == "-d")


def test_a_lock_that_is_kept_fails_a_bench_and_one_that_is_not_moves(
    stock: Run, ours: Run, image: MakeImage, ceph_conf: Path
) -> None:
    spec = image("16M")
    bench = ["rbd", "--conf", str(ceph_conf), "bench", "--io-type=write", "--io-total=64K", spec]
    for program in (stock, ours):
        for options, status in ((("--exclusive",), 30), ((), 0)):  # 30: EROFS
            device = printed(program("map", spec, "--try-netlink", *options)).strip()
            write(device, b"before")
            done = subprocess.run(bench, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == status, done.stderr
            write(device, b"and after")
            printed(program("unmap", device))


def write(device: str, data: bytes) -> None:
    """Write to the start of a device, and have it stored."""
    with open(device, "r+b", buffering=0) as disk:
        disk.write(data.ljust(4096))
        os.fsync(disk.fileno())


def test_the_calls_of_cephs_fsx(ours: Run, image: MakeImage, rbd: Rbd) -> None:
    spec = image("16M")
    device = printed(ours("map", "--io-timeout=600", spec)).strip()
    direct = ("oflag=direct", "conv=notrunc", "status=none")
    run("dd", "if=/dev/urandom", f"of={device}", "bs=64k", "count=32", *direct)
    fio = subprocess.Popen(
        [
            *("fio", "--name=io", f"--filename={device}", "--direct=1", "--ioengine=libaio"),
            *("--rw=randwrite", "--bs=4k", "--iodepth=8", "--offset=4m", "--size=4m"),
            *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
            *("--time_based", "--runtime=600"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for mib in (32, 12):
            rbd("resize", "--no-progress", "--allow-shrink", "--size", f"{mib}M", spec)
            wait_until(lambda mib=mib: size(device) == mib << 20, 20, f"{mib} MiB")
        run("blkdiscard", "--zeroout", "--offset", "65536", "--length", "65536", device)
        with open(device, "rb") as disk:
            assert disk.read(65536) != bytes(65536)
            assert disk.read(65536) == bytes(65536)
        fio.send_signal(signal.SIGINT)
        said, _ = fio.communicate(timeout=120)
    finally:
        fio.kill()
    assert "err= 0" in said, said
    printed(ours("unmap", device))


def size(device: str) -> int:
    return int(run("blockdev", "--getsize64", device))
