"""`make demo`: all that rbdnbd is for, on a throw-away cluster, said line by line.

The cluster runs on this host. The steps (demo.sh) run here too if this kernel has nbd, otherwise in
a VM with Debian's kernel on the files of this host.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from testbed.cluster import LocalCluster
from testbed.places import host_has_nbd
from testbed.processes import Unavailable
from testbed.vm import VM, VMLost

STEPS = Path(__file__).with_name("demo.sh")
VM_SECONDS = 900.0


def main() -> int:
    """Run the demo and return an exit status."""
    begin = time.monotonic()
    try:
        with LocalCluster(say) as cluster:
            tools = Path(sys.executable).parent
            environment = {
                "CEPH_CONF": str(cluster.conf),
                "PATH": f"{tools}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            }
            status = run_here(environment) if host_has_nbd() else run_in_vm(environment)
    except (Unavailable, VMLost) as error:
        say(f"failed: {error}")
        return 1
    if status:
        say(f"failed: a step ended with status {status}")
        return 1
    say(f"done after {time.monotonic() - begin:.0f} s: what was written is what was read")
    return 0


def run_here(environment: Mapping[str, str]) -> int:
    """Run the steps on this host."""
    say("this kernel has nbd: the image is mapped on this host")
    return subprocess.run([STEPS], env=os.environ | environment, check=False).returncode


def run_in_vm(environment: Mapping[str, str]) -> int:
    """Run the steps in a VM."""
    say("this kernel has no nbd: fetching Debian's, for an emulated VM (a minute or two)")
    with tempfile.TemporaryDirectory(prefix="rbdnbd-demo-") as directory:
        vm = VM(console=Path(directory, "console.log"), limit=VM_SECONDS)
        return vm.run([str(STEPS)], env=environment, output=_write).status


def say(line: str) -> None:
    """Print one line of progress."""
    print(f"demo: {line}", flush=True)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
