# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the benchmarks have in common: how they measure here, and the form of what they find."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Ratio(NamedTuple):
    """How fast something is, compared with something else in the same run: 2 is twice as fast."""

    what: str
    peer: str
    value: float


def timed(run: Callable[[], object]) -> float:
    """Seconds of processor time that it takes: what else runs on the machine counts little."""
    start = time.process_time()
    run()
    return time.process_time() - start


def shortest(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Measure each way in turn, so many times, and return of each the least disturbed.

    Args:
        ways: Each returns the seconds it took.
        rounds: How often all of them are measured.
    """
    found = [{name: run() for name, run in ways.items()} for _ in range(rounds)]
    return {name: min(times[name] for times in found) for name in ways}
