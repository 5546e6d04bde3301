"""Images that librbd encrypts: load the keys, and they read and write as plain ones.

The (format, passphrase file) pairs are those of rbd-nbd, the image's own first, then its
ancestors'. The passphrase is what the file holds. If that does not open the image, a newline at the
end is left out: 16.2.15 strips it and later ones do not, so an image may have been formatted either
way.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rbdnbd.errors import RbdnbdError, UsageError
from rbdnbd.spec import ImageSpec

if TYPE_CHECKING:
    import rbd

    from rbdnbd.polled import PolledImage


def load_encryption(
    image: rbd.Image | PolledImage, spec: ImageSpec, encryption: Sequence[tuple[str, str]]
) -> None:
    """Load the keys into an open image, whose size is from then on that of what is encrypted.

    "luks" stands for either version. Blocks for seconds, as LUKS means it to. Raises `RbdnbdError`,
    in whose words and causes there is no passphrase.
    """
    import rbd

    exact = [_content(path) for _, path in encryption]
    stripped = [passphrase.removesuffix(b"\n") for passphrase in exact]
    number = errno.EINVAL
    for formats in _candidates([name for name, _ in encryption]):
        for passphrases in [exact] if exact == stripped else [exact, stripped]:
            try:
                _load(image, list(zip(formats, passphrases, strict=True)))
            except rbd.Error as error:
                number = getattr(error, "errno", None) or errno.EIO
            else:
                return
            if number != errno.EPERM:
                break
        if number != errno.EINVAL:
            break
    raise RbdnbdError(_why_not_loaded(spec, encryption, number), number)


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        message = f"unable to open passphrase file {path!r}: {error.strerror}"
        raise RbdnbdError(message, error.errno or 0) from error


def _candidates(names: Sequence[str]) -> list[list[int]]:
    """Return what to try in turn: librbd's numbers of the formats, one for each layer.

    librbd 16.2 knows no "luks" and loads one layer only. A format that the image does not have is
    refused at once (EINVAL), before a key is derived.
    """
    import rbd

    if len(names) > 1 and not hasattr(rbd.Image, "encryption_load2"):
        raise RbdnbdError(
            "this librbd loads the encryption of one layer only: more came with Ceph 18",
            errno.EOPNOTSUPP,
        )
    known = {"luks1": rbd.RBD_ENCRYPTION_FORMAT_LUKS1, "luks2": rbd.RBD_ENCRYPTION_FORMAT_LUKS2}
    if "luks" in names and not hasattr(rbd, "RBD_ENCRYPTION_FORMAT_LUKS"):
        return [[known["luks2"]], [known["luks1"]]]
    if "luks" in names:
        known["luks"] = rbd.RBD_ENCRYPTION_FORMAT_LUKS
    if unknown := [name for name in names if name not in known]:
        message = f"unknown encryption format {unknown[0]!r}: expected luks, luks1 or luks2"
        raise UsageError(message)
    return [[known[name] for name in names]]


def _load(image: rbd.Image | PolledImage, layers: list[tuple[int, bytes]]) -> None:
    if len(layers) > 1:
        image.encryption_load2(layers)
    else:
        image.encryption_load(*layers[0])


def _why_not_loaded(spec: ImageSpec, encryption: Sequence[tuple[str, str]], number: int) -> str:
    formats = " over ".join(name for name, _ in encryption)
    if number == errno.EPERM:
        files = " and ".join(path for _, path in encryption)
        return f"{spec} cannot be decrypted with the passphrase in {files}"
    if number == errno.EINVAL:
        return f"{spec} is not encrypted as {formats}"
    return f"cannot load the encryption ({formats}) of {spec}: {os.strerror(number)}"
