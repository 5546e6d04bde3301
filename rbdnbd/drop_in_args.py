"""The command line of `rbd-nbd`: what the words ask for, or the sentence that refuses them.

Options may stand before or after the command, as `--opt value` or `--opt=value`, with dashes or
underscores. What is an option neither of rbd-nbd's nor one of Ceph's common ones is left to
`take_settings`, which tells what else Ceph knows by name. The sentences and the order of the checks
are rbd-nbd's (16.2 was run to see them, 18.2 for --snap-id and --encryption-format).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from rbdnbd.errors import RbdnbdError, UsageError
from rbdnbd.listing import FORMATS
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions

QUIESCE_HOOK: Final = "/usr/lib/rbd-nbd/rbd-nbd_quiesce"
COMMANDS: Final = ("map", "unmap", "attach", "detach", "list-mapped")
DEVICE: Final = re.compile(r"/dev/nbd(?:0|[1-9][0-9]{0,5})")

TakeSettings = Callable[[Sequence[str]], tuple[tuple[tuple[str, str], ...], list[str]]]

_FLAGS: Final = frozenset(
    ("-d", "-f", "-h", "--help", "-v", "--version", "--no-mon-config", "--try-netlink")
    + ("--read-only", "--exclusive", "--notrim", "--quiesce", "--show-cookie")
    + ("--pretty-format", "--force")
)
_VALUES: Final = frozenset(
    ("--conf", "--id", "--name", "--cluster", "--mon-host", "--keyring", "--keyfile", "--log-file")
    + ("--device", "--io-timeout", "--timeout", "--reattach-timeout", "--nbds-max", "--max-part")
    + ("--quiesce-hook", "--cookie", "--snap-id", "--encryption-format", "--format")
    + ("--encryption-passphrase-file",)
)
_SHORT: Final = {
    "-c": "--conf",
    "-i": "--id",
    "-n": "--name",
    "-m": "--mon-host",
    "-k": "--keyring",
    "-K": "--keyfile",
    "--user": "--id",
    "--foreground": "-f",
}
_RANGES: Final = {
    "--io-timeout": (2**31, "Invalid argument for io-timeout!"),
    "--timeout": (2**31, "Invalid argument for timeout!"),
    "--reattach-timeout": (2**31, "Invalid argument for reattach-timeout!"),
    "--nbds-max": (2**31, "Invalid argument for nbds_max!"),
    "--max-part": (256, "Invalid argument for max_part(0~255)!"),
    "--snap-id": (2**63, "Invalid argument for snap-id!"),
}
_ENTITY: Final = re.compile(r"(auth|mon|osd|mds|mgr|client)\..*")


def has_value(word: str) -> bool:
    """Tell whether the word behind this one is its value."""
    return _SHORT.get(word, word.replace("_", "-")) in _VALUES


class Refusal(RbdnbdError):
    """A command line that cannot be followed, in rbd-nbd's words."""

    def __init__(self, message: str) -> None:
        super().__init__(message, errno.EINVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a command line asks for.

    `command` is one of COMMANDS, or "help" or "version". `target` is what the command is about, as
    it was typed; `spec` is the image that it names, None for a device.
    """

    command: str
    target: str = ""
    spec: ImageSpec | None = None
    cluster: ClusterOptions = ClusterOptions()
    options: MapOptions = MapOptions()
    flags: frozenset[str] = frozenset()
    style: str = "plain"
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class _Words:
    """The words of a command line, sorted: options, and the rest in its order."""

    flags: set[str] = field(default_factory=set)
    values: dict[str, str] = field(default_factory=dict)
    formats: list[str] = field(default_factory=list)
    passphrases: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    literal: list[str] = field(default_factory=list)

    def number(self, option: str) -> int | None:
        return int(self.values[option]) if option in self.values else None


def parse(
    words: Sequence[str], environment: Mapping[str, str], take_settings: TakeSettings
) -> Request:
    """Return what a command line asks for; raise `Refusal`, or whatever `take_settings` raises."""
    found = _sort(words)
    for command in ("help", "version"):
        if f"--{command}" in found.flags:
            return Request(command=command)
    settings, rest = _settings(found, take_settings)
    command = _command([*rest, *found.literal])
    operands, literal = rest[1:], found.literal if rest else found.literal[1:]
    if command == "attach" and not found.values.get("--device"):
        raise Refusal("must specify device to attach")
    if operands and operands[0].startswith("-"):
        raise Refusal(f"unknown args: {operands[0]}")
    target, spec = _operand(command, [*operands, *literal], found.number("--snap-id"))
    style = found.values.get("--format") or "plain"
    if command == "list-mapped" and style not in FORMATS:
        raise Refusal(f"invalid output format: {style}")
    return Request(
        command=command,
        target=target,
        spec=spec,
        cluster=_cluster(found, environment, settings),
        options=_options(found) if command in ("map", "attach") else MapOptions(),
        flags=frozenset(found.flags),
        style=style,
        warnings=tuple(found.warnings),
    )


def _sort(words: Sequence[str]) -> _Words:
    """Tell options from the rest, checking values as they come; help and version end it."""
    found, left = _Words(), list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            found.literal = left
            break
        typed, equals, value = word.partition("=")
        name = typed.replace("_", "-") if typed.startswith("--") else typed
        name = _SHORT.get(name, name)
        if name in ("-h", "--help", "-v", "--version") and not equals:
            found.flags.add("--help" if name in ("-h", "--help") else "--version")
            break
        if name in _FLAGS and not equals:
            found.flags.add(name)
        elif name in _VALUES:
            if not equals and not left:
                raise Refusal(f"Option {typed} requires an argument.")
            _take(found, name, value if equals else left.pop(0))
        else:
            found.rest.append(word)
    return found


def _take(found: _Words, name: str, value: str) -> None:
    """Keep an option's value if it can be one."""
    if name in _RANGES:
        above, sentence = _RANGES[name]
        if not 0 <= _integer(value, 63 if name == "--snap-id" else 31) < above:
            raise Refusal(sentence)
    if name == "--name" and not _ENTITY.fullmatch(value):
        raise Refusal(
            f"error parsing '{value}': expected string of the form TYPE.ID, "
            "valid types are: auth, mon, osd, mds, mgr, client"
        )
    if name == "--encryption-format":
        if value not in ("luks", "luks1", "luks2"):
            raise Refusal("Invalid encryption format")
        found.formats.append(value)
    elif name == "--encryption-passphrase-file":
        found.passphrases.append(value)
    elif name == "--timeout":
        found.values["--io-timeout"] = value
        found.warnings.append("--timeout is deprecated (use --io-timeout)")
    else:
        found.values[name] = value
        if name in ("--id", "--name"):  # the last one counts
            found.values["--name"] = value if name == "--name" else f"client.{value}"


def _integer(text: str, bits: int) -> int:
    if not text:
        raise Refusal("Expected option value to be integer, got ''")
    if not re.fullmatch(r"\s*[+-]?[0-9]+", text):
        raise Refusal(f"The option value '{text}' is invalid")
    if not -(1 << bits) <= int(text) < 1 << bits:
        raise Refusal(f"The option value '{text}' seems to be invalid")
    return int(text)


def _settings(
    words: _Words, take_settings: TakeSettings
) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """Return Ceph's other options, and the words that are no options of anybody's."""
    settings: tuple[tuple[str, str], ...] = ()
    rest = words.rest
    if any(word.startswith("--") for word in rest):
        settings, rest = take_settings(rest)
    if "-d" in words.flags:
        settings += (("err_to_stderr", "true"), ("log_to_stderr", "true"))
    return settings, rest


def _command(rest: list[str]) -> str:
    if not rest:
        raise Refusal("must specify command")
    command = "list-mapped" if rest[0] == "list" else rest[0]
    if command not in COMMANDS:
        raise Refusal(f"unknown command: {command}")
    return command


def _operand(
    command: str, operands: list[str], snap_id: int | None
) -> tuple[str, ImageSpec | None]:
    """Return what the command is about, and the image if it is one."""
    target, spec = "", None
    if command != "list-mapped":
        if not operands:
            what = "image" if command in ("map", "attach") else "nbd device or image"
            raise Refusal(f"must specify {what}-or-snap-spec")
        target = operands.pop(0)
        if not target.startswith("/dev/") or command in ("map", "attach"):
            spec = _spec(target, snap_id)
    if operands:
        raise Refusal(f"unknown args: {operands[0]}")
    return target, spec


def _spec(text: str, snap_id: int | None) -> ImageSpec:
    try:
        spec = ImageSpec.parse(text)
    except UsageError as error:
        raise Refusal(f"invalid spec '{text}'") from error
    if snap_id is not None and spec.snap:
        raise Refusal("use either snapname or snapid, not both")
    return ImageSpec(spec.pool, spec.namespace, spec.image, spec.snap, snap_id)


def _encryption(words: _Words) -> tuple[tuple[str, str], ...]:
    """Return the pairs of format and passphrase file; files alone are of format luks."""
    formats = words.formats or ["luks"] * len(words.passphrases)
    if len(formats) != len(words.passphrases):
        raise Refusal("Encryption formats count does not match passphrase files count")
    return tuple(zip(formats, words.passphrases, strict=True))


def _options(words: _Words) -> MapOptions:
    device = words.values.get("--device") or None
    if device and not DEVICE.fullmatch(device):
        raise Refusal(f"invalid device path: {device} (expected /dev/nbd{{num}})")
    hook = words.values.get("--quiesce-hook") or QUIESCE_HOOK
    patience = words.number("--reattach-timeout")
    return MapOptions(
        read_only="--read-only" in words.flags,
        device=device,
        io_timeout=words.number("--io-timeout"),
        reattach_timeout=MapOptions().reattach_timeout if patience is None else patience,
        cookie=words.values.get("--cookie", ""),
        exclusive="--exclusive" in words.flags,
        no_trim="--notrim" in words.flags,
        nbds_max=words.number("--nbds-max"),
        max_part=words.number("--max-part"),
        quiesce_hook=hook if "--quiesce" in words.flags else "",
        encryption=_encryption(words),
    )


def _cluster(
    words: _Words, environment: Mapping[str, str], settings: tuple[tuple[str, str], ...]
) -> ClusterOptions:
    """Return Ceph's options; what librados is too late to read in CEPH_ARGS is read here."""
    early = _Words()
    given = environment.get("CEPH_ARGS", "").split()
    for index, word in enumerate(given):
        typed, equals, value = word.partition("=")
        name = _SHORT.get(typed, typed)
        if name in ("--conf", "--cluster", "--id", "--name"):
            _take(early, name, value if equals else "".join(given[index + 1 : index + 2]))
    values = early.values | words.values
    return ClusterOptions(
        conf=values.get("--conf", ""),
        cluster=values.get("--cluster", ""),
        name=values.get("--name", ClusterOptions().name),
        keyring=values.get("--keyring", ""),
        keyfile=values.get("--keyfile", ""),
        mon_host=values.get("--mon-host", ""),
        log_file="" if "-d" in words.flags else values.get("--log-file", ""),
        settings=settings,
    )
