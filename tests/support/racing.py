"""Commands at random moments on images and their devices, with an application's IO on each.

In the end of a round all is compared: what the commands said, what the kernel has, what list-mapped
and the cluster say, what the IO met and what the devices hold.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import rbd

from tests.support.checked_io import CheckedIO, Known
from tests.support.forked import LIMIT_SECONDS, Ended, Forked, Forks
from tests.support.waiting import wait_until

MAPPED_WITH = ("--reattach-timeout", "300")
ENGINES = ("threads", "events")
WAYS = {
    "unmap": 1,
    "attach": 3,
    "replace": 2,
    "detach": 3,
    "resize": 2,
    "snapshot": 1,
    "list": 2,
}
"""What races, and how often of all: after an unmap nothing else has an effect."""
SPREAD_SECONDS = 3.0
"""Per device, the time in which all commands of a round begin."""
RESCUE_SECONDS = 8.0
"""After so long without an end a device that waits for a process is given one."""
PATIENCE_SECONDS = 60.0
DEVICE = r"/dev/nbd\d+"
GONE = rf"({DEVICE}|rbd/\S+) is not (mapped|attached)"
OWNED = r"another process has the mapping with the cookie \S+"
CONNECTED = rf"{DEVICE} has process (?P<process>\d+) connected"
TRUTHS = {
    "map": "nothing else than success",
    "unmap": rf"{GONE}|{DEVICE} is in use by another process or mount namespace: .*",
    "attach": rf"{GONE}|{OWNED}|{CONNECTED}|no process attached to {DEVICE} found",
    "detach": rf"{GONE}|no process attached to {DEVICE} found",
    "list-mapped": "nothing else than success",
}
"""What each command may say last when others were faster."""


@dataclass
class Subject:
    """An image, and its device with the IO on it while it is mapped."""

    spec: str
    image: rbd.Image
    known: Known = field(default_factory=dict)
    commands: list[Forked] = field(default_factory=list)
    others: list[Future[None]] = field(default_factory=list)
    device: str = ""
    server: Forked | None = None
    io: CheckedIO | None = None

    def started(self) -> list[Forked]:
        """Return the commands of this round, and before them what served the device at first."""
        return [*([self.server] if self.server else ()), *self.commands]

    def connected(self) -> bool:
        """Tell whether the kernel has the device connected."""
        return Path(f"/sys/block/{Path(self.device).name}/pid").exists()

    def busy(self) -> bool:
        """Tell whether IO is answered: five requests more than before."""
        assert self.io is not None
        done = self.io.done
        wait_until(lambda: self.io is None or self.io.done > done + 5, PATIENCE_SECONDS, "IO")
        return True

    def begin_io(self, seed: int) -> None:
        """Begin with IO on the device."""
        self.io = CheckedIO(self.device, self.known, seed)
        self.io.start()
        self.busy()

    def end_io(self) -> OSError | None:
        """End the IO, which may have met an error but not a wrong byte; return the error."""
        assert self.io is not None
        self.io.stop(PATIENCE_SECONDS)
        assert not self.io.wrong, self.io.wrong
        return self.io.error

    def snapshot(self, name: str) -> None:
        """Make a snapshot and remove it."""
        self.image.create_snap(name)
        self.image.remove_snap(name)


class Race:
    """Rounds of commands on some images; `rbd` runs Ceph's own command."""

    def __init__(
        self,
        forked: Forks,
        rbd: Callable[..., str],
        threads: ThreadPoolExecutor,
        subjects: list[Subject],
    ) -> None:
        self._forked, self._rbd, self._threads = forked, rbd, threads
        self._subjects = subjects

    def run(self, source: Random, commands: int) -> None:
        """Have so many commands for each device begin at random moments, and judge them."""
        for subject in self._subjects:
            self._prepare(subject, source)
        moments = sorted(
            (source.uniform(0, SPREAD_SECONDS * len(self._subjects)), number)
            for number in range(len(self._subjects))
            for _ in range(commands)
        )
        begun = time.monotonic()
        for moment, number in moments:
            wait_until(lambda end=begun + moment: time.monotonic() >= end, 300, "the next moment")
            self._start(self._subjects[number], source)
        for subject in self._subjects:
            self._await(subject)
        listed = self._listed(self._forked.start("list-mapped", "--format", "json").ended())
        for subject in self._subjects:
            self._judge(subject, listed)
        for subject in self._subjects:
            if not subject.connected():
                subject.device = ""

    def end(self) -> None:
        """Unmap what is mapped."""
        for subject in self._subjects:
            if subject.device:
                self._forked.run("unmap", subject.device)

    def _prepare(self, subject: Subject, source: Random) -> None:
        """See that an image is mapped, and that there is IO on its device."""
        subject.commands.clear()
        if not subject.device:
            words = ("map", subject.spec, *MAPPED_WITH, "--io-engine", source.choice(ENGINES))
            subject.server = self._forked.start(*words)
            ended = subject.server.ended()
            subject.device = ended.out.strip()
            assert subject.device, ended
        subject.begin_io(source.getrandbits(32))

    def _start(self, subject: Subject, source: Random) -> None:
        """Start one of all that may race."""
        target = source.choice((subject.spec, subject.device))
        (way,) = source.choices(list(WAYS), list(WAYS.values()))
        if way == "resize":
            size = source.randint(16, 64) << 20
            subject.others.append(self._threads.submit(subject.image.resize, size))
        elif way == "snapshot":
            name = f"snapshot-{source.getrandbits(64)}"
            subject.others.append(self._threads.submit(subject.snapshot, name))
        else:
            words = {
                "unmap": ("unmap", target),
                "detach": ("detach", target),
                "attach": ("attach", "--device", subject.device),
                "replace": ("attach", "--replace", "--device", subject.device),
                "list": ("list-mapped", "--format", "json"),
            }
            subject.commands.append(self._forked.start(*words[way]))

    def _await(self, subject: Subject) -> None:
        """Wait for the end of all that was started; a device that waits is given a process."""
        for other in subject.others:
            other.result(LIMIT_SECONDS)
        subject.others.clear()
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            rescue = time.monotonic() + RESCUE_SECONDS

            def over(rescue: float = rescue) -> bool:
                return subject_over(subject) or time.monotonic() > rescue

            wait_until(over, PATIENCE_SECONDS, "the end of the round")
            if subject_over(subject):
                return
            said = [(each.words, each.now()) for each in subject.commands]
            assert time.monotonic() < deadline, f"a command does not end: {said}"
            subject.commands.append(self._forked.start("attach", "--device", subject.device))

    def _listed(self, ended: Ended) -> dict[str, int]:
        """Return the processes by their devices that a list names: one for an image of ours."""
        assert ended.status == 0, ended
        assert not ended.err, ended
        entries = json.loads(ended.out)
        devices = {f"{each['pool']}/{each['image']}": each["device"] for each in entries}
        assert len(devices) == len(entries), f"an image is listed twice: {ended.out}"
        ours = {subject.spec: subject.device for subject in self._subjects}
        assert devices.items() <= ours.items(), (devices, ours)
        return {each["device"]: each["id"] for each in entries}

    def _judge(self, subject: Subject, listed: dict[str, int]) -> None:
        """Compare what the commands said with what is, and with what the IO has met."""
        said = [(each.words, each.now()) for each in subject.commands]
        processes = {each.process.pid for each in subject.started()}
        for words, ended in said:
            if words[0] == "list-mapped":
                self._listed(ended)
        unmapped = [words for words, ended in said if words[0] == "unmap" and ended.status == 0]
        assert len(unmapped) <= 1, f"unmapped twice: {said}"
        for words, ended in said:
            why = untruth(words[0], ended, processes, free=bool(unmapped))
            assert not why, f"{why}: {words}: {ended}, of {said}"
        if unmapped:
            wait_until(lambda: not subject.connected(), PATIENCE_SECONDS, "the device is free")
            subject.end_io()
        else:
            assert subject.connected(), f"{subject.device} is lost: {said}"
            if subject.device not in listed:
                subject.commands.append(self._forked.start("attach", "--device", subject.device))
                assert subject.commands[-1].ended().out, subject.commands[-1].now()
            subject.busy()
            error = subject.end_io()
            assert error is None, f"{error}, although nothing was unmapped: {said}"
        self._check_processes(subject, mapped=not unmapped)

    def _check_processes(self, subject: Subject, *, mapped: bool) -> None:
        """See that one process serves a mapped device, none another, and that Ceph agrees."""
        started = subject.started()

        def living() -> list[Forked]:
            return [each for each in started if each.process.is_alive()]

        wait_until(lambda: len(living()) <= mapped, PATIENCE_SECONDS, "the others have ended")
        for each in started:
            if each not in living():
                status = each.now().status
                assert each.now().out == "" or status == 0, (each.words, each.now())
        if living():
            (subject.server,) = living()
        status = json.loads(self._rbd("status", "--format", "json", subject.spec))
        assert len(status["watchers"]) == 1 + mapped, status  # one is the test's


def subject_over(subject: Subject) -> bool:
    """Tell whether every command on an image has ended, or serves its device."""
    return all(each.over() for each in subject.commands)


def untruth(command: str, ended: Ended, processes: set[int | None], *, free: bool) -> str | None:
    """Say why what a command has said cannot be true; None when it may be."""
    if not ended.status:
        return None
    *_, last = ended.err.splitlines() or [""]
    match = re.fullmatch(f"rbdnbd: ({TRUTHS[command]})", last)
    if ended.status != 1 or match is None:
        return "not among what it may say"
    if re.fullmatch(GONE, match[1]) and not free:
        return "nothing was unmapped"
    process = match.groupdict().get("process")
    if process and int(process) not in processes:
        return "there is no such process"
    return None
