# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs are a dict that is cheap for neighbours."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenaltp2m.values import intervals as module
from xenaltp2m.values.intervals import IntervalMap, Intervals, Run

GFNS = st.integers(0, 40)
VALUES = st.sampled_from(["a", "b", None])
WRITES = st.one_of(
    st.tuples(st.just("one"), GFNS, VALUES),
    st.tuples(st.just("range"), st.builds(range, GFNS, GFNS), VALUES),
    st.tuples(st.just("steps"), st.builds(range, GFNS, GFNS, st.integers(2, 3)), VALUES),
    st.tuples(st.just("down"), st.builds(range, GFNS, GFNS, st.just(-1)), VALUES),
    st.tuples(st.just("list"), st.lists(GFNS, max_size=8), VALUES),
    st.tuples(st.just("look"), st.none(), st.none()),
    st.tuples(st.just("clear"), st.none(), st.none()),
)


def joined(model: dict[int, str]) -> list[tuple[int, int, str]]:
    """The runs a dict amounts to."""
    found: list[tuple[int, int, str]] = []
    for gfn, value in sorted(model.items()):
        if found and found[-1][1:] == (gfn, value):
            found[-1] = (found[-1][0], gfn + 1, value)
        else:
            found.append((gfn, gfn + 1, value))
    return found


@given(st.lists(WRITES, max_size=20))
def test_runs_are_the_dict_s(
    writes: list[tuple[str, Iterable[int] | int | None, str | None]],
) -> None:
    runs: IntervalMap[str] = IntervalMap()
    model: dict[int, str] = {}
    for kind, where, value in writes:
        if kind == "clear":
            runs.clear()
            model.clear()
        elif kind == "look":  # which merges what was pending
            assert [tuple(run) for run in runs] == joined(model)
        else:
            if isinstance(where, int):
                runs.set(where, value)
                gfns = [where]
            else:
                assert where is not None
                runs.set_many(where, value)
                gfns = list(where)
            for gfn in gfns:
                if value is None:
                    model.pop(gfn, None)
                else:
                    model[gfn] = value
        assert {gfn: runs.get(gfn) for gfn in range(42)} == {
            gfn: model.get(gfn) for gfn in range(42)
        }
    assert [tuple(run) for run in runs] == joined(model)
    assert runs.count() == len(model)
    assert bool(runs) == bool(model)


def test_a_falsy_value_is_a_value() -> None:
    runs: IntervalMap[int] = IntervalMap()
    runs.set_many(range(3), 0)
    assert list(runs) == [Run(0, 3, 0)]
    assert runs.get(2) == 0
    assert bool(runs)


def test_a_range_costs_no_more_than_a_gfn() -> None:
    runs: IntervalMap[str] = IntervalMap()
    for _ in range(100):  # a walk over the gfns would take hours
        runs.set_many(range(1 << 36), "a")
        runs.set_many(range(1 << 20, 1 << 30), "b")
    assert list(runs) == [
        Run(0, 1 << 20, "a"),
        Run(1 << 20, 1 << 30, "b"),
        Run(1 << 30, 1 << 36, "a"),
    ]
    assert runs.count() == 1 << 36


@pytest.mark.parametrize("order", [1, -1])
def test_single_writes_in_any_order_are_one_run(order: int) -> None:
    runs: IntervalMap[str] = IntervalMap()
    for gfn in range(100)[::order]:
        runs.set(gfn, "a")
    assert list(runs) == [Run(0, 100, "a")]


LONG = st.integers(0, 2000)
MANY = st.lists(
    st.tuples(
        st.one_of(
            st.builds(range, LONG, LONG),
            st.builds(range, LONG, LONG, st.integers(2, 3)),
            st.lists(LONG, max_size=8),
        ),
        VALUES,
        st.booleans(),
    ),
    max_size=8,
)


@given(MANY)
def test_fault_17_many_writes_at_once_are_the_dict_s(
    writes: list[tuple[Iterable[int], str | None, bool]],
) -> None:
    """More than are spliced in one by one: whole runs, their ends and their middles go."""
    runs: IntervalMap[str] = IntervalMap()
    model: dict[int, str] = {}
    for gfns, value, look in writes:
        runs.set_many(gfns, value)
        for gfn in gfns:
            model.pop(gfn, None)
            model |= {gfn: value} if value is not None else {}
        if look:
            assert runs.count() == len(model)
    assert [tuple(run) for run in runs] == joined(model)


def test_fault_17_interleaved_writes_take_linear_time() -> None:
    """Writes between 200 000 runs: as long as four times as many as between a quarter of them."""

    def seconds(count: int) -> float:
        runs: IntervalMap[str] = IntervalMap()
        begun = time.process_time()
        runs.set_many(range(0, 2 * count, 2), "a")
        assert runs.count() == count
        runs.set_many(range(1, 2 * count, 2), "b")
        assert len(list(runs)) == 2 * count
        return time.process_time() - begun

    small = min(seconds(50_000) for _ in range(3))
    assert seconds(200_000) < 9 * small


MODELS = st.dictionaries(st.integers(0, 200), st.sampled_from("ab"))


@given(MODELS, MODELS, st.integers(1, 9))
def test_changes_are_what_only_one_has(
    one: dict[int, str], other: dict[int, str], at_once: int
) -> None:
    def triples(model: dict[int, str]) -> list[tuple[int, int, str]]:
        return [(first, end - first, value) for first, end, value in joined(model)]

    before, after = triples(one), triples(other)
    expected = [(run, False) for run in before if run not in after]
    expected += [(run, True) for run in after if run not in before]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_COMPARED_AT_ONCE", at_once)
        found = list(Intervals.of(before).changes(Intervals.of(after)))
    assert found == sorted(expected, key=lambda change: (change[0][0], change[1]))
