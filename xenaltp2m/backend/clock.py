# SPDX-License-Identifier: LGPL-2.1-or-later
"""The time a backend lives in: the machine's, or that of a recording."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import TypeAlias

Poll: TypeAlias = Callable[[float], list[tuple[int, int]]]
"""Waits so many seconds at most; returns which descriptors are ready, and for what."""


class Clock:
    """The machine's time."""

    def monotonic(self) -> float:
        """Return the seconds since some moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def polling(self, poller: select.epoll) -> Poll:
        """Return what waits for a poller's descriptors."""
        return poller.poll


CLOCK = Clock()
