"""The command rbdnbd: click's words around what the other rooms do.

Results go to stdout, everything else to stderr. A refusal is one sentence, `rbdnbd: …`, and a
non-zero status: 2 for a command line that makes no sense, 1 for what cannot be done.

Every command imports the rooms that it needs by itself: `map` is two processes, and the one that
only waits for the other would otherwise spend most of its time on importing.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import click

import rbdnbd
from rbdnbd import daemon
from rbdnbd.devices import NbdDevices
from rbdnbd.errors import Interrupted, RbdnbdError
from rbdnbd.options import cluster_options, image_options
from rbdnbd.spec import ClusterOptions, ImageSpec

log = logging.getLogger(__name__)


class _Words(click.Command):
    """A command that remembers the words it was called with, to be started with them again."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["words"] = list(args)
        return super().parse_args(ctx, args)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(rbdnbd.__version__, "-v", "--version", prog_name="rbdnbd")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Map Ceph RBD images to Linux block devices, or serve them to NBD clients."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command("map", cls=_Words)
@image_options
@click.option("--read-only", is_flag=True, help="Refuse writes; a snapshot is always read-only.")
@click.option("--device", metavar="/dev/nbdN", help="Use this device.  [default: a free one]")
@click.option(
    "--block-size",
    type=click.Choice(["512", "1024", "2048", "4096"]),
    default="512",
    show_default=True,
    help="The device's logical block size in bytes.",
)
@click.option(
    "--io-timeout",
    type=click.IntRange(min=0),
    metavar="SECONDS",
    help="Have the kernel give up on requests that take longer.  [default: wait for ever]",
)
@click.option("--ioctl", "use_ioctl", is_flag=True, help="Attach by ioctl even if netlink works.")
@click.option("-f", "--foreground", is_flag=True, help="Serve in this process, until a signal.")
@click.option("--log-file", metavar="FILE", help="Log there.  [default: syslog, or stderr with -f]")
@cluster_options
@click.pass_context
def map_command(
    ctx: click.Context,
    /,
    spec: ImageSpec,
    cluster: ClusterOptions,
    foreground: bool,
    log_file: str | None,
    block_size: str,
    **options: Any,
) -> None:
    """Map an image to a block device and print the device.

    Returns once the device is live; a background process serves it until `rbdnbd unmap`.
    """
    if options["device"]:
        NbdDevices().index(options["device"])
    if os.geteuid():
        raise RbdnbdError("mapping a device needs root")
    if not foreground:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _exit_by_signal)
        fields = daemon.start(["map", "--foreground", *ctx.meta["words"]], _say)
        click.echo(fields["X_RBDNBD_DEVICE"])
        return
    from rbdnbd.mapping import MapOptions, run_mapping

    cluster = _log_to(log_file, cluster)

    def ready(device: str) -> None:
        daemon.ready(STATUS=f"{spec} is {device}", X_RBDNBD_DEVICE=device)
        if not daemon.in_background():
            click.echo(device)

    run_mapping(spec, cluster, MapOptions(block_size=int(block_size), **options), ready)


@cli.command("unmap")
@click.argument("target", metavar="/dev/nbdN | [POOL/[NAMESPACE/]]IMAGE[@SNAP]")
@click.option("--force", is_flag=True, help="Disconnect it even if it is mounted or not ours.")
@cluster_options
def unmap_command(target: str, force: bool, cluster: ClusterOptions) -> None:
    """Flush and release a device; return when it is free and its process is gone.

    A device that is mounted, or held in another way, is refused.
    """
    from rbdnbd.kernel import NbdDriver
    from rbdnbd.mapped import unmap

    unmap(target, cluster, force=force, say=_say, driver=NbdDriver())


@cli.command("list-mapped")
@click.option("--format", "style", type=click.Choice(["plain", "json"]), default="plain")
def list_mapped(style: str) -> None:
    """List the mappings of this host."""
    from rbdnbd.mapped import mapped

    documents = mapped(NbdDevices())
    columns = ("id", "pool", "namespace", "image", "snap", "device", "cookie")
    if style == "json":
        keys = (*columns, "size", "read_only", "attached_by", "since")
        click.echo(json.dumps([{key: document[key] for key in keys} for document in documents]))
    elif documents:
        rows = [[str(document[key]) for key in columns] for document in documents]
        for row in rows:
            row[columns.index("snap")] = row[columns.index("snap")] or "-"
        _print_table([list(columns), *rows])


@cli.command("stats")
@click.option("--format", "style", type=click.Choice(["plain", "json"]), default="plain")
def stats_command(style: str) -> None:
    """Show what every mapping has done, and what it is doing."""
    from rbdnbd.mapped import mapped

    documents = mapped(NbdDevices())
    if style == "json":
        keys = ("device", "pool", "namespace", "image", "snap", "stats", "in_flight")
        click.echo(json.dumps([{key: document[key] for key in keys} for document in documents]))
    elif documents:
        header = ["device", "command", "requests", "errors", "bytes", "mean ms", "in flight"]
        _print_table([header, *(row for document in documents for row in _stats_rows(document))])


@cli.command("serve")
@image_options
@click.option("--socket", "path", type=click.Path(path_type=Path), help="Listen on a unix socket.")
@click.option("--listen", "address", metavar="[HOST][:PORT]", help="Listen on TCP, on loopback.")
@click.option("--read-only", is_flag=True, help="Refuse writes; a snapshot is always read-only.")
@click.option("--log-file", metavar="FILE", help="Log there instead of to stderr.")
@cluster_options
def serve(
    spec: ImageSpec,
    cluster: ClusterOptions,
    path: Path | None,
    address: str | None,
    read_only: bool,
    log_file: str | None,
) -> None:
    """Serve an image to any NBD client, until a signal comes; print its NBD URI.

    Needs neither root nor a kernel driver. A client may ask for the export by the image's name or
    by the empty name. TCP is neither encrypted nor authenticated: keep it on loopback, which is
    the default, or in a network that you trust.
    """
    if (path is None) == (address is None):
        raise click.UsageError("say where to listen: --socket PATH or --listen HOST:PORT")
    from rbdnbd.listener import listen_tcp, listen_unix, parse_address, uri
    from rbdnbd.mapping import run_server

    host, port = parse_address(address or "")
    cluster = _log_to(log_file, cluster)

    def listen() -> AbstractContextManager[socket.socket]:
        return listen_unix(path) if path else listen_tcp(host, port)

    def ready(sock: socket.socket, export: str) -> None:
        daemon.ready(STATUS=f"serving {export}")
        click.echo(uri(sock, export))

    run_server(spec, cluster, listen, ready, read_only=read_only)


def main() -> NoReturn:
    """Run the command line and exit."""
    logging.basicConfig(level=logging.WARNING, format="rbdnbd: %(message)s")
    try:
        status = cli.main(prog_name="rbdnbd", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except RbdnbdError as error:
        _fail(error.message, error.exit_status, error.errno)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        _fail(error.format_message().rstrip(".") + hint, error.exit_code)
    except Interrupted as error:
        _fail(str(error), 128 + error.number)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's last flush fails, too
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        _fail(str(error), 1, error.errno or 0)


def _fail(message: str, status: int, errno: int = 0) -> NoReturn:
    """Say why in one sentence, to whoever waits for it."""
    if not daemon.failed(message, errno):
        if daemon.in_background():
            log.error("%s", message)
        click.echo(f"rbdnbd: {message}", err=True)
    sys.exit(status)


def _say(doing: str) -> None:
    click.echo(f"rbdnbd: {doing}", err=True)


def _exit_by_signal(number: int, _: object) -> NoReturn:
    raise Interrupted(number)


def _log_to(file: str | None, cluster: ClusterOptions) -> ClusterOptions:
    """Send the log to a file, else to stderr in the foreground and to syslog in the background."""
    from logging.handlers import SysLogHandler, WatchedFileHandler

    handler: logging.Handler
    if file:
        path = os.path.abspath(file)
        try:
            handler = WatchedFileHandler(path)
        except OSError as error:
            message = f"cannot write to the log file {path}: {error.strerror}"
            raise RbdnbdError(message, error.errno or 0) from error
        cluster = replace(cluster, log_file=path)
        layout = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    elif daemon.in_background():
        handler = SysLogHandler("/dev/log") if Path("/dev/log").exists() else logging.NullHandler()
        layout = "rbdnbd[%(process)d]: %(message)s"
    else:
        handler, layout = logging.StreamHandler(), "rbdnbd: %(message)s"
    logging.basicConfig(level=logging.INFO, handlers=[handler], format=layout, force=True)
    sys.excepthook = _log_unhandled
    threading.excepthook = lambda args: _log_unhandled(*args[:3])
    return cluster


def _log_unhandled(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    """Keep the traceback of a defect of ours, also when stderr leads nowhere."""
    log.critical("a defect in rbdnbd: %r", error, exc_info=(kind, error or kind(), trace))


def _stats_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return one row for each command that a mapping has seen or is at."""
    busy = Counter(request["command"] for request in document["in_flight"])
    rows = []
    for command, stats in document["stats"].items():
        if stats["requests"] or busy[command]:
            mean = stats["seconds"] / stats["requests"] * 1000 if stats["requests"] else 0.0
            figures = [stats["requests"], stats["errors"], stats["bytes"], f"{mean:.3f}"]
            rows.append([document["device"], command, *map(str, figures), str(busy[command])])
    return rows


def _print_table(rows: list[list[str]]) -> None:
    """Print rows left-aligned, two blanks between columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
