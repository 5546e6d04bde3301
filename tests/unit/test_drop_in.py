"""The command rbd-nbd: what its words ask for, what it prints, to where, with which status."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import rbdnbd
from rbdnbd import attaching, background, drop_in, logs, mapped
from rbdnbd.devices import NbdDevices
from rbdnbd.drop_in_args import _FLAGS, _VALUES, QUIESCE_HOOK, Request, parse
from rbdnbd.errors import (
    Busy,
    CookieMismatch,
    DeviceBusy,
    NoFreeDevice,
    NoProcess,
    NotMapped,
    RbdnbdError,
)
from rbdnbd.spec import ClusterOptions, ImageSpec, MapOptions

LIVE = {"X_RBDNBD_DEVICE": "/dev/nbd3", "X_RBDNBD_COOKIE": "C 1"}
IMAGE = ImageSpec("rbd", "", "img")


class Done(NamedTuple):
    status: int | str | None
    out: str
    err: str


class Started(NamedTuple):
    words: list[str]
    program: tuple[str, ...]


def knows_one(words: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """Stand in for librados: it knows --rbd-op-threads N and nothing else."""
    words = list(words)
    if "--rbd-op-threads" not in words:
        return (), words
    at = words.index("--rbd-op-threads")
    return (("rbd_op_threads", words[at + 1]),), words[:at] + words[at + 2 :]


def asked(*words: str, **environment: str) -> Request:
    return parse(words, environment, knows_one)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("CEPH_ARGS", "NOTIFY_SOCKET", "RBDNBD_BACKGROUND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(drop_in, "take_settings", knows_one)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process."""

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["rbd-nbd", *words])
        with pytest.raises(SystemExit) as left:
            drop_in.main()
        out, err = capsys.readouterr()
        return Done(left.value.code, out, err)

    return run


@pytest.fixture
def started(monkeypatch) -> list[Started]:
    """Have a background process be ready at once; returns what was started."""
    starts: list[Started] = []

    def start(words, say, seconds=0.0, program=(), inherited=()):
        starts.append(Started(list(words), program))
        return LIVE

    monkeypatch.setattr(background, "start", start)
    monkeypatch.setattr(drop_in.signal, "signal", lambda *_: None)
    return starts


def process(*arguments: str, **environment: str) -> Done:
    command = [sys.executable, "-P", *arguments]
    how = {"capture_output": True, "text": True, "timeout": 30, "check": False}
    done = subprocess.run(command, env=os.environ | environment, **how)
    return Done(done.returncode, done.stdout, done.stderr)


# What the words mean


@pytest.mark.parametrize(
    "words",
    [
        ("map", "rbd/img", "--io-timeout", "7"),
        ("map", "--io-timeout=7", "rbd/img"),
        ("--io_timeout=7", "map", "rbd/img"),
        ("--io_timeout", "7", "map", "--", "rbd/img"),
    ],
    ids=" ".join,
)
def test_an_option_may_stand_anywhere_in_any_spelling(words):
    request = asked(*words)
    assert (request.command, request.spec) == ("map", IMAGE)
    assert request.options == MapOptions(io_timeout=7)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("", {}),
        ("--read-only", {"read_only": True}),
        ("--exclusive", {"exclusive": True}),
        ("--notrim", {"no_trim": True}),
        ("--device /dev/nbd12", {"device": "/dev/nbd12"}),
        ("--io-timeout 0", {"io_timeout": 0}),
        ("--reattach-timeout 300", {"reattach_timeout": 300}),
        ("--reattach-timeout 0", {"reattach_timeout": 0}),
        ("--nbds_max 64 --max_part 255", {"nbds_max": 64, "max_part": 255}),
        ("--nbds-max=1 --max-part=0", {"nbds_max": 1, "max_part": 0}),
        ("--cookie a --cookie b", {"cookie": "b"}),
        ("--quiesce", {"quiesce_hook": QUIESCE_HOOK}),
        ("--quiesce-hook /q", {}),
        ("--quiesce --quiesce-hook /q", {"quiesce_hook": "/q"}),
        ("--try-netlink --show-cookie", {}),
        ("--encryption-passphrase-file a", {"encryption": (("luks", "a"),)}),
        pytest.param(
            "--encryption-format luks1 --encryption-format luks2 "
            "--encryption-passphrase-file a --encryption-passphrase-file b",
            {"encryption": (("luks1", "a"), ("luks2", "b"))},
            id="layers",
        ),
    ],
)
@pytest.mark.parametrize("command", ["map", "attach --device /dev/nbd0"])
def test_options_of_map_and_attach(command, words, options):
    at_least = {"device": "/dev/nbd0"} if command != "map" else {}
    request = asked(*command.split(), "rbd/img", *words.split())
    assert request.options == MapOptions(**(at_least | options))


def test_a_cookie_may_hold_blanks():
    assert asked("map", "rbd/img", "--cookie", "a b").options.cookie == "a b"


def test_a_snapshot_may_be_named_by_its_id():
    request = asked("--snap-id", "4", "unmap", "p/ns/img")
    assert request.spec == ImageSpec("p", "ns", "img", "", 4)


@pytest.mark.parametrize(
    ("words", "cluster"),
    [
        ("-c /c -i u -m a,b -k /k -K /f", {"name": "client.u", "keyfile": "/f"}),
        (
            "--conf=/c --id u --mon_host a,b --keyring /k --keyfile=/f",
            {"name": "client.u", "keyfile": "/f"},
        ),
        ("-c /c -n client.x -m a,b -k /k", {"name": "client.x"}),
        ("-c /c --id u --name client.x -m a,b -k /k", {"name": "client.x"}),
        ("-c /c --name client.x --id u -m a,b -k /k", {"name": "client.u"}),
        ("-c /c -m a,b -k /k --cluster east", {"cluster": "east"}),
        ("-c /c -m a,b -k /k --log-file /l", {"log_file": "/l"}),
        (
            "-c /c -m a,b -k /k --rbd-op-threads 7",
            {"settings": (("rbd_op_threads", "7"),)},
        ),
        (
            "-c /c -m a,b -k /k --log-file /l -d",
            {"settings": (("err_to_stderr", "true"), ("log_to_stderr", "true"))},
        ),
    ],
)
def test_cephs_options_reach_librados(words, cluster):
    always = {"conf": "/c", "mon_host": "a,b", "keyring": "/k"}
    request = asked(*words.split(), "map", "rbd/img")
    assert request.cluster == ClusterOptions(**(always | cluster))


def test_settings_are_stronger_than_our_own_and_weaker_than_named_options():
    options = ClusterOptions(
        keyring="/k", settings=(("log_to_stderr", "true"), ("keyring", "/other"))
    )
    assert options.overrides() == {
        "err_to_stderr": "false",
        "log_to_stderr": "true",
        "keyring": "/k",
    }


def test_the_client_may_be_named_in_ceph_args_and_the_command_line_counts_more():
    words = ("unmap", "img", "--id", "mine")
    args = "--foo --name client.x -c /c --cluster=east -f"
    assert asked("unmap", "img", CEPH_ARGS=args).cluster == ClusterOptions(
        conf="/c", name="client.x", cluster="east"
    )
    assert asked(*words, CEPH_ARGS=args).cluster.name == "client.mine"


def test_list_is_short_for_list_mapped():
    assert asked("list").command == asked("list-mapped").command == "list-mapped"


# What is refused, as rbd-nbd 16.2.15 refuses it but where compatibility.md says otherwise


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "must specify command"),
        ("nope", "unknown command: nope"),
        ("--zap map", "unknown command: --zap"),
        ("map", "must specify image-or-snap-spec"),
        ("map --show-cookie", "must specify image-or-snap-spec"),
        ("unmap", "must specify nbd device or image-or-snap-spec"),
        ("unmap --device /dev/nbd0", "must specify nbd device or image-or-snap-spec"),
        ("detach", "must specify nbd device or image-or-snap-spec"),
        ("attach", "must specify device to attach"),
        ("attach rbd/x", "must specify device to attach"),
        ("map rbd/img extra", "unknown args: extra"),
        ("list-mapped extra", "unknown args: extra"),
        ("map rbd/img --foo", "unknown args: --foo"),
        ("map --foo rbd/img", "unknown args: --foo"),
        ("map -x", "unknown args: -x"),
        ("map rbd/img --quiesce=yes", "unknown args: --quiesce=yes"),
        ("map a/b/c/d", "invalid spec 'a/b/c/d'"),
        ("unmap a@b@c", "invalid spec 'a@b@c'"),
        ("map x@", "invalid spec 'x@'"),
        ("map x@s --snap-id 4", "use either snapname or snapid, not both"),
        ("map x --device /dev/sda", "invalid device path: /dev/sda (expected /dev/nbd{num})"),
        ("map x --device", "Option --device requires an argument."),
        ("-c", "Option -c requires an argument."),
        ("map x --io-timeout x", "The option value 'x' is invalid"),
        ("map x --io-timeout=", "Expected option value to be integer, got ''"),
        ("map x --io-timeout 99999999999", "The option value '99999999999' seems to be invalid"),
        ("map x --io-timeout -1", "Invalid argument for io-timeout!"),
        ("map x --timeout -1", "Invalid argument for timeout!"),
        ("map x --reattach-timeout -1", "Invalid argument for reattach-timeout!"),
        ("map x --nbds_max -1", "Invalid argument for nbds_max!"),
        ("map x --max_part 256", "Invalid argument for max_part(0~255)!"),
        ("map x --max_part -1", "Invalid argument for max_part(0~255)!"),
        ("map x --snap-id -1", "Invalid argument for snap-id!"),
        ("map x --encryption-format foo", "Invalid encryption format"),
        (
            "map x --encryption-format luks1",
            "Encryption formats count does not match passphrase files count",
        ),
        ("list-mapped --format foo", "invalid output format: foo"),
        pytest.param(
            "list-mapped -n foo",
            "error parsing 'foo': expected string of the form TYPE.ID, "
            "valid types are: auth, mon, osd, mds, mgr, client",
            id="name",
        ),
        ("unmap /dev/sda", "invalid device path: /dev/sda (expected /dev/nbd{num})"),
        ("unmap /dev/nbd999999", "failed to open device: /dev/nbd999999"),
        ("detach /dev/sda", "no process attached to /dev/sda found"),
    ],
)
def test_a_refusal_is_one_sentence_on_stderr_and_status_1(run, words, sentence):
    assert run(*words.split()) == (1, "", f"rbd-nbd: {sentence}\n")


@pytest.mark.parametrize(
    ("error", "words", "sentence"),
    [
        (NotMapped("rbd/img is not mapped"), "unmap rbd/img", "rbd/img is not mapped"),
        (NoProcess("whatever"), "detach /dev/nbd0", "no process attached to /dev/nbd0 found"),
        (NotMapped("whatever"), "detach /dev/nbd0", "no process attached to /dev/nbd0 found"),
        (NotMapped("rbd/img is not mapped"), "detach rbd/img", "rbd/img is not mapped"),
        (CookieMismatch("x"), "attach x --device /dev/nbd0 --cookie c", "cookie mismatch"),
        (CookieMismatch("x"), "attach x --device /dev/nbd0", "must specify cookie to attach"),
        (DeviceBusy("x"), "map x --device /dev/nbd0", "the device /dev/nbd0 is busy"),
        (Busy("another process has it"), "map x --device /dev/nbd0", "another process has it"),
        (NoFreeDevice("x"), "map x", "failed to find unused device"),
        (RbdnbdError("pool x does not exist"), "map x/y", "pool x does not exist"),
    ],
)
def test_our_kinds_of_failure_are_told_in_the_words_that_callers_know(error, words, sentence):
    assert drop_in.sentence(error, asked(*words.split())) == sentence


# What is printed, and what is done


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["map", "x", "--help"], ["-h", "--zap"]])
def test_help_is_on_stdout_alone_and_names_every_option(run, words):
    done = run(*words)
    assert (done.status, done.err) == (0, "")
    known = (_FLAGS | _VALUES) - {"--timeout"}  # which is deprecated
    printed = done.out.replace("_", "-")
    assert [option for option in sorted(known) if option not in printed] == []


def test_help_needs_no_ceph(tmp_path):
    (tmp_path / "rados.py").write_text("raise ImportError('not here')\n")
    path = f"{tmp_path}:{Path(rbdnbd.__file__).parents[1]}"
    done = process("-m", "rbdnbd.drop_in", "--help", PYTHONPATH=path)
    assert (done.status, done.out, done.err) == (0, drop_in.HELP, "")


def test_an_unknown_option_without_the_bindings_says_what_is_missing(tmp_path):
    (tmp_path / "rados.py").write_text("raise ImportError('not here')\n")
    path = f"{tmp_path}:{Path(rbdnbd.__file__).parents[1]}"
    done = process("-m", "rbdnbd.drop_in", "map", "x", "--zap", "1", PYTHONPATH=path)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("rbd-nbd: cannot tell whether --zap is an option of Ceph's: its")
    assert done.err.endswith("install python3-rados and python3-rbd\n")


def test_a_key_is_not_among_the_arguments_of_the_process_that_goes_on(tmp_path):
    """Seen to fail with a command that does not begin anew."""
    (tmp_path / "rados.py").write_text("raise SystemExit(open('/proc/self/cmdline').read())\n")
    path = f"{tmp_path}:{Path(rbdnbd.__file__).parents[1]}"
    words = ("map", "x", "--key", "c2VjcmV0", "--cookie", "--key")
    done = process("-m", "rbdnbd.drop_in", *words, PYTHONPATH=path)
    assert (done.status, done.out) == (1, "")
    assert done.err.strip().split("\0")[-5:-1] == ["map", "x", "--cookie", "--key"]


def test_a_key_is_handed_to_the_background_process_out_of_sight(run, monkeypatch):
    """Seen to fail without `handed_on`."""

    def start(words, say, seconds=0.0, program=(), inherited=()):
        assert str(*inherited) == os.environ["RBDNBD_KEY"]
        assert os.pread(*inherited, 100, 0) == b"c2VjcmV0"
        return LIVE

    def take(words):
        return (("key", "c2VjcmV0"),), ["map", "rbd/img"]

    monkeypatch.setattr(background, "start", start)
    monkeypatch.setattr(drop_in, "take_settings", take)
    assert run("map", "rbd/img", "--zap") == (0, "/dev/nbd3\n", "")


def test_the_version_is_what_rbd_says(tmp_path):
    rbd = tmp_path / "rbd"
    rbd.write_text('#!/bin/sh\necho "ceph version 1.2.3 $@"\n')
    rbd.chmod(0o755)
    done = process("-m", "rbdnbd.drop_in", "map", "-v", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done == (0, "ceph version 1.2.3 --version\n", "")


def test_the_version_without_ceph_is_our_own(tmp_path):
    done = process("-m", "rbdnbd.drop_in", "--version", PATH=str(tmp_path))
    assert done == (0, f"rbdnbd {rbdnbd.__version__}, without Ceph\n", "")


@pytest.mark.parametrize("command", ["map", "attach"])
@pytest.mark.parametrize(
    ("option", "printed"), [("--exclusive", "/dev/nbd3\n"), ("--show-cookie", "/dev/nbd3 C 1\n")]
)
def test_the_device_is_printed_and_nothing_else(run, started, command, option, printed):
    words = [command, "rbd/img", "--device=/dev/nbd3", option, "--cookie", "C 1"]
    assert run(*words) == (0, printed, "")
    assert started == [Started(words, ("-m", "rbdnbd.drop_in"))]


def test_the_deprecated_timeout_is_warned_of_on_a_line_of_its_own(run, started):
    warning = "rbd-nbd: --timeout is deprecated (use --io-timeout)\n"
    assert run("map", "rbd/img", "--timeout", "5") == (0, "/dev/nbd3\n", warning)
    assert asked("map", "rbd/img", "--timeout", "5").options.io_timeout == 5


@pytest.mark.parametrize("command", ["map rbd/img", "attach rbd/img --device /dev/nbd0"])
def test_mapping_needs_root(run, monkeypatch, command):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run(*command.split()) == (1, "", f"rbd-nbd: {command.split()[0]} needs root\n")


def test_the_list_is_that_of_the_live_mappings(run, monkeypatch):
    keys = ("pool", "namespace", "image", "snap", "device", "cookie")
    document = {"id": 1} | dict.fromkeys(keys, "x")
    monkeypatch.setattr(mapped, "mapped", lambda devices: [document])
    done = run("list", "--format=json")
    assert done.out == '[{"id":1,' + ",".join(f'"{key}":"x"' for key in keys) + "}]"
    assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize(
    ("words", "called"),
    [
        ("unmap rbd/img", ("unmap", "rbd/img", None, {"force": False})),
        ("--force unmap rbd/img@s", ("unmap", "rbd/img@s", None, {"force": True})),
        ("detach rbd/img", ("detach", "rbd/img", None, {})),
        ("unmap rbd/img --snap-id 4", ("unmap", "rbd/img", 4, {"force": False})),
        ("detach img --snap-id 4", ("detach", "img", 4, {})),
    ],
)
def test_unmap_and_detach_are_passed_on(run, monkeypatch, words, called):
    calls = []

    def record(name):
        def call(target, cluster, *, say, driver, **rest):
            calls.append((name, str(target), getattr(target, "snap_id", None), rest))

        return call

    for name in ("unmap", "detach"):
        monkeypatch.setattr(mapped, name, record(name))
    assert run(*words.split()) == (0, "", "")
    assert calls == [called]


def test_a_snapshot_id_that_nothing_is_mapped_of_is_refused(run, monkeypatch):
    monkeypatch.setattr(mapped, "mappings", lambda run_dir: [])
    done = run("unmap", "--snap-id", "4", "rbd/img")
    assert done == (1, "", "rbd-nbd: rbd/img@4 is not mapped\n")


SERVE = """
import os, sys
from rbdnbd import drop_in, mapping
os.geteuid = lambda: 0
def run_mapping(spec, cluster, options, ready):
    with open("/proc/self/comm") as comm:
        print(comm.read().strip(), spec, cluster.settings, flush=True)
    ready("/dev/nbd3", "C 1")
mapping.run_mapping = run_mapping
sys.argv = ["rbd-nbd", *sys.argv[1:]]
drop_in.main()
"""


def test_the_process_that_serves_is_called_rbd_nbd_and_prints_the_device():
    done = process("-c", SERVE, "map", "rbd/img", "-f", "--show-cookie")
    assert (done.status, done.out) == (0, "rbd-nbd rbd/img ()\n/dev/nbd3 C 1\n")


def test_d_has_librados_log_to_stderr():
    done = process("-c", SERVE, "map", "rbd/img", "-d")
    assert "('log_to_stderr', 'true')" in done.out


def test_the_child_warns_of_nothing_and_prints_nothing_itself():
    done = process("-c", SERVE, "map", "rbd/img", "--timeout=1", RBDNBD_BACKGROUND="")
    assert (done.status, done.out, done.err) == (0, "rbd-nbd rbd/img ()\n", "")


def test_no_mon_config_reaches_librados_through_its_environment(run, started, monkeypatch):
    monkeypatch.setenv("CEPH_ARGS", "--keyring /k")
    assert run("map", "rbd/img", "--no-mon-config").status == 0
    assert os.environ["CEPH_ARGS"] == "--keyring /k --no-mon-config"


@pytest.mark.parametrize(
    ("backend", "living", "words", "sentence"),
    [
        ("1111", False, "--cookie 2", "cookie mismatch"),
        ("1111", True, "", "must specify cookie to attach"),
        ("1111", True, "--cookie 1111", "/dev/nbd0 has process 77 connected"),
        (None, True, "", "/dev/nbd0 has process 77 connected"),
    ],
)
def test_a_device_that_is_not_waiting_for_us_is_not_attached(
    run, monkeypatch, backend, living, words, sentence
):
    monkeypatch.setattr(NbdDevices, "backend", lambda self, index: backend)
    document = {"id": 77} if living else None
    monkeypatch.setattr(mapped, "on_device", lambda index, devices: document)
    monkeypatch.setattr(attaching, "run_attach", lambda *_: pytest.fail("attached"))
    monkeypatch.setattr(drop_in.Path, "write_text", lambda *_: 0)
    monkeypatch.setattr(logs, "log_to", lambda file, cluster, name: cluster)
    done = run("attach", "rbd/img", "--device", "/dev/nbd0", "-f", *words.split())
    assert (done.status, done.out) == (1, "")
    assert done.err.endswith(f"rbd-nbd: {sentence}\n")
