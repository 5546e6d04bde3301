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
from typing import Any, NoReturn

import click

from rbdnbd.errors import UsageError
from rbdnbd.spec import ClusterOptions, ImageSpec

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


def image_options(command: Command) -> Command:
    """Add the image's name to a command, which gets an `ImageSpec` as `spec`."""

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        spec: str | None,
        pool: str,
        namespace: str,
        image: str,
        snap: str,
        **kwargs: Any,
    ) -> Any:
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
        return command(*args, spec=whole, **kwargs)

    return _with_options(_IMAGE_OPTIONS, wrapped)


def _with_options(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


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
