"""Run a command on Debian 13, whose Ceph and Python are newer, on the files of this host.

A container of docker/Dockerfile's target "test" sees the source tree read-only under the same
path as here, the host's network, and the directories that it is given. It is for the tiers that
need no kernel driver: unit, protocol, and cluster against a cluster of ours.

By hand: python -m testbed.debian13 [--mount DIR]... -- COMMAND [ARGUMENT...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from testbed.engine import docker_engine, remove_container
from testbed.images import ROOT, debian13_image
from testbed.processes import Unavailable
from testbed.slots import slot

# Nothing is written into the source tree.
ENVIRONMENT = {
    "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
    "PYTHONDONTWRITEBYTECODE": "1",
}
# Like an editable install: also a Python without PYTHONPATH finds the source tree.
PATH_FILE = "/usr/lib/python3/dist-packages/rbdnbd.pth"
ENGINE_STATUSES = (125, 126, 127)  # of "docker run": the command did not run
POLL_SECONDS = 0.2


def run_in_container(
    argv: Sequence[str],
    *,
    mounts: Sequence[Path],
    env: Mapping[str, str],
    log: Path,
    say: Callable[[str], None],
    stop: threading.Event | None = None,
) -> int:
    """Run `argv` in the source tree's root in a Debian 13 container and return its exit status.

    `mounts` are writable on both sides under the same path; `env` is added to the container's
    own environment; all that the command prints goes to `log` as it comes. Setting `stop` kills
    the container. Raises Unavailable when the command could not be run at all.
    """
    with docker_engine(say), slot("debian13") as number:
        image = debian13_image(say)
        name = f"rbdnbd-debian13-{number}"
        remove_container(name)
        try:
            with tempfile.NamedTemporaryFile("w") as path_file:
                path_file.write(f"{ROOT}\n")
                path_file.flush()
                command = [
                    *("docker", "run", "--rm", "--init", f"--name={name}", "--network=host"),
                    f"--volume={path_file.name}:{PATH_FILE}:ro",
                    *_options(mounts, env),
                    *(image, *argv),
                ]
                status = _run(command, log, stop or threading.Event(), name)
        finally:
            remove_container(name)
    if status in ENGINE_STATUSES:
        printed = log.read_text(errors="replace").strip()
        raise Unavailable(f"no Debian 13 container runs {argv[0]}\n{printed}")
    return status


def _options(mounts: Sequence[Path], env: Mapping[str, str]) -> list[str]:
    modes = {ROOT: "ro"} | dict.fromkeys(mounts, "rw")
    volumes = [f"--volume={path}:{path}:{mode}" for path, mode in modes.items()]
    variables = [f"--env={key}={value}" for key, value in (ENVIRONMENT | dict(env)).items()]
    return [*volumes, *variables, f"--workdir={ROOT}"]


def _run(command: Sequence[str], log: Path, stop: threading.Event, name: str) -> int:
    with (
        log.open("wb") as printed,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us alone, who remove the container
        ) as process,
    ):
        while True:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if stop.is_set():  # it may not run yet, or no longer
                    subprocess.run(["docker", "kill", name], capture_output=True, check=False)
            except BaseException:
                remove_container(name)
                process.wait()
                raise


def main() -> int:
    """Run a command by hand, showing what it prints when it has ended."""
    parser = argparse.ArgumentParser(description="Run a command in a Debian 13 container.")
    parser.add_argument("--mount", action="append", default=[], type=Path, metavar="DIR")
    parser.add_argument("argv", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile() as log:
        status = run_in_container(
            arguments.argv,
            mounts=arguments.mount,
            env={},
            log=Path(log.name),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(log.read().decode(errors="replace"), end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
