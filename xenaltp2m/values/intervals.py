# SPDX-License-Identifier: LGPL-2.1-or-later
"""A map from gfns to values that stores runs of consecutive gfns with one value as one entry."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter, sub
from typing import Generic, NamedTuple, TypeVar

V = TypeVar("V")
T = TypeVar("T")

_COMPARED_AT_ONCE = 1024
_SPLICED = 64
"""More writes than this are merged in one pass, and a shorter range is stored as single writes,
because a splice moves all runs after it."""


class Run(NamedTuple, Generic[V]):
    """A run of gfns with one value: from ``first`` up to, but not including, ``end``."""

    first: int
    end: int
    value: V


class IntervalMap(Generic[V]):
    """Values by gfn. A million consecutive gfns with one value cost as much as one gfn.

    Single writes are collected in a dict and merged when runs are read, so that a write costs no
    more than a dict's.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._values: list[V] = []
        self._pending: dict[int, V | None] = {}

    def get(self, gfn: int) -> V | None:
        """Return the value at ``gfn``, or None."""
        if gfn in self._pending:
            return self._pending[gfn]
        at = bisect_right(self._starts, gfn) - 1
        if at >= 0 and gfn < self._ends[at]:
            return self._values[at]
        return None

    def set(self, gfn: int, value: V | None) -> None:
        """Set the value of one gfn; None removes it."""
        self._pending[gfn] = value

    def set_many(self, gfns: Iterable[int], value: V | None) -> None:
        """Set the value of many gfns; None removes them. A range costs as much as one gfn."""
        if isinstance(gfns, range) and gfns.step == 1 and len(gfns) > _SPLICED:
            self._merge()
            self._splice(gfns.start, gfns.stop, value)
        else:
            self._pending.update(dict.fromkeys(gfns, value))

    def move(self, gfns: Mapping[int, int]) -> None:
        """Move values from gfns to new gfns, given by old gfn."""
        values = {new: self.get(gfn) for gfn, new in gfns.items()}
        self._pending |= dict.fromkeys(gfns)
        self._pending |= values

    def clear(self) -> None:
        """Remove all values."""
        self._pending.clear()
        for part in (self._starts, self._ends, self._values):
            part.clear()

    def __iter__(self) -> Iterator[Run[V]]:
        """Yield the runs in order of gfn; consecutive gfns of equal value are one run."""
        self._merge()
        return map(Run, self._starts, self._ends, self._values)

    def frozen(self) -> Intervals[V]:
        """Return an immutable copy of the runs."""
        self._merge()
        counts = tuple(map(sub, self._ends, self._starts))
        return Intervals(tuple(self._starts), counts, tuple(self._values))

    def __bool__(self) -> bool:
        self._merge()
        return bool(self._starts)

    def count(self) -> int:
        """Count the gfns that have a value. Not ``len``, which would suggest the number of runs."""
        self._merge()
        return sum(self._ends) - sum(self._starts)

    def sample(self, count: int | None) -> list[tuple[int, V]]:
        """Return random gfns with their values, at most ``count``, in order; None returns all."""
        total = self.count()
        places: Sequence[int] = range(total)
        if count is not None and count < total:
            places = sorted(random.sample(places, count))
        return list(self._at(places))

    def _at(self, places: Iterable[int]) -> Iterator[tuple[int, V]]:
        """Yield gfns with their values, by ascending index among all gfns that have a value."""
        self._merge()
        ends = list(accumulate(map(sub, self._ends, self._starts)))
        run = 0
        for place in places:
            run = bisect_right(ends, place, run)
            yield self._ends[run] - (ends[run] - place), self._values[run]

    def _merge(self) -> None:
        if not self._pending:
            return
        writes = list(_joined((gfn, gfn + 1, self._pending[gfn]) for gfn in sorted(self._pending)))
        self._pending.clear()
        if len(writes) <= _SPLICED:
            for start, end, value in writes:
                self._splice(start, end, value)
        else:
            self._weave(writes)

    def _weave(self, writes: list[tuple[int, int, V | None]]) -> None:
        """Merge ascending writes with all runs in one pass."""
        runs = _without(zip(self._starts, self._ends, self._values, strict=True), writes)
        set_now = ((start, end, value) for start, end, value in writes if value is not None)
        # Python's sort merges two ascending sequences in linear time.
        woven = list(_joined(sorted([*runs, *set_now], key=itemgetter(0))))
        self._starts = [run[0] for run in woven]
        self._ends = [run[1] for run in woven]
        self._values = [run[2] for run in woven]

    def _splice(self, start: int, end: int, value: V | None) -> None:
        if start >= end:
            return
        low = bisect_left(self._ends, start)  # the first run that touches or follows start
        high = bisect_right(self._starts, end)  # past the last run that touches or precedes end
        runs: list[tuple[int, int, V]] = []
        for at in range(low, high):
            first, last, held = self._starts[at], self._ends[at], self._values[at]
            if value is not None and held == value:
                start, end = min(start, first), max(end, last)
                continue
            if first < start:
                runs.append((first, min(last, start), held))
            if last > end:
                runs.append((max(first, end), last, held))
        if value is not None:
            runs.append((start, end, value))
        runs.sort(key=lambda run: run[0])
        self._starts[low:high] = [run[0] for run in runs]
        self._ends[low:high] = [run[1] for run in runs]
        self._values[low:high] = [run[2] for run in runs]


def _joined(runs: Iterable[tuple[int, int, T]]) -> Iterator[tuple[int, int, T]]:
    """Join adjacent runs that have the same value."""
    held: tuple[int, int, T] | None = None
    for run in runs:
        if held is not None and held[1] == run[0] and held[2] == run[2]:
            held = (held[0], run[1], run[2])
            continue
        if held is not None:
            yield held
        held = run
    if held is not None:
        yield held


def _without(
    runs: Iterable[tuple[int, int, V]], writes: Sequence[tuple[int, int, object]]
) -> Iterator[tuple[int, int, V]]:
    """Yield the parts of runs that no write covers; both must ascend."""
    at = 0
    for start, end, value in runs:
        rest = start
        while at < len(writes) and writes[at][0] < end:
            first, last, _ = writes[at]
            if rest < first:
                yield rest, first, value
            rest = max(rest, last)
            if last > end:
                break
            at += 1
        if rest < end:
            yield rest, end, value


@dataclass(frozen=True, slots=True)
class Intervals(Generic[V]):
    """Immutable runs, stored in columns, because a million tuples take ten times as long.

    Iterating yields (first, count, value). Firsts ascend.
    """

    firsts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    values: tuple[V, ...] = ()

    @classmethod
    def of(cls, runs: Iterable[tuple[int, int, V]]) -> Intervals[V]:
        """Make intervals from (first, count, value) triples, which must be in order."""
        columns = tuple(zip(*runs, strict=True))
        return cls(*columns) if columns else cls()

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self) -> Iterator[tuple[int, int, V]]:
        return zip(self.firsts, self.counts, self.values, strict=True)

    def __getitem__(self, which: slice) -> Intervals[V]:
        return Intervals(self.firsts[which], self.counts[which], self.values[which])

    def changes(self, other: Intervals[V]) -> Iterator[tuple[tuple[int, int, V], bool]]:
        """Yield the runs that only one of both has, and whether that one is ``other``."""
        ours = theirs = 0
        while ours < len(self) or theirs < len(other):
            our_end, their_end = ours + _COMPARED_AT_ONCE, len(other)
            if our_end < len(self):
                their_end = bisect_left(other.firsts, self.firsts[our_end], theirs)
            here, there = self[ours:our_end], other[theirs:their_end]
            ours, theirs = our_end, their_end
            if here == there:
                continue
            before, after = set(here), set(there)
            for run in sorted(before ^ after, key=lambda run: (run[0], run in after)):
                yield run, run in after
