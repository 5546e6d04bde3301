"""Random operations, their log, and how a wrong disk is told from a right one."""

from __future__ import annotations

import io
import random

import pytest

from tests.support.random_io import SECTOR, SIZES, Operation, Wrong, operations, run


class MemoryDisk:
    """A disk that does all it is asked to do, but for what a subclass breaks."""

    def __init__(self) -> None:
        self.data = bytearray()

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    mapped_read = read

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    def mapped_write(self, offset: int, data: bytes, *, synced: bool) -> None:
        self.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def trim(self, offset: int, length: int) -> None:
        """Leave every other sector as it is."""
        for place in range(offset, offset + length, 2 * SECTOR):
            self.zero(place, SECTOR)

    def flush(self) -> None:
        pass

    fsync = flush

    def compare(self) -> bytes:
        return bytes(self.data)

    def resize(self, size: int) -> None:
        self.data[size:] = bytes(max(0, size - len(self.data)))


class ForgetsASector(MemoryDisk):
    """Its writes across 2 MiB lose their last sector."""

    def write(self, offset: int, data: bytes) -> None:
        lost = SECTOR if offset < 2 << 20 < offset + len(data) else 0
        super().write(offset, data[: len(data) - lost])


class KeepsWhatWasBeyond(MemoryDisk):
    """It shows what was beyond its end when it grows again."""

    def __init__(self) -> None:
        super().__init__()
        self.beyond = bytes(SIZES[1])

    def resize(self, size: int) -> None:
        self.beyond = bytes(self.data) + self.beyond[len(self.data) :]
        self.data = bytearray(self.beyond[:size])


class TrimsTooMuch(MemoryDisk):
    """A trim reaches one sector further than it was asked to."""

    def trim(self, offset: int, length: int) -> None:
        self.zero(offset, min(length + SECTOR, len(self.data) - offset))


def test_a_disk_that_does_what_it_is_asked_passes() -> None:
    """Seen to fail with a model that was not cut at a resize."""
    assert run(MemoryDisk(), operations(random.Random(7), 800)) == 800


@pytest.mark.parametrize("disk", [ForgetsASector, KeepsWhatWasBeyond, TrimsTooMuch])
def test_the_log_of_a_disk_that_is_wrong_repeats_its_failure(disk: type[MemoryDisk]) -> None:
    """Seen to fail with a log without seeds."""
    log = io.StringIO()
    with pytest.raises(Wrong) as first:
        run(disk(), operations(random.Random(2), 20000), log)
    repeated = [Operation.parse(line) for line in log.getvalue().splitlines()]
    with pytest.raises(Wrong) as again:
        run(disk(), repeated)
    assert str(again.value) == str(first.value)
    assert str(first.value).startswith(f"operation {len(repeated) - 1} ({repeated[-1]})")


def test_the_same_seed_gives_the_same_operations_within_the_disk() -> None:
    """Seen to fail with an offset drawn without the length."""
    size, done = 0, list(operations(random.Random(3), 800))
    assert done == list(operations(random.Random(3), 800))
    for each in done:
        if each.name == "resize":
            size = each.length
        assert each.offset + each.length <= size


@pytest.mark.parametrize("line", ["", "read 1 2", "erase 0 512 1", "read 0 x 1"])
def test_a_line_that_is_no_operation_is_refused(line: str) -> None:
    """Seen to fail with a name that was not looked at."""
    with pytest.raises(ValueError):
        Operation.parse(line)
