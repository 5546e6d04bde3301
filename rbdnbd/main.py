"""The command rbdnbd; `map` and `attach` as they are mostly called, in the background, start here.

Whoever waits need not know the command line: the process that it waits for reads it. So that one is
started first, and what the waiting needs is imported while it works. All else is the business of
`cli`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in background
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_MAY_STAND_ALONE = frozenset({"-c", "-i", "-n", "-p", "-m"})


def main() -> NoReturn:
    """Run the command line and exit."""
    words = sys.argv[1:]
    if not goes_to_the_background(words):
        from rbdnbd import cli

        cli.main()
    try:
        _start([words[0], "--foreground", *words[1:]])
    except OSError as error:
        _leave(str(error), 1)  # of a process that cannot be started, or a line that nobody reads


def goes_to_the_background(words: Sequence[str]) -> bool:
    """Tell whether these words are certain to ask for a process in the background.

    A word that could be a short form of --foreground or --help, or a value that looks like one, is
    for `cli` to tell.
    """
    if not words or words[0] not in ("map", "attach"):
        return False
    for word in words[1:]:
        if word in ("--", "--foreground", "--help"):
            return False
        if word.startswith("-") and not word.startswith("--") and word not in _MAY_STAND_ALONE:
            return False
    return True


def _start(words: Sequence[str]) -> NoReturn:
    """Start a process in the background, wait for it, and print what it wants to be printed."""
    from rbdnbd.background import Child

    child = Child(words)
    import signal  # only now, as said above

    from rbdnbd.errors import Interrupted, RbdnbdError

    def interrupt(number: int, _: object) -> NoReturn:
        raise Interrupted(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        _print(child.ready(_say)["X_RBDNBD_PRINTED"])
    except RbdnbdError as error:
        _leave(error.message, error.exit_status)
    except Interrupted as error:
        _leave(str(error), 128 + error.number)
    except KeyboardInterrupt:
        _leave("interrupted", 128 + signal.SIGINT)
    sys.exit(0)


def _print(line: str) -> None:
    if sys.stdout is not None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def _say(doing: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"rbdnbd: {doing}\n")


def _leave(message: str, status: int) -> NoReturn:
    _say(message)
    sys.exit(status)
