# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far a command is that goes on until there is enough."""

from __future__ import annotations

import argparse
import math

from xenaltp2m.backend.clock import Clock
from xenaltp2m.cli.pages import counted


class Course:
    """From when on something is told of, how much of it, and until when.

    Attributes:
        told: How many have been told, of those that ``--count`` counts.
    """

    def __init__(self, options: argparse.Namespace, clock: Clock, noun: str) -> None:
        """Begin.

        Args:
            options: Has the duration and the count.
            clock: The backend's.
            noun: What is told of.
        """
        self._clock, self._noun = clock, noun
        self._most = math.inf if options.count is None else options.count
        self._duration = math.inf if options.duration is None else options.duration
        self._start = clock.monotonic()
        self._took: float | None = None
        self.told = 0

    @property
    def passed(self) -> float:
        """How many seconds it has gone on, or went on."""
        return self._clock.monotonic() - self._start if self._took is None else self._took

    @property
    def left(self) -> float:
        """How many seconds are left; none once there is enough."""
        return 0 if self.told >= self._most else self._duration - self.passed

    def end(self) -> None:
        """Count no further seconds."""
        self._took = self.passed

    def rate(self, number: int) -> float:
        """How many of a number that is in a second."""
        passed = self.passed
        return number / passed if passed > 0 else 0.0

    def status(self, number: int) -> str:
        """Say how things stand."""
        rate = self.rate(number)
        return f"{counted(number, self._noun)}, {rate:.0f} per second, {self.passed:.0f} s"

    def title(self, number: int) -> str:
        """Say what a table counts."""
        rate = self.rate(number)
        return f"{counted(number, self._noun)} in {self.passed:.1f} s, {rate:.0f} per second"
