# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lay out a picture of a state of views: gfns from left to right, then added pages.

The axis gives space to differences: each place where some view changes gets a column, and a long
range without changes in any view is folded. If there are more columns than can be drawn, adjacent
ones are joined.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, pairwise
from typing import Any, TypeAlias

from xenaltp2m.types import GFN_LIMIT, PAGE_SIZE, Access
from xenaltp2m.values.state import Place, State, ViewState

COLOURS = {
    Access.N: "#d55e00",
    Access.R: "#e69f00",
    Access.W: "#9b09d3",
    Access.X: "#0072b2",
    Access.RW: "#f0e442",
    Access.RX: "#56b4e9",
    Access.WX: "#cc79a7",
    Access.RWX: "#009e73",
}
"""Colours by Okabe and Ito, distinguishable for the colour-blind. Modes that change by themselves
have their first access's colour, hatched."""

FIRST_ACCESS = {Access.N2RWX: Access.N, Access.RX2RW: Access.RX, Access.R_PW: Access.R}
BEHIND = GFN_LIMIT
"""The position of the first added page: after all gfns."""
_FOLDED_FROM = 9
"""The length from which a range of unchanged gfns is folded."""
_MOST_LABEL = 60
ELSEWHERE = "none of these views"

Counts: TypeAlias = "Counter[Any]"
"""The number of gfns in a column, by value."""


@dataclass(frozen=True, slots=True)
class Column:
    """Adjacent positions that are drawn as one."""

    first: int
    end: int
    empty: bool
    """Whether no view has changed anything in it."""

    @property
    def count(self) -> int:
        """The number of gfns, or added pages, in it."""
        return self.end - self.first

    @property
    def folded(self) -> bool:
        """Whether its length is written as text instead of drawn."""
        return self.empty and self.count >= _FOLDED_FROM


class Axis:
    """The columns of a state, from left to right."""

    def __init__(self, state: State, most: int) -> None:
        """Lay out the columns.

        Args:
            state: The state to draw.
            most: The most columns.
        """
        spans = list(_spans(state))
        added = len(state.pages)
        self.columns = [
            *_columns([span for span in spans if span[1] <= BEHIND], most - min(added, most // 4)),
            *_columns([(BEHIND + page, BEHIND + page + 1) for page in range(added)], most // 4),
        ]
        self._firsts = [column.first for column in self.columns]

    def column(self, position: int) -> int:
        """Return the index of the column that contains a position."""
        return bisect_right(self._firsts, position) - 1

    def spread(self, runs: Iterable[tuple[Place, int, Any]]) -> list[Counts]:
        """Count the values of runs in each column."""
        found: list[Counts] = [Counter() for _ in self.columns]
        if not self.columns:
            return found
        number, end = 0, 0
        for first, count, value in _sorted(runs):
            at, stop = first, first + count
            while at < stop:
                if at >= end:
                    number = self.column(at)
                    end = self.columns[number].end
                part = min(stop, end) - at
                found[number][value] += part
                at += part
        return found

    def edges(self, minimum: Callable[[Column], float], width: float) -> list[float]:
        """Return the left edges of the columns, and the right edge of the last one.

        Args:
            minimum: Returns the least width of a column.
            width: The whole width; it grows if the columns need more.
        """
        least = [minimum(column) for column in self.columns]
        logs = [0.0 if column.folded else math.log2(column.count) for column in self.columns]
        room, wanted = max(0.0, width - sum(least)), sum(logs)
        widths = [
            need + room * (log / wanted if wanted else 1 / len(logs))
            for need, log in zip(least, logs, strict=True)
        ]
        return [0.0, *accumulate(widths)]


def position(place: Place) -> int:
    """Return the position of a place: added pages come after all gfns."""
    return place if place >= 0 else BEHIND - 1 - place


def _sorted(
    runs: Iterable[tuple[Place, int, Any]],
) -> Iterator[tuple[int, int, Any]]:
    """Yield runs by position, gfns before added pages; a state lists these first."""
    added = []
    for first, count, value in runs:
        if first < 0:
            added.append((position(first), count, value))
        else:
            yield first, count, value
    yield from sorted(added, key=lambda run: run[0])


def _spans(state: State) -> Iterator[tuple[int, int]]:
    """Yield ranges that must not be folded: first and end."""
    for view in state.views:
        for first, count, _ in chain(view.access, view.suppress_ve):
            yield position(first), position(first) + count
        for place in chain.from_iterable(view.remaps):
            yield position(place), position(place) + 1
    for _, gfn in state.notify:
        yield gfn, gfn + 1


def _columns(spans: Sequence[tuple[int, int]], most: int) -> list[Column]:
    """Cut where a range begins or ends; join adjacent columns if there are too many."""
    if not spans:
        return []
    starts, ends = sorted(first for first, _ in spans), sorted(end for _, end in spans)
    cuts = sorted({0 if starts[0] < BEHIND else BEHIND, *starts, *ends})
    cells = [
        Column(first, end, bisect_right(starts, first) == bisect_right(ends, first))
        for first, end in pairwise(cuts)
    ]
    if len(cells) <= most:
        return cells
    weights = list(accumulate(1 + math.log2(cell.count) / 8 for cell in cells))
    joined = groupby(
        range(len(cells)), lambda number: int((most - 1) * weights[number] / weights[-1])
    )
    groups = [[cells[number] for number in numbers] for _, numbers in joined]
    return [
        Column(group[0].first, group[-1].end, all(cell.empty for cell in group)) for group in groups
    ]


# Texts.


def shown(text: object) -> str:
    """Return a text from any source as one line without control characters."""
    one = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}"
                  for letter in str(text))  # fmt: skip
    return one if len(one) <= _MOST_LABEL else one[: _MOST_LABEL - 1] + "…"


def view_name(number: int, view: ViewState) -> str:
    """Return a view's number and label."""
    return f"view {number}" + (f" {shown(view.label)}" if view.label else "")


def view_words(view: ViewState) -> list[str]:
    """Describe a view's default access and visibility."""
    return [f"default {view.default_access}", *([] if view.visible else ["hidden"])]


def place_name(first: int, count: int = 1) -> str:
    """Name a range of positions."""
    noun, start, number = ("gfn", first, hex)
    if first >= BEHIND:
        noun, start, number = ("added page", first - BEHIND, str)
    if count == 1:
        return f"{noun} {number(start)}"
    return f"{noun}s {number(start)}..{number(start + count - 1)}"


def size(pages: int) -> str:
    """Return the size of pages as text."""
    size = float(pages * PAGE_SIZE >> 10)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def totals(runs: Iterable[tuple[Place, int, Any]]) -> Counts:
    """Count the gfns and added pages of runs by value."""
    found: Counts = Counter()
    for _, count, value in runs:
        found[value] += count
    return found


def vcpus_in(state: State, number: int | None) -> list[int]:
    """List the vCPUs in a view; with None, those in none of the state's views."""
    return [vcpu for vcpu, where in enumerate(state.vcpus) if where == number]


def heading(state: State) -> str:
    """Return the title of a picture."""
    origin = state.origin
    name = origin.get("name") or origin.get("domain")
    parts = [f"Views of {shown(name)}" if name else "Views"]
    if origin.get("xen"):
        parts.append(f"Xen {shown(origin['xen'])}")
    return ", ".join(parts)


# Colours.


def colour(access: Access) -> str:
    """Return the colour of an access, ``#rrggbb``."""
    return COLOURS[FIRST_ACCESS.get(access, access)]


def channels(of: str) -> tuple[int, int, int]:
    """Return a colour's red, green and blue."""
    return int(of[1:3], 16), int(of[3:5], 16), int(of[5:7], 16)


def is_dark(of: str) -> bool:
    """Return whether light letters are more readable on a colour."""
    red, green, blue = (channel / 255 for channel in channels(of))
    return 0.2126 * red**2 + 0.7152 * green**2 + 0.0722 * blue**2 < 0.3
