"""The rooms and the doors between them (docs/architecture.md), read from the source by `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rbdnbd

ROOT = Path(rbdnbd.__file__).parent
SOURCES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
MODULE_LINES = 300
FUNCTION_LINES = 40

PURE = {"errors", "wire", "handshake", "stats", "spec"}
MAY_IMPORT = {
    "__init__": set(),
    "errors": PURE,
    "wire": PURE,
    "handshake": PURE,
    "stats": PURE,
    "spec": PURE,
    "listing": PURE,
    "report": PURE,
    "drop_in_args": PURE | {"listing"},
    "trace": PURE,
    "distrust": PURE,
    "transmission": PURE | {"trace", "distrust"},
    "stream": set(),
    "turn": PURE,
    "server": PURE | {"transmission", "stream", "distrust", "turn"},
    "buffers": PURE,
    "loop": PURE | {"buffers"},
    "receiving": PURE | {"transmission", "distrust", "loop", "buffers"},
    "events": PURE | {"transmission", "distrust", "receiving", "loop", "buffers"},
    "engines": PURE | {"trace", "transmission", "server", "events", "loop", "image"},
    "connections": PURE | {"transmission"},
    "addresses": PURE,
    "listener": PURE | {"transmission", "distrust"},
    "librbd": PURE,
    "polled": PURE | {"librbd", "loop"},
    "cluster": PURE,
    "ceph_args": PURE,
    "settings": PURE | {"cluster"},
    "encryption": PURE | {"polled"},
    "image": PURE | {"cluster", "encryption", "polled"},
    "opening": PURE | {"cluster", "encryption", "polled", "image"},
    "fencing": PURE | {"cluster", "image"},
    "header": PURE | {"cluster", "image"},
    "pressure": PURE,
    "hook": PURE | {"image", "librbd", "pressure"},
    "netlink": PURE,
    "devices": PURE,
    "ioctl": PURE | {"netlink"},
    "blockqueue": PURE | {"devices"},
    "modprobe": PURE | {"devices"},
    "release": PURE | {"netlink", "ioctl", "devices"},
    "handover": PURE | {"netlink", "release"},
    "kernel": PURE | {"netlink", "ioctl", "devices", "modprobe", "release", "handover"},
    "control": PURE,
    "record": PURE,
    "resize": PURE,
    "background": PURE,
    "daemon": PURE | {"background"},
    "logs": PURE | {"daemon", "background"},
    "life": PURE,
    "secrecy": PURE,
}
"""What each room below the top may import of ours."""

TOP = {
    "__main__": {"main"},
    "main": {"cli"},
    "cli": {"cli_list", "options", "mapping_options", "mapping", "attaching", "mapped", "serving"},
    "cli_list": {"mapped", "names"},
    "drop_in": {"mapping", "attaching", "mapped"},
    "options": set(),
    "mapping_options": {"options"},
    "mapping": {"attaching", "live", "holdings", "mapped"},
    "attaching": {"live", "holdings", "mapped"},
    "serving": {"live", "holdings"},
    "live": {"holdings", "names"},
    "holdings": set(),
    "names": {"mapped"},
    "mapped": set(),
}
"""The rooms at the top, which may import everything below them, and what of the top as well."""

ONLY_IN = {
    "rados": {"cluster", "header", "image", "opening", "settings"},
    "rbd": {"cluster", "image", "opening", "encryption", "fencing", "polled"},
    "ctypes": {"librbd", "ioctl", "pressure", "polled", "secrecy"},
    "fcntl.ioctl": {"ioctl"},
    "resource": {"pressure"},
    "socket.AF_NETLINK": {"netlink"},
    "click": {"cli", "cli_list", "options", "mapping_options"},
    "subprocess": {"modprobe"},
    "os.posix_spawn": {"background"},
    "os.posix_spawnp": {"hook"},
    "multiprocessing": set(),
    "os.fork": set(),
    "os.system": set(),
}
"""What has one room, or none, by the name that is imported or the attribute that is used."""


def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def imports(node: ast.AST) -> Iterator[str]:
    """Every imported name in full, wherever in the module it is imported."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (alias.name for alias in each.names)
        elif isinstance(each, ast.ImportFrom):
            assert not each.level, f"line {each.lineno}: a relative import"
            yield from (f"{each.module}.{alias.name}" for alias in each.names)


def ours(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    return {
        name.split(".")[1]
        for name in imports(tree(module))
        if name.startswith("rbdnbd.") and name.split(".")[1] in SOURCES
    }


def used(module: str) -> set[str]:
    """What a module imports, with every package above it, and the attributes `a.b` it uses."""
    names = {
        ".".join(parts[:end])
        for parts in (name.split(".") for name in imports(tree(module)))
        for end in range(1, len(parts) + 1)
    }
    return names | {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }


def test_the_rooms_that_are_written_are_found():
    assert {"errors", "wire", "handshake", "stats", "server", "listener"} <= set(SOURCES)


@pytest.mark.parametrize("module", sorted(MAY_IMPORT.keys() & SOURCES.keys()))
def test_a_room_imports_only_what_the_table_says(module):
    assert ours(module) - MAY_IMPORT[module] == set()


@pytest.mark.parametrize("module", sorted(TOP.keys() & SOURCES.keys()))
def test_a_room_at_the_top_imports_no_other_at_the_top_but_what_the_table_says(module):
    assert ours(module) & TOP.keys() - TOP[module] == set()


def test_every_room_is_in_the_table():
    assert SOURCES.keys() - MAY_IMPORT.keys() - TOP.keys() == set()


@pytest.mark.parametrize("module", sorted(PURE & SOURCES.keys()))
def test_a_pure_room_knows_neither_sockets_nor_threads_nor_time(module):
    impure = {"socket", "threading", "time", "os", "select", "asyncio", "logging", "pathlib"}
    assert used(module) & impure == set()


@pytest.mark.parametrize("what", ONLY_IN)
def test_each_dangerous_thing_has_one_room(what):
    assert {module for module in SOURCES if what in used(module)} <= ONLY_IN[what]


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_at_most_300_lines(module):
    assert len(SOURCES[module].read_text(encoding="utf-8").splitlines()) <= MODULE_LINES


@pytest.mark.parametrize("module", SOURCES)
def test_a_function_is_at_most_40_lines(module):
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.end_lineno - node.lineno >= FUNCTION_LINES
    }
    assert long == {}
