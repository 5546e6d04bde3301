"""The kernel part, from outside: prepare images, run `bench.guest` on this host or in a VM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench.build import ROOT
from bench.candidates import ENGINES, RBDNBD
from bench.guest import Rates
from bench.rounds import Say, image
from bench.targets import AGAIN, STOCK
from testbed.cluster import Cluster
from testbed.places import host_has_nbd
from testbed.processes import Unavailable
from testbed.vm import VM, VMLost

IMAGE: Final = "192M"
VM_SECONDS: Final = 1800.0
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PROGRAMS: Final[dict[str, list[str]]] = {
    STOCK: ["rbd-nbd"],
    AGAIN: ["rbd-nbd"],
    **{name: [RBDNBD, *options] for name, options in ENGINES.items()},
}
"""Programs with rbd-nbd's commands; a program's own options of `map` stand behind it."""


def kernel(cluster: Cluster, rounds: int, say: Say) -> Rates:
    """Return the rates of every program in every step; raises Unavailable."""
    with ExitStack() as stack:
        prefix = "rbdnbd-bench-"
        share = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir="/var/tmp"))
        )
        job, result = share / "job.json", share / "result.json"
        programs = {}
        for number, (name, (command, *options)) in enumerate(PROGRAMS.items()):
            spec = stack.enter_context(image(cluster, f"bench-kernel-{number}", IMAGE))
            programs[name] = {
                "map": [command, "map", *options, spec],
                "unmap": [command, "unmap"],
            }
        job.write_text(json.dumps({"rounds": rounds, "programs": programs}))
        argv = [sys.executable, "-m", "bench.guest", str(job), str(result)]
        here = host_has_nbd()
        say("kernel: on this host" if here else "kernel: in a VM, which emulates its processor")
        status = _run_here(argv, cluster) if here else _run_in_vm(argv, cluster, share, say)
        if status:
            raise Unavailable(f"the kernel part ended with status {status}")
        rates: Rates = json.loads(result.read_text())
    return rates


def _run_here(argv: list[str], cluster: Cluster) -> int:
    environment = {**cluster.environment(), "PATH": f"{os.environ['PATH']}:{PATH}"}
    return subprocess.run(argv, cwd=ROOT, env=environment, check=False).returncode


def _run_in_vm(argv: list[str], cluster: Cluster, share: Path, say: Say) -> int:
    vm = VM(console=share / "console.log", shares=[share], modprobe=["nbd"], limit=VM_SECONDS)
    environment = {
        "CEPH_CONF": str(cluster.conf),
        "PATH": PATH,
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def heard(data: bytes) -> None:
        for line in data.decode(errors="replace").splitlines():
            say(line)

    try:
        return vm.run(argv, cwd=ROOT, env=environment, output=heard).status
    except VMLost as error:
        raise Unavailable(f"the VM was lost: {error}") from error
