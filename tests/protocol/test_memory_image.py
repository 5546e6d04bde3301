"""The image in memory keeps the contract that the protocol tier relies on."""

from __future__ import annotations

import pytest

from tests.support.contract import SIZE, ImageContract
from tests.support.memory import MemoryImage


class TestMemoryImage(ImageContract):
    @pytest.fixture
    def image(self) -> MemoryImage:
        return MemoryImage(SIZE)
