# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draw a state of views for a terminal: a strip of letters for each view."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from xenaltp2m.tools.state.layout import (
    BEHIND,
    ELSEWHERE,
    Axis,
    Column,
    Counts,
    colour,
    is_dark,
    place_name,
    position,
    size,
    vcpus_in,
    view_name,
    view_words,
)
from xenaltp2m.types import Access
from xenaltp2m.values.state import State, ViewState

LETTERS = {
    Access.N: "n",
    Access.R: "r",
    Access.W: "w",
    Access.X: "x",
    Access.RW: "W",
    Access.RX: "X",
    Access.WX: "z",
    Access.RWX: "A",
    Access.N2RWX: "2",
    Access.RX2RW: "3",
    Access.R_PW: "p",
}
_MARKS = {
    "*": "several accesses",
    ".": "as in the host p2m",
    "~": "unchanged in all views, folded",
    "o": "remapped gfn",
    "^": "page that a remap maps",
    "+": "suppress #VE on",
    "-": "suppress #VE off",
    "%": "suppress #VE on and off",
    "!": "a #VE page",
    "#0": "the first added page",
}
_LEGEND = {letter: str(access) for access, letter in LETTERS.items()} | _MARKS
_LEAST_WIDTH = 40
_MARGIN = 9
_LABEL_ROWS = 3
_MOST_VCPUS = 8


class Span(NamedTuple):
    """Adjacent letters of a line, and the access that determines their colour."""

    text: str
    access: Access | None = None

    @property
    def colours(self) -> tuple[str, str] | None:
        """The foreground and the background; None for the terminal's own."""
        if self.access is None:
            return None
        behind = colour(self.access)
        return "#ffffff" if is_dark(behind) else "#000000", behind


def strips(state: State, width: int) -> list[list[Span]]:
    """Draw a state for a terminal: lines of letters, each with its access.

    Args:
        state: The state to draw.
        width: The width of a line in letters; at least 40 are used.
    """
    return _Strips(state, max(width, _LEAST_WIDTH)).lines


class _Strips:
    """Draws one state in letters."""

    def __init__(self, state: State, width: int) -> None:
        most = width - _MARGIN - bool(state.pages)  # a space precedes added pages
        self._axis = Axis(state, most)
        self._places = self._lay_out(most)
        self._used: set[str] = set()
        self.lines: list[list[Span]] = []
        elsewhere = vcpus_in(state, None)
        if elsewhere:
            self._head(ELSEWHERE, [], elsewhere, width)
        for number, view in enumerate(state.views):
            self._head(view_name(number, view), view_words(view), vcpus_in(state, number), width)
            self._draw(view)
        self._draw_axis({self._axis.column(gfn) for _, gfn in state.notify})
        legend = [f"{mark} {words}" for mark, words in _LEGEND.items() if mark in self._used]
        self.lines += [[Span(line)] for line in ["", *_wrapped(legend, width)] if legend]

    def _lay_out(self, most: int) -> list[tuple[int, int]]:
        """Return where columns begin and end, in letters; each has at least one."""
        columns = self._axis.columns
        roomy = sum(len(_fold_words(column)) for column in columns) <= most
        edges = list(map(round, self._axis.edges(
            lambda column: len(_fold_words(column)) if roomy else 1, most
        )))  # fmt: skip
        shifts = [int(column.first >= BEHIND) for column in columns]
        return [(start + shift, end + shift)
                for (start, end), shift in zip(pairwise(edges), shifts, strict=True)]  # fmt: skip

    def _head(self, name: str, words: Sequence[str], vcpus: Sequence[int], width: int) -> None:
        parts = list(words)
        if vcpus:
            shown = ", ".join(map(str, vcpus[:_MOST_VCPUS]))
            more = ", ..." if len(vcpus) > _MOST_VCPUS else ""
            parts.append(f"vCPU{'s' if len(vcpus) > 1 else ''} {shown}{more}")
        line = name + (f": {', '.join(parts)}" if parts else "")
        self.lines.append([Span(line if len(line) <= width else f"{line[: width - 3]}...")])

    def _draw(self, view: ViewState) -> None:
        columns = self._axis.columns
        if not columns:
            return
        self._row("access", map(_access, self._axis.spread(view.access), columns))
        if view.remaps:
            marks = [" "] * len(columns)
            for _, new in view.remaps:
                marks[self._axis.column(position(new))] = "^"
            for gfn, _ in view.remaps:
                marks[self._axis.column(position(gfn))] = "o"
            self._row("remaps", map(Span, marks))
        if view.suppress_ve:
            self._row("#VE", map(_bit, self._axis.spread(view.suppress_ve)))

    def _row(self, name: str, letters: Iterable[Span]) -> None:
        """Add a line with a letter for each column."""
        wide, at = [], 0
        for span, (start, end) in zip(letters, self._places, strict=True):
            wide += [Span(" " * (start - at)), Span(span.text * (end - start), span.access)]
            self._used.add(span.text)
            at = end
        joined = [
            Span("".join(span.text for span in spans), access)
            for access, spans in groupby(wide, lambda span: span.access)
        ]
        self.lines.append([Span(f"  {name}".ljust(_MARGIN)), *joined])

    def _draw_axis(self, notified: set[int]) -> None:
        """Add ticks, with the lengths of folded columns, and the gfns below them."""
        if not self._places:
            return
        last = self._places[-1][1]
        ticks = [" "] * last
        labels = [[" "] * last for _ in range(_LABEL_ROWS)]
        free = [0] * _LABEL_ROWS
        for number, column in enumerate(self._axis.columns):
            start, end = self._places[number]
            if column.folded:
                words = _fold_words(column)
                if len(words) <= end - start:
                    ticks[start:end] = words.center(end - start)
                continue
            words = place_name(column.first).removeprefix("gfn ").replace("added page ", "#")
            at = min(start, last - len(words))
            row = next((row for row in range(_LABEL_ROWS) if free[row] <= at), None)
            if row is not None:
                ticks[start] = "|"
                labels[row][at : at + len(words)] = words
                free[row] = at + len(words) + 1
            if number in notified:
                ticks[start] = "!"
                self._used.add("!")
            if column.first == BEHIND:
                self._used.add("#0")
        rows = ["".join(row).rstrip() for row in (ticks, *labels)]
        self.lines += [
            [Span(f"{'' if number else '  gfn':{_MARGIN}}{row}")]
            for number, row in enumerate(rows)
            if row
        ]


def _access(counts: Counts, column: Column) -> Span:
    if not counts:
        return Span("~" if column.folded else ".")
    [(access, count), *others] = counts.most_common()
    whole = not others and count == column.count
    return Span(LETTERS[access] if whole else "*", access)


def _bit(counts: Counts) -> Span:
    if len(counts) > 1:
        return Span("%")
    return Span("".join("+" if bit else "-" for bit in counts) or " ")


def _fold_words(column: Column) -> str:
    return f"<{size(column.count)}>" if column.folded else "|"


def _wrapped(parts: Sequence[str], width: int) -> Iterator[str]:
    """Yield lines, each with as many parts as fit."""
    line = ""
    for part in parts:
        if line and len(line) + 3 + len(part) > width:
            yield line
            line = ""
        line = f"{line}   {part}" if line else part
    yield line
