"""Random operations on a mapped device leave in it what they leave in an array of bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.kernel.conftest import Command
from tests.kernel.test_take_over import succeed
from tests.support.block_device import BlockDevice
from tests.support.random_io import Wrong, operations, run
from tests.support.torture import Torture

pytestmark = [pytest.mark.usefixtures("nbd_module"), pytest.mark.torture]

MakeImage = Callable[..., str]

OPERATIONS = 500
"""In a round; the whole form has a hundred rounds for each engine, 100,000 operations in all."""
ROOT = Path(__file__).resolve().parents[2]
LOSES_SOME_WRITES = """
import os
if os.environ.get("RBDNBD_BACKGROUND"):
    import rbdnbd.image
    write = rbdnbd.image.RbdImage.write
    def lossy(self, offset, data):
        if not any(data):
            write(self, offset, data)
            return
        end = offset + len(data)
        while offset < end:
            piece = min(4096 - offset % 4096, end - offset)
            page, data = bytes(data[:piece]), data[piece:]
            if offset // 4096 % 16:
                write(self, offset, page)
            offset += piece
    rbdnbd.image.RbdImage.write = lossy
"""


@pytest.fixture
def kept(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """A directory whose files are there after the run if a test fails, in a VM, too."""
    reports = pytestconfig.getoption("elsewhere_reports", None)
    return reports.parent if reports else tmp_path


@pytest.fixture(autouse=True)
def _cluster(ceph_conf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CEPH_CONF", str(ceph_conf))
    yield


@pytest.mark.parametrize("engine", ["threads", "events"])
def test_random_operations_leave_on_a_device_what_they_leave_in_a_model(
    engine: str, rbdnbd: Command, image: MakeImage, kept: Path, torture: Torture
) -> None:
    """Seen to fail with a process that lost some writes, which the next test has, and with
    `polled` that read a sector short.
    """
    spec = image("4M", "--object-size", "1M")
    device = succeed(rbdnbd("map", spec, "--io-engine", engine))
    with closing(BlockDevice(device, spec)) as disk:
        for number, random in torture.rounds(short=1, whole=100):
            log = kept / f"random-{engine}-{number}.log"
            disk.clear()
            with log.open("w", buffering=1) as written:
                run(disk, operations(random, OPERATIONS), written)
            log.unlink()
    succeed(rbdnbd("unmap", device))


def test_the_log_of_a_failure_repeats_it(
    rbdnbd: Command, image: MakeImage, tmp_path: Path, torture: Torture
) -> None:
    """Seen to fail with a log without the seeds of what is written."""
    spec = image("4M", "--object-size", "1M")
    (tmp_path / "sitecustomize.py").write_text(LOSES_SOME_WRITES)
    device = succeed(rbdnbd("map", spec, PYTHONPATH=f"{tmp_path}:{ROOT}"))
    log = tmp_path / "log"
    _, random = next(torture.rounds(short=1, whole=1))
    with (
        closing(BlockDevice(device, spec)) as disk,
        log.open("w") as written,
        pytest.raises(Wrong) as wrong,
    ):
        run(disk, operations(random, 1000 * OPERATIONS), written)
    replay = subprocess.run(
        [sys.executable, "-m", "tests.support.random_io", device, spec, str(log)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (replay.returncode, replay.stdout) == (1, f"{wrong.value}\n"), replay.stderr
    succeed(rbdnbd("unmap", device))
