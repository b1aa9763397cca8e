# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ctrl-C at a chosen line of the package, or at several."""

from __future__ import annotations

import _thread
import gc
import signal
import sys
from collections.abc import Collection
from types import CodeType, FrameType, TracebackType
from typing import Any, Self


class _Bomb(int):
    """A signal's number."""

    # Sends it without a call in bytecode, after which the tracer itself would be interrupted.
    sent = property(_thread.interrupt_main)


SENDING = _Bomb(signal.SIGINT)


class Lines:
    """Counts the lines that are executed in some files, and sends SIGINT at some of them.

    Attributes:
        executed: The lines that were executed, in order.
        places: Where SIGINT was sent.
    """

    def __init__(
        self, *at: int, inside: Collection[str], outside: str = "\0", strict: bool
    ) -> None:
        """Count from 1 on.

        Args:
            *at: The lines, ascending.
            inside: The files; a name that ends in a slash stands for all beneath.
            outside: The folder whose functions do not count, nor what they call: no signal is
                handled within a hypercall.
            strict: Have the handler run before the line, where CPython may not look for signals;
                ends the count. Else it runs where CPython looks for them next.
        """
        self._at, self._strict = at, strict
        self._files = frozenset(inside)
        self._folders = tuple(name for name in inside if name.endswith("/"))
        self._outside, self._beneath = outside, False
        self._known: dict[str, bool] = {}
        self.executed: list[tuple[CodeType, int]] = []
        self.places: list[str] = []

    def __enter__(self) -> Self:
        gc.disable()  # CPython 3.11.7 dies where it collects generators that are traced
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sys.settrace(self._before)
        gc.enable()

    def _called(self, frame: FrameType, event: str, _: object) -> Any:
        if self._beneath:
            return None
        name = frame.f_code.co_filename
        found = self._known.get(name)
        if found is None:
            found = name in self._files or name.startswith(self._folders)
            self._known[name] = found
        if name.startswith(self._outside):
            self._beneath, frame.f_trace_lines = True, False
            return self._outside_of
        return self._executed if found else None

    def _outside_of(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "return":
            self._beneath = False
        return self._outside_of

    def _executed(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            self.executed.append((frame.f_code, frame.f_lineno))
            sent = len(self.places)
            if sent < len(self._at) and len(self.executed) >= self._at[sent]:
                self.places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                if self._strict:
                    signal.raise_signal(signal.SIGINT)
                else:
                    SENDING.sent  # noqa: B018 - that sends it
        return self._executed
