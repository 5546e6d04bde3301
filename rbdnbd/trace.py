"""A trace: every request as it was received and every reply as it is sent, in one file.

The format is that of nbd-server's transaction log, so that nbd-trdump prints it: a request is its
28 bytes, a reply the 16 bytes of its header, in the order in which they came and went. An option,
28 bytes with a magic of its own, says whether the payload follows each WRITE from there on. Any
number of connections share a file; the format does not tell which of them a record is of.

A record is written whole with one call, at the file's end: processes that share a file, as one
does that takes over from another, cut nothing of each other's.

Format: NetworkBlockDevice/nbd, nbd.h, nbd-helper.h and nbd-trdump.c (3.24).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rbdnbd.errors import RbdnbdError
from rbdnbd.wire import CMD_WRITE, Request, pack_request

log = logging.getLogger(__name__)

_OPTION: Final = struct.Struct(">IIQQI")
_OPTION_MAGIC: Final = 0x25609514
_SET_DATALOG: Final = 1
_FROM_MAGIC: Final = 0x4A93BA39A54F31B6


def _datalog(on: bool) -> bytes:
    """Return the option that says whether the data of a WRITE follows it."""
    return _OPTION.pack(_OPTION_MAGIC, _SET_DATALOG, 0, _FROM_MAGIC, on)


class Trace:
    """A trace that goes on; any thread may call. A file that takes no more ends it, no more."""

    def __init__(self, file: int, path: str, *, with_data: bool) -> None:
        """Write to the end of an open file that says so if it is `with_data`."""
        self._file = file
        self._path = path
        self._with_data = with_data
        self._lock = threading.Lock()
        self._ended = False

    def request(self, request: Request, payload: bytes | bytearray = b"") -> None:
        """Write down a request that was received; data of a WRITE only if it was kept."""
        header = pack_request(request)
        if request.type != CMD_WRITE or not self._with_data:
            self._write(header)
        elif len(payload) == request.length:
            self._write(header, payload)
        else:
            self._write(_datalog(False), header, _datalog(True))

    def reply(self, header: bytes) -> None:
        """Write down the header of a reply that is about to be sent."""
        self._write(header)

    def _write(self, *pieces: bytes | bytearray) -> None:
        length = sum(map(len, pieces))
        with self._lock:
            if self._ended:
                return
            try:
                written = os.writev(self._file, pieces)
                if written < length:
                    os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._ended = True
                log.error("the trace %s ends here: %s", self._path, error.strerror)


@contextmanager
def tracing(path: str, *, with_data: bool = False) -> Iterator[Trace | None]:
    """Write a trace for the time of a `with`; there is None for the path "".

    A file that exists is continued. Nobody but its owner may read it, for it may hold data. Raises
    `RbdnbdError` for one that cannot be written.
    """
    if not path:
        yield None
        return
    path = os.path.abspath(path)
    try:
        file = _begin(path, with_data)
    except OSError as error:
        message = f"cannot write the trace {path}: {error.strerror}"
        raise RbdnbdError(message, error.errno or 0) from error
    try:
        yield Trace(file, path, with_data=with_data)
    finally:
        os.close(file)


def _begin(path: str, with_data: bool) -> int:
    """Open a file and write the option at its end; a FIFO or a device is refused."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    file = os.open(path, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        os.fchmod(file, 0o600)
        os.write(file, _datalog(with_data))
    except OSError:
        os.close(file)
        raise
    return file
