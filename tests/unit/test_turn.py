"""Who has the turn next."""

from __future__ import annotations

import threading

from rbdnbd.turn import Turn
from tests.support.waiting import wait_until


def test_the_turn_goes_to_whoever_has_waited_least():
    """Seen to fail with the first of those who wait called first."""
    turn = Turn()
    turn.take(Turn.call())
    had: list[int] = []

    def take(number: int) -> None:
        turn.take(Turn.call())
        had.append(number)
        turn.pass_on()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(3)]
    for count, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda count=count: len(turn._waiting) == count, 10, "a thread that waits")
    turn.pass_on()
    for thread in threads:
        thread.join(10)
    assert had == [2, 1, 0]


def test_a_turn_that_nobody_waited_for_is_taken_at_once():
    turn, call = Turn(), Turn.call()
    turn.take(call)
    turn.pass_on()
    turn.take(call)
    assert not turn.is_waited_for()


def test_a_turn_that_is_passed_on_is_not_free_to_others():
    """Seen to fail with a turn that is free while it is passed on."""
    turn, done = Turn(), threading.Event()
    turn.take(Turn.call())

    def take() -> None:
        turn.take(Turn.call())
        done.wait(10)
        turn.pass_on()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
        wait_until(turn.is_waited_for, 10, "a thread that waits")
        if thread is threads[0]:
            turn.pass_on()
    done.set()
    for thread in threads:
        thread.join(10)
    assert not turn.is_waited_for()
