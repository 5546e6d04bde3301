"""What must be known of CEPH_ARGS before librados reads it: the client, and where ceph.conf is."""

from __future__ import annotations

import argparse
import shlex
from typing import NoReturn

from rbdnbd.errors import UsageError
from rbdnbd.spec import ClusterOptions


class _CephArgs(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"CEPH_ARGS: {message}")


def early(text: str) -> ClusterOptions:
    """Pick `conf`, `cluster` and `name` out of CEPH_ARGS. Raises `UsageError`."""
    parser = _CephArgs(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--conf", default="")
    parser.add_argument("--cluster", default="")
    parser.add_argument("-n", "--name", default="client.admin")
    parser.add_argument("-i", "--id", dest="name", type="client.{}".format)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"CEPH_ARGS: {error}") from error
    found = parser.parse_known_args(words)[0]
    return ClusterOptions(conf=found.conf, cluster=found.cluster, name=found.name)
