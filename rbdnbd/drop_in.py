"""The command rbd-nbd: rbdnbd with the arguments, words and exit statuses of Ceph's rbd-nbd.

For callers that know rbd-nbd: `rbd device … -t nbd`, ceph-csi, scripts. docs/compatibility.md says,
option by option, what is the same. Results go to stdout. A refusal is one sentence on stderr,
`rbd-nbd: …`, and status 1; there is no other. Where a sentence of rbd-nbd's is known to callers,
ours is translated into it by its kind, in the process where it arises.

map and attach start themselves again in the background, with the words as they were typed (but a
key, which others could read there), and print the device when it is live.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

import rbdnbd
from rbdnbd import background, daemon
from rbdnbd.devices import NbdDevices
from rbdnbd.drop_in_args import DEVICE, Request, has_value, parse
from rbdnbd.errors import (
    CookieMismatch,
    DeviceBusy,
    Interrupted,
    NoFreeDevice,
    NoProcess,
    NotMapped,
    RbdnbdError,
)
from rbdnbd.listing import listing
from rbdnbd.secrecy import begin_anew, handed_key, handed_on, take_key
from rbdnbd.settings import take_settings

log = logging.getLogger(__name__)

HELP: Final = """\
Usage: rbd-nbd [options] map <image-or-snap-spec>     Make an image a block device
       rbd-nbd [options] attach <image-or-snap-spec>  Serve a device whose process is gone
       rbd-nbd detach <device|image-or-snap-spec>     End the process, leave the device waiting
       rbd-nbd unmap <device|image-or-snap-spec>      Release the device
       rbd-nbd [options] list-mapped                  List the devices and their images

Of map and attach:
  --device <path>                      Take this device, /dev/nbd{num} (attach needs it)
  --read-only                          Refuse writes; a snapshot is always read-only
  --exclusive                          Keep the exclusive lock: no other client can write
  --notrim                             Do not offer discard
  --io-timeout <sec>                   Have the kernel fail requests that take longer (0: never)
  --reattach-timeout <sec>             How long a device waits for attach (default: 30)
  --cookie <string>                    Name the mapping; attach must give the same name
  --show-cookie                        Print the cookie after the device
  --snap-id <id>                       The snapshot that has this id (unmap and detach too)
  --quiesce                            Run the hook before and after a snapshot is made
  --quiesce-hook <path>                The hook (default: /usr/lib/rbd-nbd/rbd-nbd_quiesce)
  --encryption-format <format>         luks, luks1 or luks2; repeat it for a clone's ancestors
  --encryption-passphrase-file <path>  As many as there are formats
  --nbds_max <n>, --max_part <0-255>   For the nbd module, if it is loaded now
  --try-netlink                        Accepted; netlink is used wherever it exists
  -d                                   Stay in the foreground and log to stderr
  -f                                   Stay in the foreground

Of unmap:
  --force                              Release it even if it is mounted or not ours

Of list-mapped:
  --format plain|json|xml              How to print it (default: plain)
  --pretty-format                      Indent JSON and XML

Of Ceph:
  -c, --conf <file>                    ceph.conf
  -i, --id <id>; -n, --name <type.id>  The client
  --cluster <name>                     The cluster's name (default: ceph)
  -m, --mon-host <hosts>               The monitors
  -k, --keyring; -K, --keyfile <file>  The client's key
  --log-file <file>                    Log there
  --no-mon-config                      Do not ask the monitors for configuration
  --<option> <value>                   Any option of Ceph's, as in --debug-rbd 20

  -v, --version                        Print Ceph's version
  -h, --help                           Print this
"""


def main() -> NoReturn:
    """Run the command line and exit with 0 or 1."""
    logging.basicConfig(level=logging.WARNING, format="rbd-nbd: %(message)s")
    request = Request(command="")
    try:
        request = parse(_words(), os.environ, take_settings)
        _run(request)
        sys.exit(0)
    except RbdnbdError as error:
        _fail(sentence(error, request), error.errno)
    except Interrupted as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's last flush fails, too
        _fail(str(error), error.errno or 0)


def _words() -> list[str]:
    """Return the words of the command line, with a key that nobody else can see in them."""
    words, key = take_key(sys.argv[1:], has_value)
    if key:
        begin_anew("rbdnbd.drop_in", words, key)
    return [*(("--key", key) if (key := handed_key()) else ()), *words]


def sentence(error: RbdnbdError, request: Request) -> str:
    """Return what rbd-nbd would say, where callers know its words; else our own sentence."""
    device = request.options.device
    match error:
        case NoProcess() | NotMapped() if request.command == "detach" and not request.spec:
            return f"no process attached to {request.target} found"
        case CookieMismatch():
            return "cookie mismatch" if request.options.cookie else "must specify cookie to attach"
        case DeviceBusy() if device:
            return f"the device {device} is busy"
        case NoFreeDevice():
            return "failed to find unused device"
    return error.message


def _run(request: Request) -> None:
    if not daemon.in_background():
        for warning in request.warnings:
            _say(warning)
    if "--no-mon-config" in request.flags:  # the one option that librados has under no name
        os.environ["CEPH_ARGS"] = f"{os.environ.get('CEPH_ARGS', '')} --no-mon-config"
    match request.command:
        case "help":
            _print(HELP)
        case "version":
            _print_version()
        case "list-mapped":
            from rbdnbd.mapped import mapped

            pretty = "--pretty-format" in request.flags
            _print(listing(mapped(NbdDevices()), request.style, pretty=pretty))
        case "unmap" | "detach":
            _end(request)
        case "map" | "attach":
            _begin(request)


def _print_version() -> None:
    """Print Ceph's version, as rbd says it; nothing else tells it without a cluster."""
    with suppress(OSError):
        os.execvp("rbd", ["rbd", "--version"])
    _print(f"rbdnbd {rbdnbd.__version__}, without Ceph\n")


def _end(request: Request) -> None:
    from rbdnbd.kernel import NbdDriver
    from rbdnbd.mapped import detach, unmap

    driver = NbdDriver()
    if request.spec is None:
        _require_device(request.target, request.command)
    target = request.target if request.spec is None else request.spec
    if request.command == "detach":
        detach(target, request.cluster, say=_say, driver=driver)
    else:
        force = "--force" in request.flags
        unmap(target, request.cluster, force=force, say=_say, driver=driver)


def _require_device(path: str, command: str) -> None:
    """Refuse what is no nbd device, or is not there."""
    if command == "detach":
        if not DEVICE.fullmatch(path):
            raise NoProcess(f"{path} is no nbd device")
    elif not DEVICE.fullmatch(path):
        raise RbdnbdError(f"invalid device path: {path} (expected /dev/nbd{{num}})")
    elif not Path(path).exists():
        raise RbdnbdError(f"failed to open device: {path}")


def _begin(request: Request) -> None:
    if os.geteuid():
        raise RbdnbdError(f"{request.command} needs root")
    if daemon.in_background() or {"-d", "-f"} & request.flags:
        _serve(request)
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_by_signal)
    with handed_on(dict(request.cluster.settings).get("key", "")) as inherited:
        fields = background.start(
            sys.argv[1:], _say, program=("-m", "rbdnbd.drop_in"), inherited=inherited
        )
    _print(_device_line(request, fields["X_RBDNBD_DEVICE"], fields["X_RBDNBD_COOKIE"]))


def _device_line(request: Request, device: str, cookie: str) -> str:
    return f"{device} {cookie}\n" if "--show-cookie" in request.flags and cookie else f"{device}\n"


def _serve(request: Request) -> None:
    """Be the process that serves the device; it is called rbd-nbd by ps."""
    from rbdnbd.logs import log_to

    with suppress(OSError):
        Path("/proc/self/comm").write_text("rbd-nbd")
    assert request.spec is not None
    cluster = log_to(request.cluster.log_file or None, request.cluster, "rbd-nbd")

    def ready(device: str, cookie: str) -> None:
        status = f"{request.spec} is {device}"
        daemon.ready(STATUS=status, X_RBDNBD_DEVICE=device, X_RBDNBD_COOKIE=cookie)
        if not daemon.in_background():
            _print(_device_line(request, device, cookie))

    if request.command == "attach":
        from rbdnbd.attaching import run_attach

        _require_orphan(request)
        run_attach(request.spec, cluster, request.options, ready)
    else:
        from rbdnbd.mapping import run_mapping

        run_mapping(request.spec, cluster, request.options, ready)


def _require_orphan(request: Request) -> None:
    """Refuse to attach a device that has another cookie, or that a living process serves."""
    from rbdnbd.mapped import on_device

    devices, device = NbdDevices(), request.options.device
    assert device is not None
    index = devices.index(device)
    if (devices.backend(index) or request.options.cookie) != request.options.cookie:
        raise CookieMismatch(f"{device} has another cookie")
    if document := on_device(index, devices):
        raise RbdnbdError(f"{device} has process {document['id']} connected")


def _print(text: str) -> None:
    """Write to stdout at once, in the bytes that names were given in."""
    if sys.stdout is not None:
        sys.stdout.buffer.write(text.encode(errors="surrogateescape"))
        sys.stdout.buffer.flush()


def _say(doing: str) -> None:
    sys.stderr.write(f"rbd-nbd: {doing}\n")


def _fail(message: str, number: int = 0) -> NoReturn:
    """Say why in one sentence, to whoever waits for it."""
    if not daemon.failed(message, number):
        if daemon.in_background():
            log.error("%s", message)
        _say(message)
    sys.exit(1)


def _exit_by_signal(number: int, _: object) -> NoReturn:
    raise Interrupted(number)


if __name__ == "__main__":
    main()
