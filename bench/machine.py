"""Where it was measured, in the words of docs/performance.md."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from testbed.processes import output


def description() -> dict[str, str]:
    """Return what a reader must know about machine and versions."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    ceph = re.search(r"ceph version (\S+)", output("rbd-nbd", "--version"))
    return {
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "kernel": platform.release(),
        "Ceph": ceph[1] if ceph else "unknown",
        "Python": platform.python_version(),
    }
