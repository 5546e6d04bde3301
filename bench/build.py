"""Compile what is in C, below .build/bench, when it is not there or older than its source."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from testbed.processes import output

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD: Final = ROOT / ".build" / "bench"
NATIVE: Final = Path(__file__).with_name("native")
SHIM: Final = BUILD / "nbdshim.so"
NBDLOAD: Final = BUILD / "nbdload"

_WARNINGS: Final = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


def build() -> None:
    """Make nbdshim.so and nbdload; raises Unavailable with the compiler's words."""
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = sorted(NATIVE.glob("*.h"))
    shim = NATIVE / "nbdshim.c"
    load = sorted(set(NATIVE.glob("*.c")) - {shim})
    _compile(SHIM, [shim], headers, "-shared", "-fPIC")
    _compile(NBDLOAD, load, headers)


def _compile(product: Path, sources: list[Path], headers: list[Path], *options: str) -> None:
    newest = max(path.stat().st_mtime for path in (*sources, *headers))
    if product.exists() and product.stat().st_mtime > newest:
        return
    output("gcc", *_WARNINGS, *options, "-o", str(product), *map(str, sources), "-ldl")
