# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random programs do the same under breakpoints and watchpoints as with nobody in their way."""

from __future__ import annotations

import pytest

from tests.transparency.compare import describe
from tests.transparency.simulated import judge_seed

PROGRAMS, AT_ONCE = 300, 25


@pytest.mark.parametrize("first", range(0, PROGRAMS, AT_ONCE))
def test_random_programs_do_the_same(first: int) -> None:
    hits = 0
    for seed in range(first, first + AT_ONCE):
        verdict = judge_seed(seed)
        hits += verdict.hits
        assert not verdict.differences, describe(verdict)
    assert hits > AT_ONCE


def test_a_trap_between_two_iterations_ends_no_execution() -> None:
    """This program has the trap flag set at REP LODSD, and a breakpoint there."""
    verdict = judge_seed(11088)
    assert not verdict.differences, describe(verdict)
