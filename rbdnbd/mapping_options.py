"""The command line's words for what a mapping, and the process that serves it, can be asked for."""

from __future__ import annotations

import functools
import os
from typing import Any

import click

from rbdnbd.blockqueue import SETTINGS, parse_settings
from rbdnbd.errors import UsageError
from rbdnbd.options import Command, text_option, with_options
from rbdnbd.spec import MapOptions


def mapping_options(command: Command) -> Command:
    """Add what a mapping can be asked for, to a command that gets `MapOptions` as `options`."""

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        block_size: str | None,
        quiesce: bool,
        quiesce_hook: str,
        formats: tuple[str, ...],
        files: tuple[str, ...],
        connections: int | None,
        settings: tuple[str, ...],
        **kwargs: Any,
    ) -> Any:
        if len(formats) != len(files):
            raise UsageError("give one --encryption-passphrase-file for each --encryption-format")
        plain = {key: kwargs.pop(key) for key in _AS_THEY_ARE if key in kwargs}
        options = MapOptions(
            block_size=int(block_size or 0),
            quiesce_hook=quiesce_hook if quiesce else "",
            encryption=tuple(zip(formats, map(os.path.abspath, files), strict=True)),
            connections=connections or 0,
            queue=parse_settings(settings),
            **plain,
        )
        if options.connections > 1 and options.use_ioctl:
            raise UsageError("several --connections need netlink: leave out --ioctl")
        if options.connections > 1 and options.io_timeout:
            raise UsageError(
                "with several --connections the kernel repeats a request that takes long,"
                " it does not give up: leave out --io-timeout"
            )
        return command(*args, options=options, **kwargs)

    return with_options(_MAPPING_OPTIONS, trace_options(wrapped))


def trace_options(command: Command) -> Command:
    """Add `trace`, the file for a trace or "", and `trace_data`."""

    @functools.wraps(command)
    def wrapped(*args: Any, trace: str, trace_data: bool, **kwargs: Any) -> Any:
        if trace_data and not trace:
            raise UsageError("--trace-data needs --trace FILE")
        return command(*args, trace=trace, trace_data=trace_data, **kwargs)

    return with_options(_TRACE_OPTIONS, wrapped)


def map_only_options(command: Command) -> Command:
    """Add what only a new mapping can be asked for; goes below `mapping_options`."""
    return with_options(_MAP_ONLY_OPTIONS, command)


def process_options(command: Command) -> Command:
    """Add what concerns the process that serves: `foreground`, `log_file`, `show_cookie`."""
    return with_options(_PROCESS_OPTIONS, command)


_AS_THEY_ARE = frozenset(
    {"read_only", "exclusive", "no_trim", "io_timeout", "reattach_timeout", "cookie", "io_engine"}
    | {"use_ioctl", "nbds_max", "max_part", "trace", "trace_data"}
)

ENGINE_OPTION = click.option(
    "--io-engine",
    type=click.Choice(["threads", "events"]),
    default="threads",
    show_default=True,
    help="A thread for each request in flight, or one thread for all of them.",
)

_MAPPING_OPTIONS = (
    ENGINE_OPTION,
    click.option("--read-only", is_flag=True, help="Refuse writes; a snapshot does so anyway."),
    click.option("--exclusive", is_flag=True, help="Take the exclusive lock first, and keep it."),
    click.option("--notrim", "no_trim", is_flag=True, help="Offer no discard."),
    click.option(
        "--block-size",
        type=click.Choice(["512", "1024", "2048", "4096"]),
        help="Logical block size in bytes.  [default: 512; 4096 if encrypted]",
    ),
    click.option(
        "--io-timeout",
        type=click.IntRange(min=0),
        metavar="SECONDS",
        help="Have the kernel give up on requests that take longer.  [default: wait for ever]",
    ),
    click.option(
        "--reattach-timeout",
        type=click.IntRange(min=0),
        default=30,
        metavar="SECONDS",
        show_default=True,
        help="Have the kernel keep the device, and what it is asked, if its process is gone.",
    ),
    text_option("--cookie", metavar="WORDS", help="Identity of the mapping.  [default: a new one]"),
    click.option("--quiesce", is_flag=True, help="Run the hook before and after snapshots."),
    click.option(
        "--quiesce-hook",
        default="/usr/lib/rbd-nbd/rbd-nbd_quiesce",
        metavar="FILE",
        show_default=True,
        help="Called as FILE DEVICE quiesce|unquiesce.",
    ),
    click.option(
        "--encryption-format",
        "formats",
        multiple=True,
        type=click.Choice(["luks", "luks1", "luks2"]),
        help="Format of the image's encryption; again for each ancestor's of a clone.",
    ),
    click.option(
        "--encryption-passphrase-file",
        "files",
        multiple=True,
        metavar="FILE",
        help="The passphrase, one file for each format.",
    ),
    click.option(
        "--connections",
        type=click.IntRange(1, 16),
        metavar="N",
        help="Sockets for the kernel, each with a hardware queue.  [default: 1]",
    ),
    click.option(
        "--queue",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"A setting of the device's queue: {', '.join(SETTINGS)}.",
    ),
)

_TRACE_OPTIONS = (
    text_option("--trace", metavar="FILE", help="Write down requests and replies, for nbd-trdump."),
    click.option("--trace-data", is_flag=True, help="Write down the data of writes as well."),
)

_MAP_ONLY_OPTIONS = (
    click.option("--ioctl", "use_ioctl", is_flag=True, help="Attach by ioctl, not netlink."),
    click.option(
        "--nbds-max", type=click.IntRange(min=1), metavar="N", help="Devices, if nbd is loaded now."
    ),
    click.option(
        "--max-part",
        type=click.IntRange(0, 255),
        metavar="N",
        help="Partitions of a device, if nbd is loaded now.",
    ),
)

_PROCESS_OPTIONS = (
    click.option("-f", "--foreground", is_flag=True, help="Serve in this process."),
    click.option(
        "--log-file", metavar="FILE", help="Log there.  [default: syslog, or stderr with -f]"
    ),
    click.option("--show-cookie", is_flag=True, help="Print the cookie behind the device."),
)
