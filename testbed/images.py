"""The container images of docker/, built from nothing but a Debian mirror where it has to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from testbed.processes import narrate, silent

ROOT = Path(__file__).resolve().parent.parent
# Passed on from the environment where they are set.
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


def ceph_image(say: Callable[[str], None]) -> str:
    """Build the image of a one-node Ceph cluster (docker/ceph.Dockerfile); return its name."""
    return _build("rbdnbd-ceph", "bookworm", ["--file=docker/ceph.Dockerfile"], say)


def debian13_image(say: Callable[[str], None]) -> str:
    """Build the image that runs the tests on Debian 13 (docker/Dockerfile); return its name."""
    options = ["--file=docker/Dockerfile", "--target=test"]
    return _build("rbdnbd-test-debian13", "trixie", options, say)


def rbdnbd_image(say: Callable[[str], None]) -> str:
    """Build the image of rbdnbd itself (docker/Dockerfile); return its name."""
    return _build("rbdnbd", "trixie", ["--file=docker/Dockerfile"], say)


def _build(name: str, suite: str, options: list[str], say: Callable[[str], None]) -> str:
    narrate([str(ROOT / "docker" / "base-image.sh"), suite], say)
    say(f"{name}: building it, or finding it unchanged")
    began = time.monotonic()
    proxies = [f"--build-arg={name}" for name in PROXIES]
    # The classic builder or BuildKit, as the engine has it: both understand these.
    build = ["docker", "build", "--network=host", f"--tag={name}", *proxies, *options, str(ROOT)]
    narrate(build, silent)
    say(f"{name}: ready after {time.monotonic() - began:.0f} s")
    return name
