"""The command line's words for images and clusters, shared by the commands.

Ceph's own options are taken where a user of rbd expects them. CEPH_CONF and CEPH_ARGS count as
well: librados reads both, but for what it must know before it can be asked (the client's name and
the path of ceph.conf), which `ceph_args` picks out of CEPH_ARGS.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

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
        early = _early_options()
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

    return with_options(_CLUSTER_OPTIONS, wrapped)


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

    return with_options(_IMAGE_OPTIONS, wrapped)


def with_options(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """Add options to a command, in the order in which --help shows them."""
    for option in reversed(options):
        command = option(command)
    return command


def text_option(*names: str, metavar: str, help: str) -> Callable[[Command], Command]:
    """Return the decorator for an option with any words, the empty ones if it is left out."""
    return click.option(*names, default="", metavar=metavar, help=help)


_CLUSTER_OPTIONS = (
    text_option(
        "-c", "--conf", metavar="FILE", help="ceph.conf, instead of CEPH_CONF and Ceph's own."
    ),
    text_option("--cluster", metavar="NAME", help="Name of the cluster.  [default: ceph]"),
    text_option("--id", "-i", "client_id", metavar="ID", help="Client, without the type: admin."),
    text_option("-n", "--name", "client_name", metavar="TYPE.ID", help="Client: client.admin."),
    text_option("--keyring", metavar="FILE", help="The client's keyring."),
    text_option("--keyfile", metavar="FILE", help="A file that holds the client's key alone."),
    text_option("-m", "--mon-host", metavar="HOST,…", help="The monitors' addresses."),
)

_IMAGE_OPTIONS = (
    click.argument("spec", metavar="[POOL/[NAMESPACE/]]IMAGE[@SNAP]", required=False),
    text_option(
        "-p", "--pool", metavar="POOL", help="Pool of the image.  [default: rbd_default_pool]"
    ),
    text_option("--namespace", metavar="NAME", help="Namespace of the image."),
    text_option("--image", metavar="NAME", help="The image, instead of the argument."),
    text_option("--snap", metavar="NAME", help="Snapshot of the image, which is read-only."),
    click.option(
        "--snap-id", type=click.IntRange(min=0), metavar="ID", help="Snapshot, by its number."
    ),
)


def _early_options() -> ClusterOptions:
    """Return what CEPH_ARGS says that librados must be told before it reads the rest of it."""
    text = os.environ.get("CEPH_ARGS", "")
    if not text:
        return ClusterOptions()
    from rbdnbd.ceph_args import early

    return early(text)
