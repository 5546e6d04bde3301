"""A Docker engine for as long as it is needed.

The engine that answers already is used as it is. Otherwise one of our own runs beside whatever
this host has: own socket, data, containerd namespace and bridge, and not one firewall rule, so
containers reach the host and it reaches them, but nothing beyond (builds use the host's network).
All users of our engine share it: each holds a shared lock, and the last to leave stops it. The
kernel drops the lock of a killed process, so an engine left behind is stopped by the next user.
Its images stay in the clone's .build, and make the next run short.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from testbed.processes import Unavailable, end, output, sigterm_interrupts
from testbed.slots import LOCKS

DATA = Path(__file__).resolve().parent.parent / ".build/docker"
RUN = LOCKS / "docker"
HOST = f"unix://{RUN}/docker.sock"
BRIDGE = "rbdnbd-docker"
BRIDGE_ADDRESS = "198.19.0.1/24"  # of the range that is set aside for tests (RFC 2544)
START_SECONDS = 60.0
STOP_SECONDS = 30.0


@contextmanager
def docker_engine(say: Callable[[str], None]) -> Iterator[None]:
    """Have a Docker engine, which this process's DOCKER_HOST leads to, here and in children.

    Ours needs root; DOCKER_HOST stays on it, for several may use it in turn or at once.
    """
    if shutil.which("docker") is None:
        raise Unavailable("no docker command: install docker.io (on Debian 13 also docker-cli)")
    if os.environ.get("DOCKER_HOST") != HOST and answers():
        yield
        return
    if shutil.which("dockerd") is None:
        raise Unavailable("no Docker engine answers, and there is no dockerd: install docker.io")
    if os.geteuid() != 0:
        raise Unavailable("no Docker engine answers, and only root can start one")
    RUN.mkdir(parents=True, exist_ok=True)
    with sigterm_interrupts(), (RUN / "users.lock").open("w") as users:
        try:
            with _alone():
                fcntl.flock(users, fcntl.LOCK_SH)
                if not answers(HOST):
                    _start(say)
            os.environ["DOCKER_HOST"] = HOST
            yield
        finally:
            with _alone():
                _stop_unless_used(users.fileno())


def remove_container(name: str) -> None:
    """Kill and remove the container of that name, if there is one."""
    if found := output("docker", "ps", "--all", "--quiet", f"--filter=name=^{name}$"):
        output("docker", "rm", "--force", "--volumes", found.strip())


def answers(host: str | None = None) -> bool:
    """Say whether the engine at `host`, by default the environment's, answers."""
    environment = os.environ | ({} if host is None else {"DOCKER_HOST": host})
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


@contextmanager
def _alone() -> Iterator[None]:
    """Let one process at a time start or stop our engine."""
    with (RUN / "change.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(say: Callable[[str], None]) -> None:
    say("starting a Docker engine")
    _remove_bridge()
    for arguments in (
        ("link", "add", BRIDGE, "type", "bridge"),
        ("address", "add", BRIDGE_ADDRESS, "dev", BRIDGE),
        ("link", "set", BRIDGE, "up"),
    ):
        output("ip", *arguments)
    config, log = RUN / "daemon.json", RUN / "dockerd.log"
    config.write_text("{}\n")  # instead of the host's, whose settings would clash with ours
    command = [
        *("dockerd", f"--host={HOST}", f"--config-file={config}", f"--pidfile={RUN}/dockerd.pid"),
        *(f"--data-root={DATA}", f"--exec-root={RUN}/exec", "--containerd-namespace=rbdnbd"),
        *(f"--bridge={BRIDGE}", "--iptables=false", "--ip6tables=false"),
        *("--ip-forward=false", "--ip-masq=false", "--userland-proxy=false"),
    ]
    with log.open("wb") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words, start_new_session=True)
    deadline = time.monotonic() + START_SECONDS
    while not answers(HOST):
        if process.poll() is not None or time.monotonic() > deadline:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
            _stop()
            raise Unavailable(f"dockerd does not start; the end of its log says:\n{last}")
        time.sleep(0.1)
    # The last user stops it, perhaps another process: Popen must not mind that it lives on.
    process.returncode = 0


def _stop_unless_used(users: int) -> None:
    fcntl.flock(users, fcntl.LOCK_UN)
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    _stop()


def _stop() -> None:
    pid_file = RUN / "dockerd.pid"
    with suppress(FileNotFoundError):
        pid = int(pid_file.read_text())
        if Path(f"/proc/{pid}/comm").read_text() == "dockerd\n":  # and not a successor's number
            end(pid, signal.SIGTERM, STOP_SECONDS)
    pid_file.unlink(missing_ok=True)
    _remove_bridge()


def _remove_bridge() -> None:
    if Path("/sys/class/net", BRIDGE).exists():
        output("ip", "link", "delete", BRIDGE)
