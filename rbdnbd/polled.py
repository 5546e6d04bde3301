"""An image whose requests are started and found finished later, by ctypes on librbd.

The bindings offer such calls only with a callback, for which librbd's threads wait for the
interpreter. Here librbd writes to an eventfd (rbd_set_image_notification) and what is finished is
fetched in batches (rbd_poll_io_events). `PolledImage` is the loop's `PollableImage`, and has those
methods of the bindings' `rbd.Image`, with its errors, that `RbdImage` needs of one.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ctypes import (
    POINTER,
    Structure,
    addressof,
    byref,
    c_char,
    c_char_p,
    c_int,
    c_size_t,
    c_ssize_t,
    c_uint64,
    c_void_p,
    create_string_buffer,
    sizeof,
    string_at,
)
from typing import Any, Final, NoReturn

from rbdnbd.errors import image_error
from rbdnbd.librbd import bind, opened
from rbdnbd.loop import Operation
from rbdnbd.spec import ClusterOptions, ImageSpec

_EVENTFD: Final = 2  # EVENT_TYPE_EVENTFD
_THICK: Final = 1  # RBD_WRITE_ZEROES_FLAG_THICK_PROVISION
_AT_ONCE: Final = 128
_ANY_LUKS: Final = 2  # RBD_ENCRYPTION_FORMAT_LUKS, whose options name no algorithm

_ACTION = (c_int, c_void_p)
_RANGE = (c_int, c_void_p, c_uint64)
_PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {  # the result, then the arguments
    "rados_getaddrs": (c_int, c_void_p, POINTER(c_void_p)),
    "rados_wait_for_latest_osdmap": _ACTION,
    "rados_buffer_free": (None, c_void_p),
    "rbd_set_image_notification": (*_ACTION, c_int, c_int),
    "rbd_poll_io_events": (*_ACTION, POINTER(c_void_p), c_int),
    "rbd_aio_create_completion": (*_ACTION, c_void_p, POINTER(c_void_p)),
    "rbd_aio_get_return_value": (c_ssize_t, c_void_p),
    "rbd_aio_release": (None, c_void_p),
    "rbd_aio_read": (*_RANGE, c_size_t, c_void_p, c_void_p),
    "rbd_aio_write": (*_RANGE, c_size_t, c_void_p, c_void_p),
    "rbd_aio_flush": (*_ACTION, c_void_p),
    "rbd_aio_discard": (*_RANGE, c_uint64, c_void_p),
    "rbd_aio_write_zeroes": (*_RANGE, c_size_t, c_void_p, c_int, c_int),
    "rbd_flush": _ACTION,
    "rbd_get_id": (*_ACTION, c_char_p, c_size_t),
    "rbd_get_size": (*_ACTION, POINTER(c_uint64)),
    "rbd_get_features": (*_ACTION, POINTER(c_uint64)),
    "rbd_stat": (*_ACTION, c_void_p, c_size_t),
    "rbd_snap_set_by_id": (*_ACTION, c_uint64),
    "rbd_snap_get_id": (*_ACTION, c_char_p, POINTER(c_uint64)),
    "rbd_lock_acquire": (*_ACTION, c_int),
    "rbd_lock_get_owners": (*_ACTION, POINTER(c_int), POINTER(c_char_p), POINTER(c_size_t)),
    "rbd_lock_break": (*_ACTION, c_int, c_char_p),
    "rbd_encryption_load": (*_ACTION, c_int, c_void_p, c_size_t),
    "rbd_encryption_load2": (*_ACTION, c_void_p, c_size_t),
}


class _Luks(Structure):
    """The options of luks1 and luks2; those of luks are the same without an algorithm."""

    _fields_ = (("algorithm", c_int), ("passphrase", c_char_p), ("size", c_size_t))


class _Encryption(Structure):
    _fields_ = (("format", c_int), ("options", c_void_p), ("size", c_size_t))


class PolledImage:
    """One open image with a client of its own; `addresses` are that client's."""

    def __init__(self, spec: ImageSpec, options: ClusterOptions, *, read_only: bool) -> None:
        """Open the image, whose pool is named. Blocks; raises `rbd.Error`."""
        bind(_PROTOTYPES)
        with ExitStack() as undo:
            self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._event)
            self._client, self._image = opened(spec, options, undo, _failed, read_only=read_only)
            self._call("rbd_set_image_notification", self._event, _EVENTFD)
            self.addresses = self._addresses()
            self._undo = undo.pop_all()
        self._operations: dict[int, Operation] = {}
        self._ends: dict[int, int] = {}  # of writes under way
        self._completions = (c_void_p * _AT_ONCE)()
        self._completion = c_void_p()
        functions = bind(_PROTOTYPES)
        self._create = functions["rbd_aio_create_completion"]
        self._poll = functions["rbd_poll_io_events"]
        self._result = functions["rbd_aio_get_return_value"]
        self._release = functions["rbd_aio_release"]
        self._get_size, self._size = functions["rbd_get_size"], c_uint64()
        self._read, self._write = functions["rbd_aio_read"], functions["rbd_aio_write"]

    # ---- what the loop calls

    def fileno(self) -> int:
        """Return the eventfd."""
        return self._event

    def start_read(self, operation: Operation, offset: int, buffer: bytearray) -> None:
        """Fill the whole buffer."""
        completion = self._expect(operation)
        memory = byref(c_char.from_buffer(buffer))
        result = self._read(self._image, offset, len(buffer), memory, completion)
        if result < 0:
            self._forget(completion, result)

    def start_write(self, operation: Operation, offset: int, data: bytes | bytearray) -> None:
        """Write all of `data`, or it is found to have failed: librbd cuts it off at the end."""
        completion = self._expect(operation)
        self._ends[completion] = offset + len(data)
        memory = data if isinstance(data, bytes) else byref(c_char.from_buffer(data))
        result = self._write(self._image, offset, len(data), memory, completion)
        if result < 0:
            self._forget(completion, result)

    def start_flush(self, operation: Operation) -> None:
        """Make stable what was finished before."""
        self._start(operation, "rbd_aio_flush")

    def start_discard(self, operation: Operation, offset: int, length: int) -> None:
        """Give space back."""
        self._start(operation, "rbd_aio_discard", offset, length)

    def start_write_zeroes(
        self, operation: Operation, offset: int, length: int, *, no_hole: bool
    ) -> None:
        """Make the range read as zeroes."""
        flags = _THICK if no_hole else 0
        self._start(operation, "rbd_aio_write_zeroes", offset, length, behind=(flags, 0))

    def finished(self) -> list[tuple[Operation, int | Exception]]:
        """Return what was done since the last call."""
        done: list[tuple[Operation, int | Exception]] = []
        count = _AT_ONCE
        while count == _AT_ONCE:
            count = self._poll(self._image, self._completions, _AT_ONCE)
            if self._ends and self._get_size(self._image, byref(self._size)) < 0:
                self._size.value = 0  # nobody can say that a write was not cut off: it has failed
            for completion in self._completions[: max(count, 0)]:
                assert completion is not None
                result = self._result(completion)
                if self._ends.pop(completion, 0) > self._size.value and result >= 0:
                    result = -errno.EINVAL
                self._release(completion)
                failed = image_error(-result, os.strerror(-result)) if result < 0 else result
                done.append((self._operations.pop(completion), failed))
        return done

    def _expect(self, operation: Operation) -> int:
        self._create(None, None, byref(self._completion))
        completion = self._completion.value
        assert completion is not None
        self._operations[completion] = operation
        return completion

    def _forget(self, completion: int, result: int) -> NoReturn:
        del self._operations[completion]
        self._ends.pop(completion, None)
        self._release(completion)
        raise image_error(-result, os.strerror(-result))

    def _start(
        self, operation: Operation, name: str, *range_: int, behind: tuple[int, ...] = ()
    ) -> None:
        completion = self._expect(operation)
        result = bind(_PROTOTYPES)[name](self._image, *range_, completion, *behind)
        if result < 0:
            self._forget(completion, result)

    # ---- what `RbdImage` calls, most of it as of the bindings

    def wait_for_latest_osdmap(self) -> None:
        """Send no request any more before the OSDs know what the monitors know now."""
        result = bind(_PROTOTYPES)["rados_wait_for_latest_osdmap"](self._client)
        if result < 0:
            _failed("rados_wait_for_latest_osdmap", result)

    def close(self) -> None:
        """Close the image, and the client."""
        self._undo.close()

    def id(self) -> str:
        """Return the image's id."""
        text = create_string_buffer(64)
        self._call("rbd_get_id", text, sizeof(text))
        return text.value.decode()

    def size(self) -> int:
        """Return the size in bytes as it is now."""
        return self._number("rbd_get_size")

    def features(self) -> int:
        """Return the image's features."""
        return self._number("rbd_get_features")

    def stat(self) -> dict[str, int]:
        """Return the sizes of the image and of its objects."""
        info = create_string_buffer(256)  # rbd_image_info_t, which begins with both
        self._call("rbd_stat", info, sizeof(info))
        size, object_size = struct.unpack_from("=QQ", info)
        return {"size": size, "obj_size": object_size}

    def set_snap_by_id(self, number: int) -> None:
        """Read a snapshot from now on."""
        self._call("rbd_snap_set_by_id", number)

    def snap_get_id(self, name: str) -> int:
        """Return the id of a snapshot."""
        number = c_uint64()
        self._call("rbd_snap_get_id", name.encode(), byref(number))
        return number.value

    def flush(self) -> None:
        """Make stable what was finished before."""
        self._call("rbd_flush")

    def lock_acquire(self, mode: int) -> None:
        """Take the exclusive lock."""
        self._call("rbd_lock_acquire", mode)

    def lock_get_owners(self) -> Iterator[dict[str, str]]:
        """Return who has the exclusive lock: one client at most."""
        mode, owners, count = c_int(), (c_char_p * 1)(), c_size_t(1)
        try:
            self._call("rbd_lock_get_owners", byref(mode), owners, byref(count))
        except Exception as error:
            if getattr(error, "errno", None) != errno.ENOENT:
                raise
            return iter(())
        return iter([{"owner": owner.decode()} for owner in owners[: count.value] if owner])

    def lock_break(self, mode: int, owner: str) -> None:
        """Break another client's lock."""
        self._call("rbd_lock_break", mode, owner.encode())

    def encryption_load(self, form: int, passphrase: bytes) -> None:
        """Load the key of the image's own encryption."""
        options = _Luks(0, passphrase, len(passphrase))
        pointer, size = _options(form, options)
        self._call("rbd_encryption_load", form, pointer, size)

    def encryption_load2(self, layers: Sequence[tuple[int, bytes]]) -> None:
        """Load the keys of the image and of its ancestors."""
        kept = [_Luks(0, passphrase, len(passphrase)) for _, passphrase in layers]
        each = zip((form for form, _ in layers), kept, strict=True)
        specs = [_Encryption(form, *_options(form, options)) for form, options in each]
        self._call("rbd_encryption_load2", (_Encryption * len(specs))(*specs), len(specs))

    def _number(self, name: str) -> int:
        number = c_uint64()
        self._call(name, byref(number))
        return number.value

    def _call(self, name: str, *arguments: Any) -> None:
        result = bind(_PROTOTYPES)[name](self._image, *arguments)
        if result < 0:
            _failed(name, result)

    def _addresses(self) -> str:
        functions, text = bind(_PROTOTYPES), c_void_p()
        result = functions["rados_getaddrs"](self._client, byref(text))
        if result < 0:
            _failed("rados_getaddrs", result)
        try:
            return string_at(text.value or 0).decode()
        finally:
            functions["rados_buffer_free"](text)


def _options(form: int, options: _Luks) -> tuple[int, int]:
    """Return the address and the size of what a format's options are."""
    skipped = _Luks.passphrase.offset if form == _ANY_LUKS else 0
    return addressof(options) + skipped, sizeof(options) - skipped


def _failed(name: str, result: int) -> NoReturn:
    """Raise what the bindings would."""
    import rbd

    kinds = {errno.ENOENT: rbd.ImageNotFound, errno.EPERM: rbd.PermissionError}
    raise kinds.get(-result, rbd.OSError)(f"{name}: {os.strerror(-result)}", -result)
