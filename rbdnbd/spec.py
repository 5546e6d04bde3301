"""How an image is named and its cluster reached: the words of the command line, and no more."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from rbdnbd.errors import UsageError

_SPEC: Final = re.compile(r"(?:([^/@]+)/(?:([^/@]+)/)?)?([^/@]+)(?:@([^/@]+))?")


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """An image's name, `[pool/[namespace/]]image[@snap]`; "" stands for what is left out."""

    pool: str
    namespace: str
    image: str
    snap: str = ""
    snap_id: int | None = None

    @classmethod
    def parse(cls, text: str) -> ImageSpec:
        """Read a spec; `UsageError` if it is none. `a/b` is image b of pool a."""
        match = _SPEC.fullmatch(text)
        if not match or not text.isprintable():
            raise UsageError(f"invalid spec {text!r}: expected [pool/[namespace/]]image[@snap]")
        pool, namespace, image, snap = (part or "" for part in match.groups())
        return cls(pool, namespace, image, snap)

    def in_pool(self, pool: str) -> ImageSpec:
        """Return the spec with `pool` in place of a pool left out."""
        return self if self.pool else replace(self, pool=pool)

    def __str__(self) -> str:
        parts = [self.pool, self.namespace, self.image]
        return "/".join(part for part in parts if part) + (f"@{self.snap}" if self.snap else "")


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Which cluster, and as whom: Ceph's own options, "" for what is left to its configuration.

    `conf` is the path of ceph.conf (else CEPH_CONF, else Ceph's search path), `name` the whole
    entity, as in client.admin. `settings` are any other options of Ceph's, (name, value), in which
    names have underscores.
    """

    conf: str = ""
    cluster: str = ""
    name: str = "client.admin"
    keyring: str = ""
    keyfile: str = ""
    mon_host: str = ""
    log_file: str = ""
    settings: tuple[tuple[str, str], ...] = ()

    def overrides(self) -> dict[str, str]:
        """Return the configuration that the command line sets, stronger than file and CEPH_ARGS.

        librados itself stays off stderr: what a person needs to know is said in a sentence.
        """
        given = {key: getattr(self, key) for key in ("keyring", "keyfile", "mon_host", "log_file")}
        quiet = {"err_to_stderr": "false", "log_to_stderr": "false"}
        named = {key: value for key, value in given.items() if value}
        return quiet | dict(self.settings) | named


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """What `map` and `attach` were asked for.

    `block_size` in bytes (0: 512, or 4096 for an encrypted image), `io_timeout` in seconds (None or
    0: for ever), `reattach_timeout` seconds for which the kernel keeps a device whose server is
    gone. `cookie` "" stands for a new one. `encryption` is a row of (format, passphrase file), the
    image's own first, then its ancestors'. `quiesce_hook` is the program to run around snapshots,
    "" for none. `io_engine` is "threads" or "events". `connections` is how many sockets the kernel
    is given (0: one, or as many as the device has). `queue` are settings of the device's queue,
    (key, value), instead of ours. `trace` is the file for a trace, "" for none.
    """

    read_only: bool = False
    device: str | None = None
    block_size: int = 0
    io_timeout: int | None = None
    reattach_timeout: int = 30
    use_ioctl: bool = False
    cookie: str = ""
    exclusive: bool = False
    no_trim: bool = False
    nbds_max: int | None = None
    max_part: int | None = None
    quiesce_hook: str = ""
    encryption: tuple[tuple[str, str], ...] = ()
    io_engine: str = "threads"
    connections: int = 0
    queue: tuple[tuple[str, str], ...] = ()
    trace: str = ""
    trace_data: bool = False
