"""Random operations on a disk, checked against a model, with a log that repeats them.

    python -m tests.support.random_io DEVICE POOL/IMAGE LOG

does what a log says once more, from a disk of zeroes, and exits with 1 and the same sentence if the
disk is still wrong. The idea is that of fsx (Apple, 1991): each operation is done to the disk and
to an array of bytes, and every byte that is read has to be the array's.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

SECTOR = 512
PAGE = 4096
SIZES = (1 << 20, 8 << 20)
"""The least and the most bytes that a disk is resized to."""
WEIGHTS = {
    "read": 300,
    "write": 300,
    "trim": 60,
    "zero": 60,
    "flush": 20,
    "fsync": 40,
    "mapped_read": 50,
    "mapped_write": 100,
    "compare": 5,
    "resize": 3,
}
"""How often of all operations each is done."""
WITHOUT_RANGE = ("flush", "fsync", "compare")


@dataclass(frozen=True, slots=True)
class Operation:
    """One line of a log; `seed` makes what is written, a resize's new size is its `length`."""

    name: str
    offset: int = 0
    length: int = 0
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.offset} {self.length} {self.seed}"

    @classmethod
    def parse(cls, line: str) -> Operation:
        """Read a line of a log; ValueError for one that is none."""
        name, *numbers = line.split()
        if name not in WEIGHTS or len(numbers) != 3:
            raise ValueError(f"no operation: {line.strip()}")
        return cls(name, *map(int, numbers))

    def data(self) -> bytes:
        """Return what is written."""
        return random.Random(self.seed).randbytes(self.length)

    def touches(self, place: int) -> bool:
        """Tell whether it changes the byte at a place, or may do so."""
        if self.name == "resize":
            return self.length <= place
        return self.name in ("write", "trim", "zero", "mapped_write") and (
            self.offset <= place < self.offset + self.length
        )


class Disk(Protocol):
    """What operations are done to; offsets and lengths in bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Return what is on the disk; whole sectors."""

    def write(self, offset: int, data: bytes) -> None:
        """Write whole sectors past the page cache."""

    def trim(self, offset: int, length: int) -> None:
        """Give whole sectors up."""

    def zero(self, offset: int, length: int) -> None:
        """Write zeroes over whole sectors."""

    def flush(self) -> None:
        """Write out and drop the page cache."""

    def fsync(self) -> None:
        """Write out the page cache, and have the disk flush its own."""

    def mapped_read(self, offset: int, length: int) -> bytes:
        """Read any bytes through memory that the disk is mapped to."""

    def mapped_write(self, offset: int, data: bytes, *, synced: bool) -> None:
        """Write any bytes through memory that the disk is mapped to, and write them out if told."""

    def compare(self) -> bytes:
        """Return all of the disk, as somebody else reads it where it is stored."""

    def resize(self, size: int) -> None:
        """Give the disk another size, where it is stored, and wait until it has it here."""


class Wrong(AssertionError):
    """A disk does not hold what was written; one sentence."""


def operations(source: random.Random, count: int) -> Iterator[Operation]:
    """Yield random operations on a disk that the first of them makes 4 MiB large."""
    size = 4 << 20
    yield Operation("resize", 0, size)
    for _ in range(count - 1):
        (name,) = source.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if name in WITHOUT_RANGE:
            yield Operation(name)
        elif name == "resize":
            size = PAGE * source.randint(SIZES[0] // PAGE, SIZES[1] // PAGE)
            yield Operation(name, 0, size)
        else:
            yield _with_range(source, name, size)


def _with_range(source: random.Random, name: str, size: int) -> Operation:
    """Most ranges are short, some lie at an end of the disk, and those of no data are longer."""
    unit = 1 if name.startswith("mapped") else SECTOR
    longest = source.choice((PAGE, 4 * PAGE, 16 * PAGE))
    if name in ("trim", "zero"):
        longest *= source.choice((1, 16))
    length = unit * source.randint(1, longest // unit)
    last = (size - length) // unit
    offset = unit * source.choice((0, last, *(source.randint(0, last) for _ in range(10))))
    return Operation(name, offset, length, source.getrandbits(32))


def run(disk: Disk, todo: Iterable[Operation], log: TextIO | None = None) -> int:
    """Do all operations and return how many there were; raise Wrong at the first wrong byte.

    The disk is to be all zeroes. Each operation is in the log before it is done.
    """
    model, done = bytearray(), list[Operation]()
    for operation in todo:
        if log is not None:
            log.write(f"{operation}\n")
        done.append(operation)
        _do(disk, model, operation, done)
    return len(done)


def _do(disk: Disk, model: bytearray, operation: Operation, done: list[Operation]) -> None:
    offset, length = operation.offset, operation.length
    end = offset + length
    match operation.name:
        case "read" | "mapped_read":
            found = getattr(disk, operation.name)(offset, length)
            _check(found, model[offset:end], offset, done)
        case "write":
            model[offset:end] = operation.data()
            disk.write(offset, operation.data())
        case "mapped_write":
            model[offset:end] = operation.data()
            disk.mapped_write(offset, operation.data(), synced=operation.seed % 2 == 0)
        case "zero":
            model[offset:end] = bytes(length)
            disk.zero(offset, length)
        case "trim":
            disk.trim(offset, length)
            model[offset:end] = _trimmed(disk.read(offset, length), model[offset:end], offset, done)
        case "resize":
            disk.resize(length)
            model[length:] = bytes(max(0, length - len(model)))
        case "compare":
            _check(disk.compare(), model, 0, done)
        case _:
            getattr(disk, operation.name)()


def _trimmed(found: bytes, model: bytes, offset: int, done: list[Operation]) -> bytes:
    """Check that each sector is what it was, or zeroes: a trim may do either. Return which."""
    for place in range(0, len(found), SECTOR):
        sector = found[place : place + SECTOR]
        if any(sector):
            _check(sector, model[place : place + SECTOR], offset + place, done)
    return found


def _check(found: bytes, expected: bytes, offset: int, done: list[Operation]) -> None:
    """Raise Wrong unless all bytes are as expected; say who wrote the first that is not."""
    if found == expected:
        return
    here = f"operation {len(done) - 1} ({done[-1]})"
    if len(found) != len(expected):
        raise Wrong(f"{here}: {len(found)} bytes instead of {len(expected)}")
    at = next(place for place, byte in enumerate(found) if byte != expected[place])
    last = max((number for number, each in enumerate(done) if each.touches(offset + at)), default=0)
    raise Wrong(
        f"{here}: byte {offset + at} is {found[at]:#04x} and not {expected[at]:#04x}, "
        f"last changed by operation {last} ({done[last]})"
    )


def main() -> int:
    """Repeat a log on a device; status 1 and a sentence if a byte is wrong."""
    from tests.support.block_device import BlockDevice

    device, spec, log = sys.argv[1:]
    todo = [Operation.parse(line) for line in Path(log).read_text().splitlines()]
    with closing(BlockDevice(device, spec)) as disk:
        disk.clear()
        try:
            count = run(disk, todo)
        except Wrong as wrong:
            sys.stdout.write(f"{wrong}\n")
            return 1
    sys.stdout.write(f"{count} operations, and not one wrong byte\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
