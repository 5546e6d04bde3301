"""The exclusive lock, taken first and kept."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable

import pytest

from rbdnbd.image import RbdImage
from rbdnbd.spec import ClusterOptions
from tests.support.opening import opened, refusal

pytestmark = pytest.mark.usefixtures("each_handle")

Rbd = Callable[..., str]
MakeImage = Callable[..., str]


def refused_write(image: RbdImage) -> int | None:
    """Return the errno with which a write fails."""
    with pytest.raises(OSError) as raised:
        image.write(0, b"x")
    return raised.value.errno


def test_a_lock_that_is_kept_makes_the_writes_of_others_fail(
    image: MakeImage, options: ClusterOptions
) -> None:
    spec = image("16M")
    with opened(spec, options, exclusive=True) as ours, opened(spec, options) as other:
        assert refused_write(other) == errno.EROFS
        ours.write(0, b"ours")
        assert ours.read(0, 4) == b"ours"


def test_a_client_that_does_not_keep_its_lock_gives_it_up(
    image: MakeImage, options: ClusterOptions
) -> None:
    spec = image("16M")
    with opened(spec, options) as other:
        other.write(0, b"x")
        with opened(spec, options, exclusive=True) as ours:
            ours.write(0, b"ours")
            assert refused_write(other) == errno.EROFS


def test_a_lock_that_another_keeps_is_not_to_be_had(
    image: MakeImage, options: ClusterOptions
) -> None:
    spec = image("16M")
    with opened(spec, options, exclusive=True) as other:
        assert refusal(spec, options, exclusive=True) == (
            f"failed to acquire exclusive lock: another client keeps it ({other.address})"
        )
        other.write(0, b"still there")


def test_the_lock_is_let_go_at_the_end(image: MakeImage, options: ClusterOptions, rbd: Rbd) -> None:
    spec = image("16M")
    with opened(spec, options, exclusive=True) as ours:
        (lock,) = json.loads(rbd("lock", "ls", "--format", "json", spec))
        assert lock["address"] == ours.address
    assert json.loads(rbd("lock", "ls", "--format", "json", spec)) == []


def test_an_image_without_the_feature_cannot_be_locked(
    image: MakeImage, options: ClusterOptions
) -> None:
    spec = image("16M", "--image-feature", "layering")
    assert refusal(spec, options, exclusive=True) == (
        f"failed to acquire exclusive lock: {spec} has no feature exclusive-lock"
    )


def test_an_image_that_is_opened_read_only_cannot_be_locked(
    image: MakeImage, options: ClusterOptions
) -> None:
    spec = image("16M")
    assert refusal(spec, options, read_only=True, exclusive=True) == (
        f"failed to acquire exclusive lock: {spec} is opened read-only"
    )
