"""What the command line prints, to where, and with which exit status."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

import rbdnbd
from rbdnbd import cli, cli_list
from rbdnbd.control import Control, Document
from rbdnbd.devices import NbdDevices
from rbdnbd.mapped import mapped

COMMANDS = ("attach", "detach", "list-mapped", "map", "name", "serve", "stats", "unmap")


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_ceph_args(monkeypatch):
    for name in ("CEPH_ARGS", "NOTIFY_SOCKET", "RBDNBD_BACKGROUND"):
        monkeypatch.delenv(name, raising=False)


def process(*words: str, **how) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    command = [sys.executable, "-P", "-m", "rbdnbd", *words]
    return subprocess.run(command, text=True, timeout=30, check=False, **how)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process."""

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["rbdnbd", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return Done(left.value.code, out, err)

    return run


def blocked(tmp_path) -> dict[str, str]:
    """Return an environment in which Ceph's bindings cannot be imported."""
    for module in ("rados", "rbd"):
        (tmp_path / f"{module}.py").write_text(f"raise ImportError('{module} is not here')\n")
    ours = Path(rbdnbd.__file__).parents[1]
    return os.environ | {"PYTHONPATH": f"{tmp_path}:{ours}"}


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=" ".join)
def test_help_is_on_stdout_and_needs_no_ceph(tmp_path, words):
    done = process(*words, "--help", env=blocked(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(["Usage: rbdnbd", *words]))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_root(run, monkeypatch, command):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run(command, "-h").status == 0


def test_help_names_every_command(run):
    listed = [line.split()[0] for line in run("-h").out.partition("Commands:")[2].splitlines()[1:]]
    assert sorted(listed) == sorted(COMMANDS)


def test_without_a_command_there_is_help(run):
    assert run() == run("--help")


@pytest.mark.parametrize("option", ["-v", "--version"])
def test_the_version_is_told(run, option):
    assert run(option) == (0, f"rbdnbd, version {rbdnbd.__version__}\n", "")


def is_one_sentence(err: str) -> bool:
    return err.startswith("rbdnbd: ") and err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize(
    "words",
    [
        ["mapp"],
        ["--what"],
        ["map"],
        ["map", "rbd//vol"],
        ["map", "rbd/vol", "--what"],
        ["map", "rbd/vol", "rbd/vol"],
        ["map", "rbd/vol", "--image", "vol"],
        ["map", "rbd/vol", "--pool", "ssd"],
        ["map", "rbd/vol", "--device", "/dev/sda"],
        ["map", "rbd/vol", "--block-size", "513"],
        ["map", "rbd/vol", "--io-timeout", "-1"],
        ["map", "rbd/vol", "--io-timeout", "soon"],
        ["map", "rbd/vol", "--connections", "0"],
        ["map", "rbd/vol", "--connections", "17"],
        ["map", "rbd/vol", "--connections", "2", "--ioctl"],
        ["map", "rbd/vol", "--connections", "2", "--io-timeout", "30"],
        ["map", "rbd/vol", "--queue", "wbt_lat_usec=0"],
        ["attach", "--device", "/dev/nbd0", "--queue", "scheduler=fast"],
        ["map", "rbd/vol", "--id", "a", "--name", "client.a"],
        ["map", "rbd/vol", "--pool"],
        ["unmap"],
        ["unmap", "/dev/nbd"],
        ["unmap", "a/b/c/d"],
        ["list-mapped", "rbd"],
        ["list-mapped", "--format", "xml"],
        ["stats", "--format", "xml"],
        ["serve", "rbd/vol"],
        ["serve", "rbd/vol", "--socket", "s", "--listen", ":1"],
        ["serve", "rbd/vol", "--listen", "localhost:port"],
        ["serve", "--socket", "s"],
        ["serve", "rbd/vol", "--socket", "s", "--trace-data"],
        ["map", "rbd/vol", "--trace-data"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense_is_one_sentence_and_status_2(run, words):
    done = run(*words)
    assert (done.status, done.out) == (2, "")
    assert is_one_sentence(done.err)


def test_a_sentence_of_the_command_line_says_where_to_read_more(run):
    assert run("map", "rbd/vol", "--what").err.endswith(" (see rbdnbd map --help)\n")


def test_who_may_not_map_is_told_so(run, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run("map", "rbd/vol") == (1, "", "rbdnbd: mapping a device needs root\n")


def test_ceph_args_that_cannot_be_read_are_named(run, monkeypatch):
    monkeypatch.setenv("CEPH_ARGS", "--id")
    done = run("unmap", "/dev/nbd0")
    assert done.status == 2
    assert done.err.startswith("rbdnbd: CEPH_ARGS: ")


def test_a_log_file_that_cannot_be_written_is_named(run, tmp_path):
    path = tmp_path / "none" / "log"
    assert run("serve", "rbd/vol", "--socket", "s", "--log-file", str(path)) == (
        1,
        "",
        f"rbdnbd: cannot write to the log file {path}: No such file or directory\n",
    )


def test_a_trace_that_cannot_be_written_is_named_before_a_cluster_is_looked_for(tmp_path):
    """Seen to fail with a trace that is opened after the image."""
    path, nowhere = tmp_path / "none" / "trace", tmp_path / "ceph.conf"
    done = process("serve", "rbd/vol", "--socket", "s", "--trace", str(path), "-c", str(nowhere))
    said = f"rbdnbd: cannot write the trace {path}: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "rbd/vol", "--socket", "never-made"],
        ["serve", "rbd/vol", "--listen", ":0"],
        ["unmap", "vol"],
    ],
    ids=" ".join,
)
def test_missing_bindings_are_one_sentence_with_packages_and_interpreter(tmp_path, words):
    done = process(*words, env=blocked(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_sentence(done.stderr)
    assert "python3-rados and python3-rbd" in done.stderr
    interpreter = os.path.normpath(sys.executable)
    assert f"missing for {interpreter} (rados is not here)" in done.stderr
    assert not (tmp_path / "never-made").exists()


def test_bindings_of_rados_without_those_of_rbd_are_missing(tmp_path):
    environment = blocked(tmp_path)
    (tmp_path / "rados.py").write_text("")
    done = process("unmap", "vol", env=environment)
    assert (done.returncode, is_one_sentence(done.stderr)) == (1, True)
    assert "(rbd is not here)" in done.stderr


def test_what_is_mapped_is_listed_without_ceph(tmp_path):
    """In a process of its own, which asks this host: whatever it answers, it needs no bindings."""
    done = process("list-mapped", "--format", "json", env=blocked(tmp_path))
    assert "bindings" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_left_is_no_reason_to_complain():
    read, write = os.pipe()
    os.close(read)
    try:
        done = process("--help", stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


class Machine:
    """Mappings whose documents a test makes up; the commands see them as those of this host."""

    def __init__(self, run_dir, sys_dir, stack: ExitStack) -> None:
        self.run_dir, self._sys_dir, self._stack = run_dir, sys_dir, stack
        self.devices = NbdDevices(sys=sys_dir)

    def maps(self, index: int, **more: object) -> Document:
        document = DOCUMENT | {"device": f"/dev/nbd{index}", **more}
        pid = self._sys_dir / f"block/nbd{index}/pid"
        pid.parent.mkdir(parents=True)
        pid.write_text("4711\n")
        self._stack.enter_context(Control(lambda: document, self.run_dir))
        return document


NONE = {"requests": 0, "errors": 0, "bytes": 0, "seconds": 0.0, "latency": []}
DOCUMENT: Document = {
    "id": 4711,
    "pool": "rbd",
    "namespace": "",
    "image": "vol",
    "snap": "",
    "cookie": "f00",
    "size": 1 << 30,
    "read_only": False,
    "attached_by": "netlink",
    "connections": 1,
    "since": "2025-01-01T00:00:00+00:00",
    "stats": {"READ": NONE, "WRITE": NONE},
    "in_flight": [],
}


@pytest.fixture
def machine(tmp_path, tmp_path_factory, monkeypatch) -> Iterator[Machine]:
    with ExitStack() as stack:
        machine = Machine(tmp_path_factory.mktemp("run"), tmp_path / "sys", stack)
        monkeypatch.setattr(
            "rbdnbd.mapped.mapped", functools.partial(mapped, run_dir=machine.run_dir)
        )
        monkeypatch.setattr(cli_list, "NbdDevices", lambda: machine.devices)
        yield machine


@pytest.mark.parametrize("command", ["list-mapped", "stats"])
def test_nothing_mapped_is_nothing_printed(run, machine, command):
    assert run(command) == (0, "", "")


@pytest.mark.parametrize("command", ["list-mapped", "stats"])
def test_nothing_mapped_is_an_empty_list_in_json(run, machine, command):
    assert run(command, "--format", "json") == (0, "[]\n", "")


def test_mappings_are_listed_in_columns_as_wide_as_their_longest_word(run, machine):
    machine.maps(10, id=7, namespace="ns", image="a long name", snap="s", cookie="b4r")
    machine.maps(2, id=12345)
    assert run("list-mapped").out == (
        "id     pool  namespace  image        snap  device      cookie\n"
        "12345  rbd              vol          -     /dev/nbd2   f00   \n"
        "7      rbd   ns         a long name  s     /dev/nbd10  b4r   \n"
    )


def test_mappings_are_listed_in_json_with_what_does_not_change(run, machine):
    document = machine.maps(0, image="ein Bild")
    (listed,) = json.loads(run("list-mapped", "--format", "json").out)
    assert listed == {
        key: value for key, value in document.items() if key not in ("stats", "in_flight")
    }


def test_statistics_have_a_row_for_each_command_that_was_seen_or_is_under_way(run, machine):
    read = {"requests": 4, "errors": 1, "bytes": 16384, "seconds": 0.01, "latency": []}
    machine.maps(
        0,
        stats={"READ": read, "WRITE": NONE, "TRIM": NONE},
        in_flight=[{"command": "WRITE", "offset": 0, "length": 512, "seconds": 0.5}] * 2,
    )
    assert run("stats").out == (
        "device     command  requests  errors  bytes  mean ms  in flight\n"
        "/dev/nbd0  READ     4         1       16384  2.500    0\n"
        "/dev/nbd0  WRITE    0         0       0      0.000    2\n"
    )


def test_statistics_in_json_are_whole(run, machine):
    document = machine.maps(0)
    (shown,) = json.loads(run("stats", "--format", "json").out)
    keys = ("device", "pool", "namespace", "image", "snap", "stats", "in_flight")
    assert shown == {key: document[key] for key in keys}


def test_a_closed_stdout_is_no_traceback():
    done = process("list-mapped", preexec_fn=functools.partial(os.close, 1))
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = process("--help", stdout=full)
    assert done.returncode == 1
    assert is_one_sentence(done.stderr)


def test_why_a_background_process_ended_is_in_its_log(caplog, monkeypatch):
    monkeypatch.setenv("RBDNBD_BACKGROUND", "")  # its parent has heard that it is ready
    with pytest.raises(SystemExit):
        cli._fail("rbd/vol could not be flushed, the newest writes may be lost", 1, 5)
    assert "rbd/vol could not be flushed, the newest writes may be lost" in caplog.text
