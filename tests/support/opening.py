"""Open an image as the mapping does, and hear why it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import pytest

from rbdnbd.errors import RbdnbdError
from rbdnbd.image import RbdImage, open_image
from rbdnbd.spec import ClusterOptions, ImageSpec


def opened(
    spec: str | ImageSpec,
    options: ClusterOptions,
    *,
    read_only: bool = False,
    exclusive: bool = False,
    encryption: Sequence[tuple[str, str]] = (),
) -> AbstractContextManager[RbdImage]:
    """Open an image and tell nobody."""
    return open_image(
        ImageSpec.parse(spec) if isinstance(spec, str) else spec,
        options,
        read_only=read_only,
        say=lambda doing: None,
        exclusive=exclusive,
        encryption=encryption,
    )


def refusal(
    spec: str | ImageSpec,
    options: ClusterOptions,
    *,
    read_only: bool = False,
    exclusive: bool = False,
    encryption: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the sentence with which opening an image fails."""
    opening = opened(spec, options, read_only=read_only, exclusive=exclusive, encryption=encryption)
    with pytest.raises(RbdnbdError) as raised, opening:
        pass
    return raised.value.message
