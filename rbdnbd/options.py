"""The command line's words for images and clusters, shared by the commands.

Ceph's own options are taken where a user of rbd expects them. CEPH_CONF and CEPH_ARGS count as
well: librados reads both, but for what it must know before it can be asked (the client's name and
the path of ceph.conf), which is picked out of CEPH_ARGS here.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import click

from rbdnbd.errors import UsageError
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions

Command = Callable[..., Any]


def cluster_options(command: Command) -> Command:
    """Add Ceph's options to a command, which gets a `ClusterOptions` as `cluster`."""

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        conf: str,
        cluster: str,
        client_id: str,
        client_name: str,
        keyring: str,
        keyfile: str,
        mon_host: str,
        **kwargs: Any,
    ) -> Any:
        if client_id and client_name:
            raise UsageError("use either --id or --name, not both")
        early = _early_ceph_args()
        name = client_name or (f"client.{client_id}" if client_id else early.name)
        options = ClusterOptions(
            conf=conf or early.conf,
            cluster=cluster or early.cluster,
            name=name,
            keyring=keyring,
            keyfile=keyfile,
            mon_host=mon_host,
        )
        return command(*args, cluster=options, **kwargs)

    return _with_options(_CLUSTER_OPTIONS, wrapped)


def image_options(*, optional: bool = False) -> Callable[[Command], Command]:
    """Return a decorator that adds the image's name to a command.

    The command gets an `ImageSpec` as `spec`, or None if that is `optional` and was left out.
    """
    return lambda command: _with_image(command, optional)


def _with_image(command: Command, optional: bool) -> Command:
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        spec: str | None,
        pool: str,
        namespace: str,
        image: str,
        snap: str,
        snap_id: int | None,
        **kwargs: Any,
    ) -> Any:
        if optional and not any((spec, pool, namespace, image, snap, snap_id)):
            return command(*args, spec=None, **kwargs)
        if bool(spec) == bool(image):
            raise UsageError("name one image: SPEC, or --image")
        parsed = ImageSpec.parse(spec or image)
        for word, given, option in (
            ("pool", parsed.pool, pool),
            ("namespace", parsed.namespace, namespace),
            ("snap", parsed.snap, snap),
        ):
            if given and option and given != option:
                raise UsageError(f"{parsed} and --{word} {option} contradict each other")
        whole = ImageSpec(
            parsed.pool or pool, parsed.namespace or namespace, parsed.image, parsed.snap or snap
        )
        in_a_pool = whole.in_pool("rbd")
        if ImageSpec.parse(str(in_a_pool)) != in_a_pool:
            raise UsageError(f"no image can be called {str(whole)!r}")
        if whole.snap and snap_id is not None:
            raise UsageError("use either a snapshot's name or --snap-id, not both")
        return command(*args, spec=replace(whole, snap_id=snap_id), **kwargs)

    return _with_options(_IMAGE_OPTIONS, wrapped)


def _with_options(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


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
        **kwargs: Any,
    ) -> Any:
        if len(formats) != len(files):
            raise UsageError("give one --encryption-passphrase-file for each --encryption-format")
        plain = {key: kwargs.pop(key) for key in _AS_THEY_ARE if key in kwargs}
        options = MapOptions(
            block_size=int(block_size or 0),
            quiesce_hook=quiesce_hook if quiesce else "",
            encryption=tuple(zip(formats, map(os.path.abspath, files), strict=True)),
            **plain,
        )
        return command(*args, options=options, **kwargs)

    return _with_options(_MAPPING_OPTIONS, wrapped)


def map_only_options(command: Command) -> Command:
    """Add what only a new mapping can be asked for; goes below `mapping_options`."""
    return _with_options(_MAP_ONLY_OPTIONS, command)


def process_options(command: Command) -> Command:
    """Add what concerns the process that serves: `foreground`, `log_file`, `show_cookie`."""
    return _with_options(_PROCESS_OPTIONS, command)


def _option(*names: str, metavar: str, help: str) -> Callable[[Command], Command]:
    return click.option(*names, default="", metavar=metavar, help=help)


_CLUSTER_OPTIONS = (
    _option("-c", "--conf", metavar="FILE", help="ceph.conf, instead of CEPH_CONF and Ceph's own."),
    _option("--cluster", metavar="NAME", help="Name of the cluster.  [default: ceph]"),
    _option("--id", "-i", "client_id", metavar="ID", help="Client, without the type: admin."),
    _option("-n", "--name", "client_name", metavar="TYPE.ID", help="Client: client.admin."),
    _option("--keyring", metavar="FILE", help="The client's keyring."),
    _option("--keyfile", metavar="FILE", help="A file that holds the client's key alone."),
    _option("-m", "--mon-host", metavar="HOST,…", help="The monitors' addresses."),
)

_IMAGE_OPTIONS = (
    click.argument("spec", metavar="[POOL/[NAMESPACE/]]IMAGE[@SNAP]", required=False),
    _option("-p", "--pool", metavar="POOL", help="Pool of the image.  [default: rbd_default_pool]"),
    _option("--namespace", metavar="NAME", help="Namespace of the image."),
    _option("--image", metavar="NAME", help="The image, instead of the argument."),
    _option("--snap", metavar="NAME", help="Snapshot of the image, which is read-only."),
    click.option(
        "--snap-id", type=click.IntRange(min=0), metavar="ID", help="Snapshot, by its number."
    ),
)

_AS_THEY_ARE = frozenset(
    {"read_only", "exclusive", "no_trim", "io_timeout", "reattach_timeout", "cookie", "io_engine"}
    | {"use_ioctl", "nbds_max", "max_part"}
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
    _option("--cookie", metavar="WORDS", help="Identity of the mapping.  [default: a new one]"),
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


class _CephArgs(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"CEPH_ARGS: {message}")


def _early_ceph_args() -> argparse.Namespace:
    """Pick out of CEPH_ARGS what is needed before librados reads the rest of it."""
    parser = _CephArgs(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--conf", default="")
    parser.add_argument("--cluster", default="")
    parser.add_argument("-n", "--name", default="client.admin")
    parser.add_argument("-i", "--id", dest="name", type="client.{}".format)
    try:
        words = shlex.split(os.environ.get("CEPH_ARGS", ""))
    except ValueError as error:
        raise UsageError(f"CEPH_ARGS: {error}") from error
    return parser.parse_known_args(words)[0]
