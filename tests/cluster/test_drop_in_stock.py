"""Our rbd-nbd and Ceph's, side by side: the same words, the same output and status.

Only rows that need no kernel: what the command line says, and what Ceph's reads in /sys, for which
a mount namespace of its own has a /sys/block that is made up.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from rbdnbd.listing import listing

pytestmark = pytest.mark.on_host

STOCK = ["/usr/bin/rbd-nbd"]
OURS = [sys.executable, "-P", "-m", "rbdnbd.drop_in"]


class Done(NamedTuple):
    status: int
    out: str
    err: str


def run(command: list[str], *words: str, **environment: str) -> Done:
    inherited = {name: value for name, value in os.environ.items() if name != "CEPH_ARGS"}
    done = subprocess.run(
        [*command, *words],
        env=inherited | environment,
        capture_output=True,
        timeout=30,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_the_stock_binary_is_cephs() -> None:
    assert b"ceph" in Path(STOCK[0]).read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        *("", "-v", "--version", "map --bogus -v"),
        *("map", "unmap", "detach", "attach", "attach rbd/x", "nope", "map --show-cookie"),
        *("unmap --device /dev/nbd0", "detach --device /dev/nbd0"),
        *("map rbd/img --foo", "map rbd/img extra", "list-mapped x", "map rbd/img --quiesce=yes"),
        *("map x --read-only true --foo", "list-mapped --debug-foo 1", "map x --cookie= --zap"),
        *("list-mapped", "list-mapped --format json", "list-mapped --format xml"),
        *("list-mapped --format xml --pretty-format", "--pretty_format list-mapped --format=json"),
        *("list-mapped --format foo", "list-mapped --format="),
        *("list-mapped --id foo", "list-mapped -n client.foo", "list-mapped --cluster foo"),
        *("list-mapped -c /nonexist", "list-mapped --keyfile /nonexist", "list-mapped -m 1.2.3.4"),
        *("list-mapped --debug-rbd=20", "list-mapped --rbd_cache false", "list-mapped --rbd-cache"),
        *("list-mapped --no-rbd-cache", "list-mapped --no-mon-config", "list-mapped -d"),
        *("list-mapped --setuser nobody", "list-mapped -f --host foo --log-file /tmp/x"),
        *("--rbd-op-threads 7 list-mapped", "list-mapped --io-timeout 5 --exclusive"),
        *("unmap rbd/img", "unmap img", "unmap ns1/foo@s", "detach rbd/img"),
        *("unmap img --rbd_default_pool foo", "unmap --encryption-format foo i"),
        *("unmap /dev/sda", "unmap /dev/nbdx", "unmap /dev/nbd999", "detach /dev/nbd999"),
        *("detach /dev/sda",),
        *("map rbd/img --io-timeout x", "map x --io-timeout=", "map x --io_timeout -5"),
        *("map x --io-timeout 99999999999999", "map x --io-timeout=0x10", "map x --max_part 1k"),
        *("map x --timeout x", "map x --timeout -1", "map x --reattach-timeout 5s"),
        *("map x --max_part 300", "map x --max_part=-1", "map x --max-part=1000"),
        *("map x --nbds_max -1", "map x --reattach-timeout -1", "map x --encryption-format foo"),
    ],
)
def test_the_same_words_have_the_same_output_and_status(words: str) -> None:
    assert run(OURS, *words.split()) == run(STOCK, *words.split())


@pytest.mark.parametrize("spec", ["", "a@b@c", "x@", "@s"])
def test_an_invalid_spec_is_told_without_the_empty_line(spec: str) -> None:
    stock = run(STOCK, "unmap", spec)
    assert run(OURS, "unmap", spec) == stock._replace(err=stock.err.replace("\n\n", "\n"))


@pytest.mark.parametrize(
    "words", ["map x --device", "map x --io-timeout", "-c", "--id", "list-mapped -n foo"]
)
def test_what_ceph_says_itself_begins_with_our_name_too(words: str) -> None:
    stock, ours = run(STOCK, *words.split()), run(OURS, *words.split())
    sentence = stock.err.removeprefix("rbd-nbd: ").rstrip("\n")
    assert ours == (stock.status, stock.out, f"rbd-nbd: {sentence}\n")


def test_the_pool_comes_from_the_environment_and_from_ceph_conf(tmp_path: Path) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\nrbd_default_pool = there\n")
    for words, environment in (
        (["unmap", "i"], {"CEPH_ARGS": "--rbd-default-pool zz --foo"}),
        (["unmap", "i"], {"CEPH_CONF": str(conf)}),
        (["unmap", "i", "-c", str(conf)], {}),
    ):
        assert run(OURS, *words, **environment) == run(STOCK, *words, **environment)


ROWS = [
    (("map", "rbd/img1"), ("rbd", "", "img1", ""), "1111"),
    (("map", "p/ns/i@s"), ("p", "ns", "i", "s"), "C d"),
    (("map", "rbd/a&<b>\"q'é\\"), ("rbd", "", "a&<b>\"q'é\\", ""), "x&y"),
    (("map", "rbd/\x02"), ("rbd", "", "\x02", ""), 'a\x01b\x7fc\rd\be"/'),
    (("attach", "rbd/a-long-name", "--device", "/dev/nbd4"), ("rbd", "", "a-long-name", ""), ""),
]

Document = dict[str, object]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[list[Document]]:
    """Mappings as Ceph's rbd-nbd sees them: processes of that name, and what is in tmp_path/block.

    A process is a shell that waits in a script of the command's name, so that its arguments are
    those of an rbd-nbd.
    """
    shutil.copy("/bin/sh", tmp_path / "rbd-nbd")
    for command in ("map", "attach"):
        (tmp_path / command).write_text("echo ready; read line\n")
    with ExitStack() as stack:
        documents = []
        for number, (words, spec, cookie) in enumerate(ROWS):
            process = subprocess.Popen(
                ["rbd-nbd", *words],
                executable=tmp_path / "rbd-nbd",
                cwd=tmp_path,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            directory = tmp_path / f"block/nbd{number}"
            directory.mkdir(parents=True)
            (directory / "pid").write_text(f"{process.pid}\n")
            (directory / "backend").write_bytes(f"{cookie}\n".encode())
            names = dict(zip(("pool", "namespace", "image", "snap"), spec, strict=True))
            documents.append(
                {"id": process.pid, "device": f"/dev/nbd{number}", "cookie": cookie} | names
            )
        yield documents


def in_made_up_sys(tmp_path: Path, *words: str) -> Done:
    """Run Ceph's rbd-nbd where /sys/block is what we made."""
    script = 'mount --bind "$0" /sys/block && exec "$@"'
    namespace = ["unshare", "-m", "sh", "-c", script, str(tmp_path / "block")]
    return run([*namespace, *STOCK], *words)


@pytest.mark.parametrize("style", ["plain", "json", "xml"])
@pytest.mark.parametrize("pretty", [False, True])
def test_a_list_is_the_same_byte_for_byte(
    processes: list[Document], tmp_path: Path, style: str, pretty: bool
) -> None:
    options = [f"--format={style}", *(["--pretty-format"] if pretty else [])]
    stock = in_made_up_sys(tmp_path, "list-mapped", *options)
    assert stock == (0, listing(processes, style, pretty=pretty), "")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "must specify cookie to attach"),
        ("--cookie 2", "cookie mismatch"),
        ("--cookie 1111", "/dev/nbd0 has process PID connected"),
    ],
)
def test_the_words_for_a_device_that_cannot_be_attached_are_cephs(
    processes: list[Document], tmp_path: Path, words: str, sentence: str
) -> None:
    attach = ["attach", "rbd/img1", "--device", "/dev/nbd0", *words.split()]
    told = sentence.replace("PID", str(processes[0]["id"]))
    assert in_made_up_sys(tmp_path, *attach) == (1, "", f"rbd-nbd: {told}\n")


@pytest.fixture
def beside_ours(tmp_path: Path) -> str:
    """Ceph's rbd with our rbd-nbd beside it, which it runs."""
    shutil.copy("/usr/bin/rbd", tmp_path / "rbd")
    ours = tmp_path / "rbd-nbd"
    ours.write_text(f'#!/bin/sh\nexec {" ".join(OURS)} "$@"\n')
    ours.chmod(0o755)
    return str(tmp_path / "rbd")


@pytest.mark.parametrize(
    "words",
    [
        "device list -t nbd --format json",
        "device list -t nbd --format xml --pretty-format",
        "device list -t nbd",
        "device unmap -t nbd p/i@s",
        "--pool p --image i device unmap -t nbd --rbd-op-threads 7",
        "device detach -t nbd /dev/nbd999",
        "device map -t nbd -o try-netlink,io-timeout=x,device=/dev/nbd3 p/i",
        "device map -t nbd p/i --quiesce --quiesce-hook /q -o max_part=300",
        "device attach -t nbd --device /dev/nbd3 -o reattach-timeout=x p/i",
    ],
)
def test_rbd_runs_ours_as_it_runs_its_own(beside_ours: str, ceph_conf: Path, words: str) -> None:
    conf = {"CEPH_CONF": str(ceph_conf)}
    stock = run(["/usr/bin/rbd"], *words.split(), **conf)
    ours = run([beside_ours], *words.split(), **conf)
    assert ours == stock._replace(err=stock.err.replace("/usr/bin/rbd", beside_ours))
