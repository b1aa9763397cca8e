# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals, where a process that dies at the wrong moment leaves a guest frozen."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
"""Those that somebody ends a process with who waits for it to end in order."""


class SignalGuard:
    """Makes signals that would kill the process raise SystemExit while a monitor is open."""

    def __init__(self) -> None:
        self._count = 0
        self._guarded: list[signal.Signals] = []

    def enter(self) -> None:
        """Count one more monitor."""
        self._count += 1
        if self._guarded or not _in_main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _exit)
                self._guarded.append(number)

    def leave(self) -> None:
        """Count one less; the last puts the signals back."""
        self._count -= 1
        if not self._count and _in_main_thread():
            for number in self._guarded:
                if signal.getsignal(number) is _exit:
                    signal.signal(number, signal.SIG_DFL)
            self._guarded.clear()

    @contextlib.contextmanager
    def holding_back(self) -> Iterator[None]:
        """Let signals with handlers in Python wait until the block is done."""
        if not _in_main_thread():
            yield
            return
        came: list[int] = []
        before = {}
        try:
            for number in ENDING:
                if callable(handler := signal.getsignal(number)):
                    before[number] = handler
                    signal.signal(number, lambda which, _: came.append(which))
            yield
        finally:
            for number, handler in before.items():
                over = handler is _exit and not self._count  # the last monitor was closed
                signal.signal(number, signal.SIG_DFL if over else handler)
            for which in came:
                signal.raise_signal(which)


def _in_main_thread() -> bool:
    """Only there can handlers be set, and only there do they run."""
    return threading.current_thread() is threading.main_thread()


def _exit(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


guard = SignalGuard()
"""The process's one."""
