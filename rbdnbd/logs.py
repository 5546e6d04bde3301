"""Where a process of ours logs to: a file, stderr in the foreground, syslog in the background."""

from __future__ import annotations

import logging
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from rbdnbd import daemon
from rbdnbd.errors import RbdnbdError
from rbdnbd.spec import ClusterOptions

log = logging.getLogger(__name__)


def log_to(file: str | None, cluster: ClusterOptions, name: str = "rbdnbd") -> ClusterOptions:
    """Start to log; return the cluster's options with librados' log going to the same file.

    A file that is rotated is opened anew. Raises `RbdnbdError` for one that cannot be written.
    """
    handler: logging.Handler
    if file:
        from logging.handlers import WatchedFileHandler

        path = os.path.abspath(file)
        try:
            handler = WatchedFileHandler(path)
        except OSError as error:
            message = f"cannot write to the log file {path}: {error.strerror}"
            raise RbdnbdError(message, error.errno or 0) from error
        cluster = replace(cluster, log_file=path)
        layout = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    elif daemon.in_background():
        handler = _syslog()
        layout = f"{name}[%(process)d]: %(message)s"
    else:
        handler, layout = logging.StreamHandler(), f"{name}: %(message)s"
    logging.basicConfig(level=logging.INFO, handlers=[handler], format=layout, force=True)
    sys.excepthook = _log_unhandled
    threading.excepthook = lambda args: _log_unhandled(*args[:3])
    return cluster


def _syslog() -> logging.Handler:
    if not Path("/dev/log").exists():
        return logging.NullHandler()
    from logging.handlers import SysLogHandler

    return SysLogHandler("/dev/log")


def _log_unhandled(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    """Keep the traceback of a defect of ours, also when stderr leads nowhere."""
    log.critical("a defect in rbdnbd: %r", error, exc_info=(kind, error or kind(), trace))
