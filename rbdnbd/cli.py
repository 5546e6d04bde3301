"""The command rbdnbd: click's words around what the other rooms do.

Results go to stdout, everything else to stderr. A refusal is one sentence, `rbdnbd: …`, and a
non-zero status: 2 for a command line that makes no sense, 1 for what cannot be done.

Every command imports the rooms that it needs by itself: `map` is two processes, and the one that
only waits for the other would otherwise spend most of its time on importing.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

import rbdnbd
from rbdnbd import background, daemon
from rbdnbd.cli_list import list_mapped, name_command, stats_command
from rbdnbd.devices import NbdDevices
from rbdnbd.errors import Interrupted, RbdnbdError
from rbdnbd.mapping_options import (
    ENGINE_OPTION,
    map_only_options,
    mapping_options,
    process_options,
    trace_options,
)
from rbdnbd.options import cluster_options, image_options
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions

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
@image_options()
@click.option("--device", metavar="/dev/nbdN", help="Use this device.  [default: a free one]")
@click.option(
    "--or-attach", is_flag=True, help="Go on with a device of the image whose process is gone."
)
@mapping_options
@map_only_options
@process_options
@cluster_options
@click.pass_context
def map_command(
    ctx: click.Context,
    /,
    spec: ImageSpec,
    cluster: ClusterOptions,
    options: MapOptions,
    device: str | None,
    or_attach: bool,
    foreground: bool,
    log_file: str | None,
    show_cookie: bool,
) -> None:
    """Map an image to a block device and print the device.

    Returns once the device is live; a background process serves it until `rbdnbd unmap`. With
    --or-attach a device of the same image that has been left by its process, or whose process was
    killed, is served further, with the options that it was mapped with, and none is mapped.
    """
    if device:
        NbdDevices().index(device)
    _require_root()
    if not foreground:
        _start("map", ctx.meta["words"])
        return
    from rbdnbd.logs import log_to
    from rbdnbd.mapping import run_mapping, run_mapping_or_attach

    cluster = log_to(log_file, cluster)
    run = run_mapping_or_attach if or_attach else run_mapping
    run(spec, cluster, replace(options, device=device), _ready(show_cookie))


@cli.command("attach", cls=_Words)
@image_options(optional=True)
@click.option("--device", metavar="/dev/nbdN", required=True, help="The device to take over.")
@click.option(
    "--replace", "take_from_living", is_flag=True, help="Take it from the process that serves it."
)
@mapping_options
@process_options
@cluster_options
@click.pass_context
def attach_command(
    ctx: click.Context,
    /,
    spec: ImageSpec | None,
    cluster: ClusterOptions,
    options: MapOptions,
    device: str,
    take_from_living: bool,
    foreground: bool,
    log_file: str | None,
    show_cookie: bool,
) -> None:
    """Go on serving a device whose process is gone, and print the device.

    Without a spec all is as it was mapped. A process that was killed is fenced first: what it still
    had on its way can not be written any more. With --replace a living one hands over, and nobody
    who uses the device notices: this is how to upgrade rbdnbd.
    """
    NbdDevices().index(device)
    _require_root()
    if not foreground:
        _start("attach", ctx.meta["words"])
        return
    from rbdnbd.attaching import run_attach
    from rbdnbd.logs import log_to

    run_attach(
        spec,
        log_to(log_file, cluster),
        replace(options, device=device),
        _ready(show_cookie),
        take_from_living=take_from_living,
    )


@cli.command("detach")
@click.argument("target", metavar="/dev/nbdN | [POOL/[NAMESPACE/]]IMAGE[@SNAP]")
@cluster_options
def detach_command(target: str, cluster: ClusterOptions) -> None:
    """End a mapping's process and leave the device; what it is asked waits for `rbdnbd attach`."""
    from rbdnbd.kernel import NbdDriver
    from rbdnbd.mapped import detach

    detach(target, cluster, say=_say, driver=NbdDriver())


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


@cli.command("serve")
@image_options()
@click.option("--socket", "path", type=click.Path(path_type=Path), help="Listen on a unix socket.")
@click.option("--listen", "address", metavar="[HOST][:PORT]", help="Listen on TCP, on loopback.")
@click.option("--read-only", is_flag=True, help="Refuse writes; a snapshot is always read-only.")
@click.option("--log-file", metavar="FILE", help="Log there instead of to stderr.")
@ENGINE_OPTION
@trace_options
@cluster_options
def serve(
    spec: ImageSpec,
    cluster: ClusterOptions,
    path: Path | None,
    address: str | None,
    log_file: str | None,
    **options: Any,
) -> None:
    """Serve an image to any NBD client, until a signal comes; print its NBD URI.

    Needs neither root nor a kernel driver. A client may ask for the export by the image's name or
    by the empty name. TCP is neither encrypted nor authenticated: keep it on loopback, which is
    the default, or in a network that you trust. A client that does not end in time what it has
    begun is hung up on; an idle one may stay.
    """
    if (path is None) == (address is None):
        raise click.UsageError("say where to listen: --socket PATH or --listen HOST:PORT")
    from rbdnbd.addresses import listen_tcp, listen_unix, parse_address, uri
    from rbdnbd.logs import log_to
    from rbdnbd.serving import run_server

    host, port = parse_address(address or "")
    cluster = log_to(log_file, cluster)

    def listen() -> AbstractContextManager[socket.socket]:
        return listen_unix(path) if path else listen_tcp(host, port)

    def ready(sock: socket.socket, export: str) -> None:
        daemon.ready(STATUS=f"serving {export}")
        click.echo(uri(sock, export))

    run_server(spec, cluster, listen, ready, MapOptions(**options))


for command in (list_mapped, name_command, stats_command):
    cli.add_command(command)


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


def _fail(message: str, status: int, number: int = 0) -> NoReturn:
    """Say why in one sentence, to whoever waits for it."""
    if not daemon.failed(message, number, status):
        if daemon.in_background():
            log.error("%s", message)
        click.echo(f"rbdnbd: {message}", err=True)
    sys.exit(status)


def _say(doing: str) -> None:
    click.echo(f"rbdnbd: {doing}", err=True)


def _require_root() -> None:
    if os.geteuid():
        raise RbdnbdError("mapping a device needs root")


def _start(command: str, words: list[str]) -> None:
    """Run a command anew in the background, and print what it wants to be printed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_by_signal)
    fields = background.start([command, "--foreground", *words], _say)
    click.echo(fields["X_RBDNBD_PRINTED"])


def _ready(show_cookie: bool) -> Callable[[str, str], None]:
    """Return the function that reports a device that is live, to the parent or on stdout."""

    def ready(device: str, cookie: str) -> None:
        whole = f"{device} {cookie}"
        printed = whole if show_cookie else device
        daemon.ready(STATUS=whole, X_RBDNBD_PRINTED=printed)
        if not daemon.in_background():
            click.echo(printed)

    return ready


def _exit_by_signal(number: int, _: object) -> NoReturn:
    raise Interrupted(number)
