"""What every image behind the server promises; each backend's tests inherit this class."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from rbdnbd.transmission import Image

SIZE = 48 << 20
"""Bytes of the image under test: more than the largest request, and several RBD objects."""


class ImageContract:
    """Tests of an `image` fixture: a writable Image of SIZE bytes that reads as zeroes."""

    @pytest.mark.parametrize("offset", [0, 1, 511, 4 << 20, (4 << 20) - 3, SIZE - 5])
    def test_what_was_written_is_read(self, image: Image, offset: int) -> None:
        image.write(offset, b"12345")
        assert image.read(offset, 5) == b"12345"

    def test_a_write_changes_nothing_beside_it(self, image: Image) -> None:
        image.write(0, b"a" * 12)
        image.write(4, b"b" * 4)
        assert image.read(0, 12) == b"aaaabbbbaaaa"

    def test_what_was_never_written_reads_as_zeroes(self, image: Image) -> None:
        assert image.read(SIZE - 4096, 4096) == bytes(4096)

    def test_the_largest_request_goes_through_in_one_call(self, image: Image) -> None:
        data = bytes(range(256)) * ((32 << 20) // 256)
        image.write(1 << 20, data)
        assert image.read(1 << 20, 32 << 20) == data

    @pytest.mark.parametrize("no_hole", [False, True])
    @pytest.mark.parametrize(("offset", "length"), [(3, 70_001), (4 << 20, 8 << 20), (0, SIZE)])
    def test_zeroes_are_read_where_zeroes_were_written(
        self, image: Image, offset: int, length: int, no_hole: bool
    ) -> None:
        image.write(0, b"x" * (16 << 20))
        image.write_zeroes(offset, length, no_hole=no_hole)
        end = min(offset + length, 16 << 20)
        assert image.read(0, 16 << 20) == (
            b"x" * offset + bytes(end - offset) + b"x" * ((16 << 20) - end)
        )

    def test_a_discard_spares_what_is_beside_it(self, image: Image) -> None:
        image.write(0, b"x" * (12 << 20))
        image.discard(4 << 20, 4 << 20)
        assert image.read(0, 4 << 20) == b"x" * (4 << 20)
        assert image.read(8 << 20, 4 << 20) == b"x" * (4 << 20)

    def test_a_flush_after_writes_and_without_any_succeeds(self, image: Image) -> None:
        image.flush()
        image.write(0, b"x")
        image.flush()

    def test_a_read_past_the_end_is_an_oserror(self, image: Image) -> None:
        with pytest.raises(OSError) as raised:
            image.read(SIZE, 4096)
        assert raised.value.errno == errno.EINVAL

    def test_calls_from_many_threads_do_not_disturb_each_other(self, image: Image) -> None:
        def write_and_read(block: int) -> bool:
            data = bytes([block]) * 65536
            image.write(block * 65536, data)
            return image.read(block * 65536, 65536) == data

        with ThreadPoolExecutor(32) as pool:
            assert all(pool.map(write_and_read, range(256)))
