# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals held back: nothing is interrupted half-way, nothing is lost, all is put back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.errors import InvalidArgumentError, LeftoverError
from xenaltp2m.handles import signals
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.signals import guard, uninterruptible
from xenaltp2m.testing import footprint, left_behind

from .interrupts import SENDING, Lines

SIGINT, SIGTERM, SIGUSR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


class Alarm(Exception):
    pass


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Have Python's own handlers, whatever started the tests, and the same ones after."""
    before = {number: signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGUSR1)}
    signal.signal(SIGINT, signal.default_int_handler)
    signal.signal(SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_waits_for_the_end_of_the_outermost_block() -> None:
    reached = []

    @uninterruptible
    def act() -> None:
        with guard.holding_back():
            signal.raise_signal(SIGINT)
            reached.append("inner")
        reached.append("outer")

    with pytest.raises(KeyboardInterrupt):
        act()
    assert reached == ["inner", "outer"]
    assert signal.getsignal(SIGINT) is signal.default_int_handler


def test_fault_06_any_handler_that_raises_is_held_back() -> None:
    """A timeout by SIGALRM or SIGUSR1 does what Ctrl-C does."""

    def expire(*_: object) -> None:
        raise Alarm

    signal.signal(SIGUSR1, expire)
    reached = []

    @uninterruptible
    def act() -> None:
        signal.raise_signal(SIGUSR1)
        reached.append("end")

    with pytest.raises(Alarm):
        act()
    assert reached == ["end"]
    assert signal.getsignal(SIGUSR1) is expire


def test_fault_06_no_signal_is_lost_to_the_exception_of_another() -> None:
    seen = []
    signal.signal(SIGUSR1, lambda *_: seen.append(SIGUSR1))

    @uninterruptible
    def act() -> None:
        for number in (SIGINT, SIGINT, SIGUSR1):
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        act()
    assert seen == [SIGUSR1]


def test_an_error_of_the_block_stays_the_context_of_what_the_signal_raises() -> None:
    error = InvalidArgumentError("no")

    @uninterruptible
    def act() -> None:
        signal.raise_signal(SIGINT)
        raise error

    with pytest.raises(KeyboardInterrupt) as caught:
        act()
    assert caught.value.__context__ is error


def test_other_threads_are_not_held_up_and_hold_nothing_back() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with guard.holding_back():
            inside.set()
            go_on.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    assert signal.getsignal(SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(SIGINT)
    go_on.set()
    thread.join()


def test_a_checkpoint_lets_signals_through_where_nothing_is_half_done() -> None:
    reached = []

    @uninterruptible
    def act() -> None:
        signal.raise_signal(SIGINT)
        with guard.holding_back():
            guard.checkpoint()
            reached.append("an outer block is half done")
        guard.checkpoint()
        reached.append("never")

    with pytest.raises(KeyboardInterrupt):
        act()
    assert reached == ["an outer block is half done"]


def test_fault_06_asyncio_hears_of_a_signal_once() -> None:
    """Its callback is called through the wake-up descriptor, which C has written to."""
    heard: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(SIGUSR1, heard.append, SIGUSR1)
        with guard.holding_back():
            signal.raise_signal(SIGUSR1)
        for _ in range(3):
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        loop.remove_signal_handler(SIGUSR1)

    asyncio.run(main())
    assert heard == [SIGUSR1]


def test_a_monitor_that_is_opened_and_closed_within_a_block_leaves_the_signals_alone() -> None:
    with guard.holding_back():
        guard.enter()
        guard.leave()
    assert signal.getsignal(SIGTERM) is signal.SIG_DFL

    @uninterruptible
    def act() -> None:
        guard.enter()
        signal.raise_signal(SIGTERM)

    with pytest.raises(SystemExit) as caught:
        act()
    assert caught.value.code == 128 + SIGTERM
    guard.leave()
    assert signal.getsignal(SIGTERM) is signal.SIG_DFL


class Entered:
    """A context manager in whose last bytecodes SIGINT comes, of entering it or before leaving."""

    def __init__(self) -> None:
        self.left = False

    def __enter__(self) -> None:
        SENDING.sent  # noqa: B018 - sends SIGINT, and CPython does not look for signals then

    def __exit__(self, *_: object) -> None:
        self.left = True


def test_fault_06_a_body_that_was_reached_is_left_by_its_exit() -> None:
    """CPython looks for signals in the body, whose call is the first after ``__enter__``."""
    manager = Entered()
    with pytest.raises(KeyboardInterrupt), manager:
        len("")
    assert manager.left


@uninterruptible
def both(done: list[str]) -> None:
    done.append("deed")
    done.append("note")


def test_fault_06_at_each_line() -> None:
    """Whatever line a signal comes at: both or neither is done, and all is put back."""
    before = sys.gettrace()
    moments = 0
    for moment in itertools.count(1):
        done: list[str] = []
        lines = Lines(moment, inside=(signals.__file__, __file__), strict=True)
        with contextlib.suppress(KeyboardInterrupt), lines:
            both(done)
        assert done in ([], ["deed", "note"])
        assert signal.getsignal(SIGINT) is signal.default_int_handler
        assert (guard._depth, guard._handlers, guard._came) == (0, {}, [])
        if not lines.places:
            break
        moments += 1
    assert moments > 15
    assert sys.gettrace() is before


def test_fault_06_two_signals_at_any_lines() -> None:
    pairs = 0
    for first in itertools.count(1):
        for second in range(1, 40):
            done: list[str] = []
            lines = Lines(first, first + second, inside=(signals.__file__, __file__), strict=False)
            with contextlib.suppress(KeyboardInterrupt), lines:
                both(done)
            assert done in ([], ["deed", "note"])
            with contextlib.suppress(KeyboardInterrupt), guard.holding_back():
                pass  # takes over what two signals have kept from being put back
            assert signal.getsignal(SIGINT) is signal.default_int_handler
            assert (guard._depth, guard._handlers, guard._came) == (0, {}, [])
            pairs += len(lines.places) == 2
        if not lines.places:
            break
    assert pairs > 100


def test_fault_06_a_deed_and_its_undo_are_noted_as_one() -> None:
    undone: list[int] = []
    undo = UndoList()

    def act() -> int:
        signal.raise_signal(SIGINT)
        return 7

    with pytest.raises(KeyboardInterrupt):
        undo.do("seven", act, undone.append)
    assert undo.left == ["seven"]
    undo.unwind("closing")
    assert undone == [7]


def test_fault_06_steps_are_taken_to_the_end_whatever_signals_come() -> None:
    taken: list[str] = []
    undo = UndoList()

    def take(what: str) -> None:
        taken.append(what)
        signal.raise_signal(SIGINT)

    def refuse() -> None:
        raise InvalidArgumentError("busy")

    undo.push("first", lambda: take("first"))
    undo.push("second", refuse)
    undo.push("third", lambda: take("third"))
    with pytest.raises(KeyboardInterrupt) as caught:
        undo.unwind("closing")
    assert taken == ["third", "first"]
    assert undo.left == ["second"]
    assert isinstance(caught.value.__context__, LeftoverError)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("where", ["_in_main_thread", "_get"])
def test_fault_06_what_comes_before_handlers_are_held_back_does_not_keep_a_function_from_running(
    where: str, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    real = getattr(signals, where)

    def interrupted(*args: int) -> object:
        if not called:
            called.append("interrupted")
            signal.raise_signal(SIGINT)
        return real(*args)

    @uninterruptible
    def act() -> None:
        called.append("acted")
        if raises:
            raise Alarm

    monkeypatch.setattr(signals, where, interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        act()
    assert called == ["interrupted", "acted"]
    assert isinstance(caught.value.__context__, Alarm) is raises
    assert signal.getsignal(SIGINT) is signal.default_int_handler
    assert not guard._depth


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a handle's end was skipped
def test_fault_06_two_signals_cannot_keep_a_child_and_its_parent_from_closing(
    mock: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair of places where handlers are about to be exchanged."""
    real = signals._in_main_thread
    at: set[int] = set()
    count = 0

    def interrupted() -> bool:
        nonlocal count
        count += 1
        if count in at:
            signal.raise_signal(SIGINT)
        return real()

    def session() -> None:
        with xa.connect(mock) as xen, xen.domain(1) as dom:
            dom.pause()
            dom.add_pages(2)

    monkeypatch.setattr(mock, "close", lambda: None)
    monkeypatch.setattr(signals, "_in_main_thread", interrupted)
    before = footprint(mock)
    session()
    total = count
    for pair in itertools.combinations(range(1, total + 1), 2):
        at.clear()
        at.update(pair)
        count = 0
        with pytest.raises(KeyboardInterrupt):
            session()
        assert left_behind(before, footprint(mock)) == [], pair
    gc.collect()  # here, where a handle may warn
