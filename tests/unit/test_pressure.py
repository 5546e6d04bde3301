"""What a process does so that it can serve while memory is short, where it may not."""

from __future__ import annotations

import os
import subprocess
import sys

NOBODY = 65534
ENDURE = """
import logging, resource, threading
from rbdnbd.pressure import endure, relenting
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
endure()
with relenting():
    pass
threads = [threading.Thread(target=bytearray, args=(1 << 20,)) for _ in range(16)]
for thread in threads:
    thread.start()
print("goes on")
"""


def test_what_is_refused_is_one_line_each_and_the_process_goes_on() -> None:
    others = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run(
        ["/usr/bin/python3", "-c", ENDURE],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        **others,
    )
    assert done.stdout == "goes on\n"
    assert done.stderr.splitlines() == [
        "this process may wait for the writing of dirty pages: Operation not permitted",
        "this process may be paged out: locking memory needs CAP_IPC_LOCK or an infinite memlock "
        "limit",
        "this process may be killed when memory is short: Permission denied",
    ]
