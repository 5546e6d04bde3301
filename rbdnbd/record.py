"""What must outlive a killed process: which image a device is of, and who its Ceph client was.

A successor needs it to attach and to fence its dead predecessor. There is one small file for each
mapping in the run directory, named after the mapping's cookie and written before the device goes
live. It is believed only together with the kernel, whose device has that cookie (its backend
identifier). Its owner lives for as long as the file is locked (flock): that holds across pid
namespaces, and no later process of the same number is taken for it. The file goes when the device
is released.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from rbdnbd.errors import Busy, RbdnbdError
from rbdnbd.spec import ClusterOptions, ImageSpec

_LOOK_SECONDS: Final = 0.5
_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One mapping: `image_id` and `address` as Ceph gives them, `options` as `map` was given them.

    `detached` says that the last process has closed the image in good order: nothing of its can
    still be on the way.
    """

    cookie: str
    spec: ImageSpec
    image_id: str
    address: str
    cluster: ClusterOptions
    options: dict[str, Any]
    detached: bool = False


class Ownership:
    """The lock that makes this process the owner of a record, until `release` or its end."""

    def __init__(self, cookie: str, run_dir: Path) -> None:
        """Take the lock; raise `Busy` while another living process has it."""
        self._path = _path(cookie, run_dir)
        try:
            run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = _locked(self._path)
        except BlockingIOError as error:
            raise Busy(f"another process has the mapping with the cookie {cookie}") from error
        except OSError as error:
            message = f"cannot write {self._path}: {error.strerror}"
            raise RbdnbdError(message, error.errno or 0) from error
        self.record = _read(self._fd)

    def write(self, record: Record) -> None:
        """Make the record what a successor will find, but for a key given in plain text."""
        settings = tuple(pair for pair in record.cluster.settings if pair[0] != "key")
        record = replace(record, cluster=replace(record.cluster, settings=settings))
        data = json.dumps(asdict(record)).encode()
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))  # a reader minds nothing behind the end of the document
        self.record = record

    def detach(self) -> None:
        """Leave the record to a successor, who will have nobody to fence."""
        if self.record:
            self.write(replace(self.record, detached=True))
        os.close(self._fd)

    def remove(self) -> None:
        """Remove the record: the device is free."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def give_up(self) -> None:
        """Let go of the lock and leave the record as it is."""
        os.close(self._fd)


def find(cookie: str, run_dir: Path) -> Record | None:
    """Return the record of a cookie, whether or not its owner lives."""
    try:
        fd = os.open(_path(cookie, run_dir), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read(fd)
    finally:
        os.close(fd)


def owned(cookie: str, run_dir: Path) -> bool:
    """Tell whether a living process has the record of this cookie."""
    try:
        fd = os.open(_path(cookie, run_dir), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _path(cookie: str, run_dir: Path) -> Path:
    """A cookie may hold anything, and be longer than a file's name."""
    return run_dir / f"{hashlib.sha256(cookie.encode()).hexdigest()[:32]}.json"


def _locked(path: Path) -> int:
    """Open the file, new or as it is, and lock it.

    Again if it was removed in between, and for a moment if it is locked: perhaps `owned` looks.
    """
    deadline = time.monotonic() + _LOOK_SECONDS
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise
            time.sleep(_POLL_SECONDS)
        os.close(fd)


def _read(fd: int) -> Record | None:
    text = os.pread(fd, 1 << 20, 0).decode(errors="replace")
    try:
        fields, _ = json.JSONDecoder().raw_decode(text)
        fields["spec"] = ImageSpec(**fields["spec"])
        settings = tuple((name, value) for name, value in fields["cluster"].pop("settings"))
        fields["cluster"] = ClusterOptions(**fields["cluster"], settings=settings)
        return Record(**fields)
    except (ValueError, TypeError, KeyError):  # new and empty, or of another version
        return None
