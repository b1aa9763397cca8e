# SPDX-License-Identifier: LGPL-2.1-or-later
"""Traces: each call and each return, with what was passed and what came back; see test_breakpoints.

racer.S: hit(n) returns 3n + 1. paged.S: target64(a, b, c) returns a + 2b + 3c.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator

import pytest

import xenaltp2m as xa
from xenaltp2m.tools.tracing import Call, Return, Trace

from .guests import PATIENCE, RunningGuest, running
from .test_breakpoints import HOSTS

CALLS = 40


@pytest.fixture(params=HOSTS)
def racer(request: pytest.FixtureRequest) -> Iterator[RunningGuest]:
    with running(request.param, "racer", 4) as guest:
        yield guest


@pytest.fixture(params=HOSTS)
def paged(request: pytest.FixtureRequest) -> Iterator[RunningGuest]:
    with running(request.param, "paged") as guest:
        yield guest


def test_each_call_and_each_return(racer: RunningGuest) -> None:
    racer.write_word("go", CALLS)
    passed: list[list[int]] = [[] for _ in range(4)]
    came_back: list[list[int]] = [[] for _ in range(4)]
    with Trace(racer.dom, "hit", symbols=racer.image, arguments=1, returns=True) as trace:

        def take(seen: Call | Return) -> None:
            if isinstance(seen, Call):
                assert str(racer.image.locate(seen.caller or 0)) == "wrong_after_hit+0x2e"
                passed[seen.vcpu].append(seen.arguments[0])
            else:
                assert seen.value == 3 * seen.call.arguments[0] + 1
                came_back[seen.vcpu].append(seen.value)
                if sum(map(len, came_back)) == 4 * CALLS:
                    trace.stop()

        racer.start()
        trace.run(take, timeout=PATIENCE)
        assert trace.hits == {"hit": 4 * CALLS}
    assert passed == [list(range(CALLS))] * 4
    assert came_back == [[3 * n + 1 for n in range(CALLS)]] * 4
    assert racer.lines("noticed") == [0] * 4
    assert racer.words("total") == (4 * CALLS,)


def test_a_guest_with_page_tables(paged: RunningGuest) -> None:
    """Begun before the first instruction; arguments in registers, the caller by its tables."""
    with Trace(paged.dom, "target64", symbols=paged.image, arguments=3, returns=True) as trace:
        paged.start()
        seen = list(itertools.islice(trace.calls(timeout=PATIENCE), 2 * CALLS))
    calls = [call for call in seen if isinstance(call, Call)]
    returns = [seen for seen in seen if isinstance(seen, Return)]
    assert [back.call for back in returns] == calls
    for back in returns:
        a, b, c = back.call.arguments
        assert back.value == a + 2 * b + 3 * c
    assert len({call.arguments for call in calls}) > CALLS // 2
    assert {str(paged.image.locate(call.caller or 0)).partition("+")[0] for call in calls} == {
        "run"
    }
    assert set(paged.words("noticed", paged.image.symbol("noticed").size // 4)) == {0}


def test_calls_with_other_page_tables_are_left_out(paged: RunningGuest) -> None:
    with Trace(paged.dom, "target64", symbols=paged.image, cr3=0x1000) as trace:
        paged.start()
        told: list[Call | Return] = []
        while not trace.hits["target64"]:
            trace.run(told.append, timeout=PATIENCE, seconds=0)  # ends with what comes next
        assert told == []


def all_told(racer: RunningGuest, trace: Trace) -> list[Call | Return]:
    """Let it make all its calls, and return those that the trace tells."""
    racer.start()
    end = time.monotonic() + PATIENCE
    told: list[Call | Return] = []
    while racer.lines("done") != [CALLS] * 4:
        assert time.monotonic() < end
        told += trace.calls(timeout=0.05)
    return told


def test_too_many_in_a_second_are_counted(racer: RunningGuest) -> None:
    racer.write_word("go", CALLS)
    with Trace(racer.dom, "hit", symbols=racer.image, most_per_second=1e-3) as trace:
        told = all_told(racer, trace)
        assert len(told) == 1
        assert trace.dropped == 4 * CALLS - 1
        assert trace.hits == {"hit": 4 * CALLS}


def test_as_many_as_may_be_in_a_second_are_told(racer: RunningGuest) -> None:
    """However soon one comes after another."""
    racer.write_word("go", CALLS)
    with Trace(racer.dom, "hit", symbols=racer.image, most_per_second=100) as trace:
        told = all_told(racer, trace)
        assert 100 <= len(told) <= 4 * CALLS
        assert trace.dropped == 4 * CALLS - len(told)


def test_in_an_event_loop(racer: RunningGuest) -> None:
    async def some() -> list[Call | Return]:
        found = []
        with Trace(racer.dom, "hit", symbols=racer.image) as trace:
            racer.start()
            async for seen in trace:
                found.append(seen)
                if len(found) == CALLS:
                    break
        return found

    assert len(asyncio.run(some())) == CALLS
    assert racer.lines("noticed") == [0] * 4


def test_what_cannot_be_traced(racer: RunningGuest) -> None:
    with pytest.raises(xa.SymbolError, match="has no symbol 'hot'"):
        Trace(racer.dom, "hot", symbols=racer.image)
    with pytest.raises(xa.InvalidArgumentError, match="at least one function"):
        Trace(racer.dom, symbols=racer.image)
    assert not racer.dom.altp2m_active
