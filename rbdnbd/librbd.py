"""What the Python bindings lack, by ctypes on librbd.so.1: images opened there, quiesce watches.

Whoever creates a snapshot asks the watchers of the image to quiesce, waits for all of them to
complete that, and then tells them to go on (rbd_quiesce_watch in librbd.h, since Ceph 16). The
bindings do not give away the pointers in their objects, so a watch has a client and a handle of its
own, through which nothing is read or written. librbd calls back on threads of its own, and must not
be called from there: a callback only says what is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from ctypes import CDLL, CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_uint64, c_void_p
from typing import Any, Final, NoReturn

from rbdnbd.errors import RbdnbdError
from rbdnbd.spec import ClusterOptions, ImageSpec

_Callback = CFUNCTYPE(None, c_void_p)
_PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {  # the result, then the arguments
    "rados_create2": (c_int, POINTER(c_void_p), c_char_p, c_char_p, c_uint64),
    "rados_conf_set": (c_int, c_void_p, c_char_p, c_char_p),
    "rados_conf_read_file": (c_int, c_void_p, c_char_p),
    "rados_connect": (c_int, c_void_p),
    "rados_shutdown": (None, c_void_p),
    "rados_ioctx_create": (c_int, c_void_p, c_char_p, POINTER(c_void_p)),
    "rados_ioctx_set_namespace": (None, c_void_p, c_char_p),
    "rados_ioctx_destroy": (None, c_void_p),
    "rbd_open": (c_int, c_void_p, c_char_p, POINTER(c_void_p), c_char_p),
    "rbd_open_read_only": (c_int, c_void_p, c_char_p, POINTER(c_void_p), c_char_p),
    "rbd_close": (c_int, c_void_p),
    "rbd_quiesce_watch": (c_int, c_void_p, _Callback, _Callback, c_void_p, POINTER(c_uint64)),
    "rbd_quiesce_unwatch": (c_int, c_void_p, c_uint64),
    "rbd_quiesce_complete": (None, c_void_p, c_uint64, c_int),
}


class QuiesceWatch:
    """A watch on the snapshots of an image, until `close`.

    `ask(True)` says that the image is to be quiesced, which is answered by `complete`, and
    `ask(False)` that it may go on. `ask` is called on a thread of librbd and must return at once.
    """

    def __init__(
        self, spec: ImageSpec, options: ClusterOptions, ask: Callable[[bool], None]
    ) -> None:
        """Open the image, whose pool is named, once more. Blocks; raises `RbdnbdError`."""
        self._spec = spec
        # librbd holds these two, and Python does not know.
        self._callbacks = (_Callback(lambda _: ask(True)), _Callback(lambda _: ask(False)))
        self._handle = c_uint64()
        with ExitStack() as undo:
            # For writing, because a handle for reading only is not told of snapshots.
            _, self._image = opened(spec, options, undo, self._failed)
            watch = (*self._callbacks, None, byref(self._handle))
            self._call("rbd_quiesce_watch", self._image, *watch)
            undo.callback(self._call, "rbd_quiesce_unwatch", self._image, self._handle)
            self._undo = undo.pop_all()

    def complete(self, status: int) -> None:
        """Answer `ask(True)`: 0, or the errno that the snapshot is to fail with. Not from `ask`."""
        bind(_PROTOTYPES)["rbd_quiesce_complete"](self._image, self._handle, -status)

    def close(self) -> None:
        """Stop watching; no `ask` comes any more. Raises `RbdnbdError`."""
        self._undo.close()

    def _call(self, name: str, *arguments: Any) -> None:
        result = bind(_PROTOTYPES)[name](*arguments)
        if result < 0:
            self._failed(name, result)

    def _failed(self, name: str, result: int) -> NoReturn:
        message = f"cannot watch the snapshots of {self._spec}: {name}: {os.strerror(-result)}"
        raise RbdnbdError(message, -result)


def opened(
    spec: ImageSpec,
    options: ClusterOptions,
    undo: ExitStack,
    fail: Callable[[str, int], Any],
    *,
    read_only: bool = False,
) -> tuple[c_void_p, c_void_p]:
    """Return a client and an image opened by it, rados_t and rbd_image_t, both ended by `undo`.

    `fail` is told the function that failed and its negative errno, and raises.
    """
    functions = bind(_PROTOTYPES)

    def call(name: str, *arguments: Any) -> None:
        result = functions[name](*arguments)
        if result < 0:
            fail(name, result)

    client, ioctx, image = c_void_p(), c_void_p(), c_void_p()
    call("rados_create2", byref(client), options.cluster.encode(), options.name.encode(), 0)
    undo.callback(functions["rados_shutdown"], client)
    for key, value in options.overrides().items():
        call("rados_conf_set", client, key.encode(), value.encode())
    # Without a file the environment or the overrides say all, or connecting fails.
    functions["rados_conf_read_file"](client, options.conf.encode() or None)
    call("rados_connect", client)
    call("rados_ioctx_create", client, spec.pool.encode(), byref(ioctx))
    undo.callback(functions["rados_ioctx_destroy"], ioctx)
    functions["rados_ioctx_set_namespace"](ioctx, spec.namespace.encode())
    how = "rbd_open_read_only" if read_only else "rbd_open"
    call(how, ioctx, spec.image.encode(), byref(image), spec.snap.encode() or None)
    undo.callback(call, "rbd_close", image)
    return client, image


_bound: Final[dict[str, Callable[..., Any]]] = {}


def bind(prototypes: Mapping[str, tuple[Any, ...]]) -> Mapping[str, Callable[..., Any]]:
    """Return the C functions of librados and librbd that were asked for until now, by their names.

    A prototype is the type of the result, then those of the arguments. Calls release the GIL. A
    function that this librbd does not have is left out.
    """
    for name, (result, *arguments) in prototypes.items():
        if name not in _bound:
            library = CDLL("librados.so.2" if name.startswith("rados") else "librbd.so.1")
            if (function := getattr(library, name, None)) is not None:
                function.restype, function.argtypes = result, arguments
                _bound[name] = function
    return _bound
