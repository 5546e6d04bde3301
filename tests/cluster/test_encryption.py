"""Images that `rbd encryption format` has made: with their keys they are plain, and smaller."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rbd as bindings

from rbdnbd.spec import ClusterOptions
from tests.support.opening import opened, refusal

PASSPHRASE = b"correct horse"
SIZE = 32 << 20
LAYERS = hasattr(bindings.Image, "encryption_load2")

# LUKS means a key to take seconds, and LUKS2 to format an image much longer on a busy machine.
pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("each_handle")]

Rbd = Callable[..., str]
MakeImage = Callable[..., str]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the passphrase and nothing else."""
    path = tmp_path_factory.mktemp("keys") / "key"
    path.write_bytes(PASSPHRASE)
    return str(path)


@pytest.fixture(scope="module", params=["luks1", "luks2"])
def encrypted(request: pytest.FixtureRequest, rbd: Rbd, key: str) -> Iterator[tuple[str, str]]:
    """An encrypted image and its format; the tests share it, for each key takes seconds."""
    spec = f"rbd/test-{uuid.uuid4().hex[:12]}"
    rbd("create", "--size", f"{SIZE}B", spec)
    rbd("encryption", "format", spec, request.param, key)
    yield spec, request.param
    rbd("rm", "--no-progress", spec)


def test_what_is_written_is_stored_encrypted_and_read_as_it_was(
    encrypted: tuple[str, str], key: str, options: ClusterOptions, rbd: Rbd, tmp_path: Path
) -> None:
    spec, format_name = encrypted
    with opened(spec, options, encryption=[(format_name, key)]) as image:
        size = image.size()
        assert 0 < size < SIZE
        image.write(size - 4096, b"plain text" * 100)
    rbd("export", "--no-progress", spec, str(tmp_path / "export"))
    stored = (tmp_path / "export").read_bytes()
    assert stored.startswith(b"LUKS\xba\xbe")
    assert b"plain text" not in stored
    with opened(spec, options, read_only=True, encryption=[(format_name, key)]) as image:
        assert image.read(size - 4096, 1000) == b"plain text" * 100


def test_luks_stands_for_either_version(
    encrypted: tuple[str, str], key: str, options: ClusterOptions
) -> None:
    spec, _ = encrypted
    with opened(spec, options, encryption=[("luks", key)]) as image:
        assert image.size() < SIZE


@pytest.mark.parametrize("encrypted", ["luks1"], indirect=True)
def test_a_newline_at_the_end_of_the_file_is_left_out_if_the_image_does_not_want_it(
    encrypted: tuple[str, str], options: ClusterOptions, tmp_path: Path
) -> None:
    spec, format_name = encrypted
    path = tmp_path / "key"
    path.write_bytes(PASSPHRASE + b"\n")
    with opened(spec, options, encryption=[(format_name, str(path))]) as image:
        assert image.size() < SIZE


@pytest.mark.parametrize("encrypted", ["luks1"], indirect=True)
def test_a_wrong_passphrase_is_refused_and_told_to_nobody(
    encrypted: tuple[str, str],
    options: ClusterOptions,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec, format_name = encrypted
    path = tmp_path / "wrong"
    path.write_bytes(b"guessed")
    with caplog.at_level(logging.DEBUG):
        said = refusal(spec, options, encryption=[(format_name, str(path))])
    assert said == f"{spec} cannot be decrypted with the passphrase in {path}"
    assert "guessed" not in caplog.text


def test_an_image_of_another_format_is_refused(
    encrypted: tuple[str, str], key: str, options: ClusterOptions
) -> None:
    spec, format_name = encrypted
    other = {"luks1": "luks2", "luks2": "luks1"}[format_name]
    said = refusal(spec, options, encryption=[(other, key)])
    assert said == f"{spec} is not encrypted as {other}"


@pytest.mark.parametrize("format_name", ["luks", "luks1", "luks2"])
def test_an_image_that_is_not_encrypted_is_refused(
    format_name: str, image: MakeImage, key: str, options: ClusterOptions
) -> None:
    spec = image("16M")
    said = refusal(spec, options, encryption=[(format_name, key)])
    assert said == f"{spec} is not encrypted as {format_name}"


def test_a_passphrase_file_that_is_missing_is_named(
    image: MakeImage, options: ClusterOptions, tmp_path: Path
) -> None:
    said = refusal(image("16M"), options, encryption=[("luks2", str(tmp_path / "nope"))])
    assert said == f"unable to open passphrase file '{tmp_path}/nope': No such file or directory"


def test_a_format_that_nobody_knows_is_refused(
    image: MakeImage, key: str, options: ClusterOptions
) -> None:
    said = refusal(image("16M"), options, encryption=[("plain", key)])
    assert said == "unknown encryption format 'plain': expected luks, luks1 or luks2"


def test_several_layers_are_loaded_or_refused_as_librbd_can(
    image: MakeImage, key: str, options: ClusterOptions, rbd: Rbd, tmp_path: Path
) -> None:
    parent, clone_key = image("32M"), tmp_path / "clone-key"
    clone_key.write_bytes(b"battery staple")
    layers = [("luks2", str(clone_key)), ("luks1", key)]
    if not LAYERS:
        said = refusal(parent, options, encryption=layers)
        assert said == "this librbd loads the encryption of one layer only: more came with Ceph 18"
        return
    rbd("encryption", "format", parent, "luks1", key)
    with opened(parent, options, encryption=layers[1:]) as opened_image:
        opened_image.write(0, b"of the parent")
    rbd("snap", "create", "--no-progress", f"{parent}@s")
    clone = f"rbd/test-{uuid.uuid4().hex[:12]}"
    rbd("clone", "--rbd-default-clone-format", "2", f"{parent}@s", clone)
    try:
        rbd("encryption", "format", clone, "luks2", str(clone_key))
        with opened(clone, options, encryption=layers) as opened_image:
            opened_image.write(1 << 20, b"of the clone")
        with opened(clone, options, encryption=layers, read_only=True) as opened_image:
            assert opened_image.read(0, 13) == b"of the parent"
            assert opened_image.read(1 << 20, 12) == b"of the clone"
        said = refusal(clone, options, encryption=[layers[0], ("luks1", str(clone_key))])
        assert said == (
            f"{clone} cannot be decrypted with the passphrase in {clone_key} and {clone_key}"
        )
    finally:
        rbd("rm", "--no-progress", clone)
