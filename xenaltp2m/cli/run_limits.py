# SPDX-License-Identifier: LGPL-2.1-or-later
"""The limits of a command that runs until it has enough results."""

from __future__ import annotations

import argparse
import math

from xenaltp2m.backend.clock import Clock
from xenaltp2m.cli.pages import counted


class RunLimits:
    """The progress of a run, and its limits: duration and count.

    Attributes:
        told: The number of results reported, of the kind that ``--count`` limits.
    """

    def __init__(self, options: argparse.Namespace, clock: Clock, noun: str) -> None:
        """Start the clock.

        Args:
            options: The options ``duration`` and ``count``.
            clock: The backend's clock.
            noun: The name of a result.
        """
        self._clock, self._noun = clock, noun
        self._most = math.inf if options.count is None else options.count
        self._duration = math.inf if options.duration is None else options.duration
        self._start = clock.monotonic()
        self._took: float | None = None
        self.told = 0

    @property
    def passed(self) -> float:
        """The seconds since the start, up to the end if it has ended."""
        return self._clock.monotonic() - self._start if self._took is None else self._took

    @property
    def left(self) -> float:
        """The seconds left; 0 once there are enough results."""
        return 0 if self.told >= self._most else self._duration - self.passed

    def end(self) -> None:
        """Stop the clock."""
        self._took = self.passed

    def rate(self, number: int) -> float:
        """Return a number per second."""
        passed = self.passed
        return number / passed if passed > 0 else 0.0

    def status(self, number: int) -> str:
        """Return the text of the status line."""
        rate = self.rate(number)
        return f"{counted(number, self._noun)}, {rate:.0f} per second, {self.passed:.0f} s"

    def title(self, number: int) -> str:
        """Return the title of a table of results."""
        rate = self.rate(number)
        return f"{counted(number, self._noun)} in {self.passed:.1f} s, {rate:.0f} per second"
