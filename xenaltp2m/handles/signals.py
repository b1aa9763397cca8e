# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hold signal handlers back while an exception would leave a guest half changed.

CPython runs a handler between two bytecodes of the main thread: when a function begins or a
generator resumes, after a call, and at a backward jump (``CHECK_EVAL_BREAKER`` in ``ceval.c``,
3.11 to 3.13). So an exception such as :class:`KeyboardInterrupt` may be raised between a call that
changes the guest and the line that notes how to undo the change. It may also be raised at the first
bytecode of an ``__exit__``, which then does nothing; contextlib's for generators is an example. It
cannot be raised between the return of an ``__enter__`` and the body of its ``with`` statement,
because nothing is called in between (``BEFORE_WITH``).

Hence three rules. Changing a guest and noting how to undo it is one block of
:meth:`TerminationGuard.holding_back`. Undoing is another block. Each handle belongs to a parent,
which closes it if its own ``__exit__`` was skipped.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import functools
import itertools
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeAlias, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Handler: TypeAlias = "Callable[[int, FrameType | None], Any] | int | None"

ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
"""Signals that request an orderly exit."""

# The functions of these names in signal convert to enums, which takes ten times as long.
_get: Callable[[int], _Handler] = _signal.getsignal
_set: Callable[[int, _Handler], _Handler] = _signal.signal
_DEFAULT = int(signal.SIG_DFL)
_NUMBERS = tuple(set(map(int, signal.valid_signals())) - {signal.SIGKILL, signal.SIGSTOP})


class TerminationGuard:
    """Holds signal handlers back, and turns signals that would kill the process into SystemExit.

    This concerns Python handlers only, which run in the main thread: in another thread a block is
    never interrupted, and holding back does nothing.
    """

    def __init__(self) -> None:
        self._monitors = 0
        self._guarded: list[int] = []
        self._depth = 0
        """The number of open blocks of :meth:`holding_back`."""
        self._handlers: dict[int, _Handler] = {}
        """The handlers that :attr:`_waiting` replaces, by signal."""
        self._came: list[int] = []
        """Signals that came while their handlers were held back."""
        self._waiting = self._wait  # one bound method, to be compared by identity

    def enter(self) -> None:
        """Register a monitor: while any is open, SIGTERM and SIGHUP raise :class:`SystemExit`."""
        self._monitors += 1
        if self._guarded or not _in_main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            if self._handler(number) == _DEFAULT:
                self._handle(number, _exit)
                self._guarded.append(number)

    def leave(self) -> None:
        """Unregister a monitor; after the last one, restore the signals."""
        self._monitors -= 1
        if not self._monitors and _in_main_thread():
            for number in self._guarded:
                if self._handler(number) is _exit:
                    self._handle(number, _DEFAULT)
            self._guarded.clear()

    def holding_back(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that delays signal handlers to the end of its block.

        Blocks nest. A block must not await or yield, nor call user code.
        """
        return self if _in_main_thread() else _NOTHING

    def checkpoint(self, act: Callable[[], object] = bool) -> None:
        """Run held-back handlers at a point of an outermost block where nothing is half done.

        In an inner block they stay held back, because the outer one is half done.

        Args:
            act: Called while handlers may run, such as user code, which may take long.
        """
        if self._depth != 1 or not _in_main_thread():
            act()
            return
        try:
            self._let_go()
            act()
        finally:
            self.__enter__()

    def __enter__(self) -> None:
        if self._depth:
            self._depth += 1
            return
        try:
            for number in itertools.compress(_NUMBERS, map(callable, map(_get, _NUMBERS))):
                handler = _get(number)
                if handler is not self._waiting:
                    self._handlers[number] = handler
                    _set(number, self._waiting)
            self._depth = 1
        except BaseException:
            self._let_go()
            raise

    def __exit__(self, *_: object) -> None:
        if self._depth > 1:
            self._depth -= 1
        else:
            self._let_go()

    def _let_go(self) -> None:
        """Restore the handlers, and run those whose signals came.

        If another signal comes meanwhile and its handler raises, the rest is done all the same.
        """
        try:
            self._depth = 0
            while self._handlers:
                number, handler = next(iter(self._handlers.items()))
                if _get(number) is self._waiting:
                    _set(number, handler)
                self._handlers.pop(number, None)
            while self._came:
                number = self._came.pop(0)
                # Not raise_signal: asyncio was notified by set_wakeup_fd's descriptor already.
                _run(self._handler(number), number, sys._getframe())  # noqa: SLF001 - documented
        finally:
            if self._handlers or self._came:
                self._let_go()

    def _wait(self, number: int, frame: FrameType | None) -> None:
        """Note a signal in place of its handler."""
        if not self._depth:  # the handlers are being replaced or restored
            _run(self._handler(number), number, frame)
        elif number not in self._came:
            self._came.append(number)

    def _handler(self, number: int) -> _Handler:
        """Return a signal's handler outside of blocks."""
        return self._handlers[number] if number in self._handlers else _get(number)

    def _handle(self, number: int, handler: _Handler) -> None:
        """Set a signal's handler outside of blocks."""
        if self._depth:
            self._handlers[number] = handler
            handler = self._waiting
        _set(number, handler)


_NOTHING = contextlib.nullcontext()


def _run(handler: _Handler, number: int, frame: FrameType | None) -> None:
    if callable(handler):
        handler(number, frame)
    elif handler == _DEFAULT:  # the last monitor was closed meanwhile
        _set(number, handler)
        signal.raise_signal(number)


def _in_main_thread() -> bool:
    """Check for the main thread: handlers can be set there only, and run there only."""
    return threading.current_thread() is threading.main_thread()


def _exit(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


guard = TerminationGuard()
"""The only instance of the process."""


def uninterruptible(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Delay signal handlers during a function to its end: a decorator.

    If a handler raises an exception while handlers are replaced, the function runs all the same,
    and the exception is raised at its end. So a second Ctrl-C cannot prevent a parent from closing
    what the first prevented a child from closing.
    """

    @functools.wraps(function)
    def whole(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            block = guard.holding_back()
            block.__enter__()
        except BaseException as error:  # noqa: BLE001 - it is raised once the function has ended
            with guard.holding_back():
                try:
                    function(*args, **kwargs)
                finally:
                    raise error
        try:
            return function(*args, **kwargs)
        finally:
            block.__exit__(None, None, None)

    return whole
