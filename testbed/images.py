"""The container images of docker/, built from nothing but a Debian mirror where it has to be."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from testbed.processes import Unavailable, narrate, output, silent

ROOT = Path(__file__).resolve().parent.parent
ROOTS = ROOT / ".build" / "debian13"
# Passed on from the environment where they are set.
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


def ceph_image(say: Callable[[str], None]) -> str:
    """Build the image of a one-node Ceph cluster (docker/ceph.Dockerfile); return its name."""
    return _build("rbdnbd-ceph", "bookworm", ["--file=docker/ceph.Dockerfile"], say)


def debian13_image(say: Callable[[str], None]) -> str:
    """Build the image that runs the tests on Debian 13 (docker/Dockerfile); return its name."""
    options = ["--file=docker/Dockerfile", "--target=test"]
    return _build("rbdnbd-test-debian13", "trixie", options, say)


def debian13_root(say: Callable[[str], None]) -> Path:
    """Unpack that image, without Docker's part in it, and return the directory to chroot into.

    It lies below .build and is used again for as long as the image is the same.
    """
    image = debian13_image(say)
    number = output("docker", "image", "inspect", "--format={{.Id}}", image).strip()
    root = ROOTS / number.partition(":")[2][:16]
    if root.exists():
        return root
    ROOTS.mkdir(parents=True, exist_ok=True)
    for old in ROOTS.glob("[0-9a-f]" * 16):
        shutil.rmtree(old)
    say(f"{image}: unpacking it")
    container = output("docker", "create", image, "true").strip()
    try:
        made = Path(tempfile.mkdtemp(prefix="unpacking-", dir=ROOTS))
        _unpack(container, made)
    finally:
        output("docker", "rm", container)
    made.chmod(0o755)
    with suppress(OSError):  # another process may have been there first
        made.rename(root)
    return root


def _unpack(container: str, directory: Path) -> None:
    with subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE) as export:
        tar = ["tar", "-x", "-C", str(directory)]
        done = subprocess.run(tar, stdin=export.stdout, capture_output=True, text=True)
    if done.returncode or export.returncode:
        raise Unavailable(f"the Debian 13 image cannot be unpacked: {done.stderr.strip()}")


def rbdnbd_image(say: Callable[[str], None]) -> str:
    """Build the image of rbdnbd itself (docker/Dockerfile); return its name."""
    return _build("rbdnbd", "trixie", ["--file=docker/Dockerfile"], say)


_BUILDING = threading.Lock()
"""Places that run side by side want the same image: the second finds it unchanged."""


def _build(name: str, suite: str, options: list[str], say: Callable[[str], None]) -> str:
    proxies = [f"--build-arg={name}" for name in PROXIES]
    # The classic builder or BuildKit, as the engine has it: both understand these.
    build = ["docker", "build", "--network=host", f"--tag={name}", *proxies, *options, str(ROOT)]
    with _BUILDING:
        narrate([str(ROOT / "docker" / "base-image.sh"), suite], say)
        say(f"{name}: building it, or finding it unchanged")
        began = time.monotonic()
        narrate(build, silent)
    say(f"{name}: ready after {time.monotonic() - began:.0f} s")
    return name
