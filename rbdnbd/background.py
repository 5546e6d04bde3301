"""Start a command of ours in the background, and wait until it is ready or says why not.

The command is started anew in the foreground of a session of its own; it reports on a pipe, in
packets of sd_notify's fields (`daemon`). There is no fork without exec: librados' threads would not
survive it. What this room imports delays every `map`, so it imports next to nothing.
"""

from __future__ import annotations

import os
import select
import sys
import time

from rbdnbd.errors import RbdnbdError

TYPE_CHECKING = False  # typing's costs as much as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Final

VARIABLE: Final = "RBDNBD_BACKGROUND"
"""Of the environment of a process in the background: the pipe's descriptor."""
PROGRAM: Final = (os.path.join(os.path.dirname(__file__), "__main__.py"),)
START_SECONDS: Final = 120.0
_END_SECONDS: Final = 60.0
_SAY_EVERY: Final = 5.0
_PIPE: Final = 3


def start(
    arguments: Sequence[str],
    say: Callable[[str], None],
    seconds: float = START_SECONDS,
    program: Sequence[str] = PROGRAM,
    inherited: Sequence[int] = (),
) -> dict[str, str]:
    """Run a command in the background and return the fields it reported when ready.

    As `Child`, and then `Child.ready`.
    """
    return Child(arguments, program, inherited).ready(say, seconds)


class Child:
    """A process that was just started: `python3 -P PROGRAM ARGUMENTS`.

    Of our descriptors it has the first three and `inherited`, which are not among the first ten.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        program: Sequence[str] = PROGRAM,
        inherited: Sequence[int] = (),
    ) -> None:
        self._reports, theirs = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
        try:
            _keep_descriptors()
            for descriptor in inherited:
                os.set_inheritable(descriptor, True)
            self._pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-P", *program, *arguments],
                _environment(os.environ),
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs, _PIPE),
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                ],
                setsid=True,
            )
        except BaseException:
            os.close(self._reports)
            raise
        finally:
            os.close(theirs)
        self._ended = os.pidfd_open(self._pid)
        self._reaped = False

    def ready(self, say: Callable[[str], None], seconds: float = START_SECONDS) -> dict[str, str]:
        """Wait until it is ready, and return the fields that it reported then.

        `say` is told every few seconds what it is waiting for. Raises `RbdnbdError` with its own
        sentence, or when it ends or is not ready after `seconds`; it is gone then.
        """
        try:
            return self._await_ready(say, seconds)
        except BaseException:
            self._end(say)
            raise
        finally:
            os.close(self._reports)
            os.close(self._ended)

    def _await_ready(self, say: Callable[[str], None], seconds: float) -> dict[str, str]:
        begin = time.monotonic()
        doing = "starting"
        while (left := begin + seconds - time.monotonic()) > 0:
            if not readable(self._reports, min(left, _SAY_EVERY)):
                say(f"still {doing} ({time.monotonic() - begin:.0f} s)")
                continue
            report = os.read(self._reports, select.PIPE_BUF)
            if not report:  # it has let go of the pipe: nobody else has it
                raise RbdnbdError(f"the process {self._how_it_ended(left)} while {doing}")
            fields = _fields(report)
            if "ERRNO" in fields:
                raise _refusal(fields)
            if "READY" in fields:
                return fields
            doing = fields.get("STATUS", doing)
        raise RbdnbdError(f"gave up after {seconds:.0f} s of {doing}")

    def _how_it_ended(self, seconds: float) -> str:
        import signal

        if not readable(self._ended, seconds):
            return "said nothing any more"
        try:
            _, status = os.waitpid(self._pid, 0)
        except ChildProcessError:  # SIGCHLD was ignored when we were started
            return "ended"
        finally:
            self._reaped = True
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"exited with status {code}"

    def _end(self, say: Callable[[str], None]) -> None:
        """End it in its own way unless that takes too long."""
        if self._reaped:
            return
        import signal
        from contextlib import suppress

        with suppress(ProcessLookupError, ChildProcessError):  # it is gone if SIGCHLD is ignored
            signal.pidfd_send_signal(self._ended, signal.SIGTERM)
            try:
                if not readable(self._ended, _SAY_EVERY):
                    say(f"waiting for process {self._pid} to undo what it has done")
                    readable(self._ended, _END_SECONDS)
            finally:
                signal.pidfd_send_signal(self._ended, signal.SIGKILL)
                os.waitpid(self._pid, 0)


def readable(descriptor: int, seconds: float) -> bool:
    """Wait until there is something to read, or for a pidfd until the process has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(seconds, 0) * 1000))


def _keep_descriptors() -> None:
    """Have no descriptor that was left open to us go on to the child, but for the first three."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)
        except OSError:  # the one of the listing itself
            pass


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Return the child's: whoever has started us waits for nothing that the child says."""
    kept = {name: value for name, value in ours.items() if name != "NOTIFY_SOCKET"}
    return kept | {VARIABLE: str(_PIPE)}


def _fields(message: bytes) -> dict[str, str]:
    lines = (line.partition("=") for line in message.decode(errors="replace").split("\n"))
    return {name: value for name, _, value in lines}


def _refusal(fields: Mapping[str, str]) -> RbdnbdError:
    """Return the child's own error, which also says what to exit with."""
    error = RbdnbdError(fields["STATUS"], int(fields["ERRNO"]))
    error.exit_status = int(fields.get("X_RBDNBD_EXIT_STATUS", error.exit_status))
    return error
