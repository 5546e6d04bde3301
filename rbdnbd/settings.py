"""Which words of a command line are options of Ceph's, and what they set: librados knows.

Any option of Ceph's may be given by its name, with dashes or underscores: `--rbd-op-threads 7`,
`--debug_rbd=20`, and a boolean one also as `--rbd-cache` and `--no-rbd-cache`. An unconnected
handle, which is thrown away, is asked for the name and tries the value.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rbdnbd.errors import RbdnbdError

if TYPE_CHECKING:
    import rados

Settings = tuple[tuple[str, str], ...]

_BOOLEANS = ("true", "false", "1", "0")


def take_settings(words: Sequence[str]) -> tuple[Settings, list[str]]:
    """Return the settings among the words, as (name, value), and the words that are none.

    Raises `RbdnbdError` for a value that the option cannot have, or without Ceph's bindings.
    """
    library = _library(words)
    settings, rest = [], []
    left = list(words)
    while left:
        word = left.pop(0)
        typed, equals, value = word.partition("=")
        name = typed.removeprefix("--").replace("-", "_")
        positive = name.removeprefix("no_")
        if not word.startswith("--"):
            rest.append(word)
            continue
        if library.conf_get(name) is not None:
            if not equals:
                value = _value(library, name, typed, left)
        elif positive != name and not equals and _is_boolean(library, positive):
            name, value = positive, "false"
        else:
            rest.append(word)
            continue
        _check(library, name, value)
        settings.append((name, value))
    return tuple(settings), rest


def _value(library: rados.Rados, name: str, typed: str, left: list[str]) -> str:
    """Take an option's value off the words that are left; a boolean one needs none."""
    if _is_boolean(library, name):
        return left.pop(0) if left and left[0] in _BOOLEANS else "true"
    if not left:
        raise RbdnbdError(f"Option {typed} requires an argument.", errno.EINVAL)
    return left.pop(0)


def _is_boolean(library: rados.Rados, name: str) -> bool:
    """Tell whether an option takes a truth value and nothing else; its value is lost."""
    return _takes(library, name, "true") and not _takes(library, name, "perhaps")


def _check(library: rados.Rados, name: str, value: str) -> None:
    if not _takes(library, name, value):
        raise RbdnbdError(f"parse error setting '{name}' to '{value}'", errno.EINVAL)


def _takes(library: rados.Rados, name: str, value: str) -> bool:
    import rados

    try:
        library.conf_set(name, value)
    except rados.Error:
        return False
    return True


def _library(words: Sequence[str]) -> rados.Rados:
    try:
        import rados
    except ImportError as error:
        unknown = next(word for word in words if word.startswith("--"))
        message = (
            f"cannot tell whether {unknown} is an option of Ceph's: its Python bindings are "
            f"missing for {sys.executable} ({error}): install python3-rados and python3-rbd"
        )
        raise RbdnbdError(message, errno.ENOENT) from error
    return rados.Rados(name="client.admin")
