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


@pytest.mark.parametrize("seed", [11088, 15732])
def test_hits_are_counted_with_the_trap_flag_set(seed: int) -> None:
    """At REP LODSD, whose traps end no execution, and at IN, which has one on either side."""
    verdict = judge_seed(seed)
    assert not verdict.differences, describe(verdict)
