# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ctrl-C at a chosen line of the package, or at several."""

from __future__ import annotations

import _thread
import signal
import sys
from collections.abc import Collection
from types import FrameType, TracebackType
from typing import Any, Self


class _Bomb(int):
    """A signal's number."""

    # Sends it without a call in bytecode, after which the tracer itself would be interrupted.
    sent = property(_thread.interrupt_main)


_SIGINT = _Bomb(signal.SIGINT)


class Lines:
    """Counts the lines that are executed in some files, and sends SIGINT at some of them.

    Attributes:
        count: How many lines were executed.
        fired: How often SIGINT was sent.
    """

    def __init__(self, *at: int, inside: Collection[str], strict: bool) -> None:
        """Count from 1 on.

        Args:
            *at: The lines, ascending.
            inside: The files; a name that ends in a slash stands for all beneath.
            strict: Have the handler run before the line, where CPython may not look for signals;
                ends the count. Else it runs where CPython looks for them next.
        """
        self._at, self._strict = at, strict
        self._files = frozenset(inside)
        self._folders = tuple(name for name in inside if name.endswith("/"))
        self._known: dict[str, bool] = {}
        self.count = self.fired = 0

    def __enter__(self) -> Self:
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

    def _called(self, frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        found = self._known.get(name)
        if found is None:
            found = name in self._files or name.startswith(self._folders or ("\0",))
            self._known[name] = found
        return self._executed if found else None

    def _executed(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            self.count += 1
            if self.fired < len(self._at) and self.count >= self._at[self.fired]:
                self.fired += 1
                if self._strict:
                    signal.raise_signal(signal.SIGINT)
                else:
                    _SIGINT.sent  # noqa: B018 - that sends it
        return self._executed
