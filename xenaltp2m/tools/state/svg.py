# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draw a state of views for a browser: as SVG, or as a page that contains it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple
from xml.etree import ElementTree as ET

from xenaltp2m.tools.state.layout import (
    BEHIND,
    COLOURS,
    ELSEWHERE,
    FIRST_ACCESS,
    Axis,
    Counts,
    channels,
    colour,
    heading,
    is_dark,
    place_name,
    position,
    size,
    totals,
    vcpus_in,
    view_name,
    view_words,
)
from xenaltp2m.types import Access
from xenaltp2m.values.state import Place, State, ViewState

_MOST_COLUMNS = 1200
_MOST_CELLS = 1 << 14
"""The limit for all views together."""
_LEAST_COLUMNS = 32
_MOST_ARCS = 512
_BUNDLES = 64
"""The limit for all views together if there are more remaps than arcs."""
_MOST_ROWS = 200
_MOST_CHIPS = 6
_NAMESPACE = "http://www.w3.org/2000/svg"


def svg(state: State) -> str:
    """Draw a state as one self-contained file.

    It has at most some ten thousand shapes, however large the state is; each has a tooltip.
    """
    root = _Drawing(state).root
    ET.indent(root, " ")
    return ET.tostring(root, encoding="unicode") + "\n"


def html(state: State) -> str:
    """Draw a state as a page with a table of its contents."""
    page = ET.Element("html", {"lang": "en"})
    head = ET.SubElement(page, "head")
    ET.SubElement(head, "meta", {"charset": "utf-8"})
    policy = {"http-equiv": "Content-Security-Policy"}
    policy["content"] = "default-src 'none'; style-src 'unsafe-inline'"
    ET.SubElement(head, "meta", policy)
    _text(head, "title", heading(state))
    _text(head, "style", _PAGE_STYLE)
    body = ET.SubElement(page, "body")
    ET.SubElement(body, "div").append(_Drawing(state).root)
    _add_table(
        body,
        ("view", "default", "guest may enter", "vCPUs", "gfns with access of their own", "remaps"),
        [
            (
                view_name(number, view),
                str(view.default_access),
                "yes" if view.visible else "no",
                ", ".join(map(str, vcpus_in(state, number))),
                _counted(totals(view.access)),
                str(len(view.remaps)),
            )
            for number, view in enumerate(state.views[:_MOST_ROWS])
        ],
        len(state.views),
    )
    if state.pages:
        _add_table(
            body,
            ("added page", "SHA-256"),
            [(str(n), page.sha256) for n, page in enumerate(state.pages[:_MOST_ROWS])],
            len(state.pages),
        )
    # HTML has no self-closing tags for empty elements.
    text = ET.tostring(page, encoding="unicode", short_empty_elements=False)
    return f"<!DOCTYPE html>\n{text}\n"


def _counted(counts: Counts) -> str:
    return ", ".join(f"{value} {count}" for value, count in counts.items())


def _add_table(
    body: ET.Element, head: Sequence[str], rows: Iterable[Sequence[str]], all_of: int
) -> None:
    table = ET.SubElement(body, "table")
    line = ET.SubElement(table, "tr")
    for name in head:
        _text(line, "th", name)
    for row in rows:
        line = ET.SubElement(table, "tr")
        for cell in row:
            _text(line, "td", cell)
    if all_of > _MOST_ROWS:
        _text(body, "p", f"and {all_of - _MOST_ROWS} more")


def _text(parent: ET.Element, tag: str, text: str, /, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


_PAGE_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5em; color: #1b1f24; background: #ffffff }
div { overflow-x: auto }
table { border-collapse: collapse; margin-top: 1.5em }
th, td { text-align: left; padding: .2em 1.2em .2em 0; border-bottom: 1px solid #8b949e }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 } }
"""

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1b1f24 }
.small { font-size: 10px }
.soft { fill: #57606a }
.strong { font-weight: 600 }
.middle { text-anchor: middle }
.paper { fill: #ffffff }
.rest { fill: #e4e7eb }
.folded { fill: #f4f5f7; stroke: #8b949e; stroke-dasharray: 2 2; stroke-width: .5 }
.hidden { fill: none; stroke: #1b1f24; stroke-dasharray: 5 4 }
.tick { stroke: #8b949e; stroke-width: .7 }
.remap { fill: none; stroke: #1b1f24; stroke-opacity: .6 }
.remap:hover { stroke: #d1006c; stroke-opacity: 1; stroke-width: 3 }
.dot, .notify { fill: #1b1f24 }
.vcpu { fill: #1b1f24 }
.vcpu-number { fill: #ffffff; font-size: 10px; font-weight: 600 }
.on { fill: #1b1f24 }
.off { fill: none; stroke: #1b1f24; stroke-width: .8 }
.some { fill: #1b1f24; fill-opacity: .45 }
.added { fill: none; stroke: #8b949e; stroke-width: .8 }
.run { stroke: #ffffff; stroke-width: .6 }
.run:hover { stroke: #1b1f24; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
 text { fill: #e6edf3 }
 .soft { fill: #9aa4af }
 .paper { fill: #0d1117 }
 .rest { fill: #2b313a }
 .folded { fill: #161b22 }
 .hidden, .remap, .off { stroke: #e6edf3 }
 .dot, .notify, .vcpu, .on, .some { fill: #e6edf3 }
 .vcpu-number { fill: #0d1117 }
 .run { stroke: #0d1117 }
 .run:hover { stroke: #e6edf3 }
}
.dark { fill: #1b1f24 }
.light { fill: #ffffff }
"""

_LEFT, _RIGHT, _TOP = 200.0, 40.0, 44.0
_LEAST_WIDTH, _MOST_WIDTH = 640.0, 3600.0
_GAP = 14.0
"""Space between gfns and added pages."""
_COLUMN, _FOLD, _DOUBLING = 10.0, 16.0, 8.0
"""The least width of a column and of a folded one, and the width per doubling of its length."""
_STRIP, _BAR, _ARCS, _BETWEEN = 26.0, 6.0, 36.0, 22.0
_LABELS = 84.0
_LABEL_DISTANCE = 11.9
_TEXT_WIDTH = 34.0
_LETTER, _SMALL_LETTER = 7.2, 5.8
"""The approximate width of a letter."""


class _Drawing:
    """Draws one state."""

    def __init__(self, state: State) -> None:
        self._state = state
        views = max(1, len(state.views))
        most = max(_LEAST_COLUMNS, min(_MOST_COLUMNS, _MOST_CELLS // views))
        self._axis = Axis(state, most)
        self._most_arcs = max(1, _MOST_ARCS // views), max(1, _BUNDLES // views)
        columns = self._axis.columns
        needed = sum(_FOLD if column.folded else _COLUMN for column in columns)
        scale = min(1.0, _MOST_WIDTH / max(needed, 1.0))
        wanted = needed + _DOUBLING * sum(
            math.log2(column.count) for column in columns if not column.folded
        )
        edges = self._axis.edges(
            lambda column: scale * (_FOLD if column.folded else _COLUMN),
            max(_LEAST_WIDTH, min(wanted, _MOST_WIDTH)),
        )
        self._edges = [round(edge, 2) for edge in edges]
        self._seen: set[Access] = set()
        self._shown: set[str] = set()
        """The kinds of shapes that the legend must explain."""
        self.root = ET.Element("svg", {"xmlns": _NAMESPACE, "role": "img"})
        self.root.set("aria-label", heading(state))
        _text(self.root, "style", _STYLE)
        self._add_hatch()
        self._rect(self.root, "paper", 0, 0, "100%", "100%")
        self._width = max(_LEFT + self._edges[-1] + _GAP + _RIGHT, 560)
        self._draw()

    def _draw(self) -> None:
        state = self._state
        _text(self.root, "text", heading(state), x="12", y="22", **{"class": "strong"})
        y = _TOP
        elsewhere = vcpus_in(state, None)
        if elsewhere:
            self._label(y, ELSEWHERE, "view 0, or views of other owners", elsewhere)
            y += _STRIP + _BETWEEN
        for number, view in enumerate(state.views):
            y = self._view(number, view, y)
        self._draw_axis(y)
        y = self._legend(y + (_LABELS if self._axis.columns else 0) + 22)
        self.root.set("viewBox", f"0 0 {_number(self._width)} {_number(y + 12)}")
        self.root.set("width", _number(self._width))
        self.root.set("height", _number(y + 12))

    # Positions of columns.

    def _x(self, edge: int, *, end: bool = False) -> float:
        """Return the left edge of a column, or with ``end`` the right edge of the one before."""
        column = edge - 1 if end else edge
        behind = column < len(self._axis.columns) and self._axis.columns[column].first >= BEHIND
        return _LEFT + self._edges[edge] + (_GAP if behind else 0)

    def _middle(self, column: int) -> float:
        return (self._x(column) + self._x(column + 1, end=True)) / 2

    # Views.

    def _view(self, number: int, view: ViewState, y: float) -> float:
        """Draw a view at ``y``; return the position of the next one."""
        group = ET.SubElement(self.root, "g", {"class": "view"})
        name = view_name(number, view)
        if view.remaps:
            y += _ARCS
        self._label(y, name, ", ".join(view_words(view)), vcpus_in(self._state, number))
        self._rests(group, name, y)
        self._cells(group, name, self._axis.spread(view.access), y)
        if not view.visible and self._axis.columns:
            last = len(self._axis.columns)
            box = self._rect(
                group, "hidden", _LEFT - 3, y - 3, self._x(last, end=True) - _LEFT + 6, _STRIP + 6
            )
            _text(box, "title", f"{name} is hidden: the guest's VMFUNC cannot enter it")
            box.set("pointer-events", "stroke")
            self._shown.add("hidden")
        for remap in _remaps(view, self._axis, *self._most_arcs):
            self._arc(group, name, remap, y)
        y += _STRIP
        if view.suppress_ve:
            self._bits(group, name, self._axis.spread(view.suppress_ve), y + 2)
            y += _BAR + 2
        return y + _BETWEEN

    def _label(self, y: float, name: str, words: str, vcpus: Sequence[int]) -> None:
        most = int((_LEFT - 20) / _LETTER)
        short = name if len(name) <= most else name[: most - 1] + "…"
        shown = _text(self.root, "text", short, x="12", y=_number(y + 9), **{"class": "strong"})
        if short != name:
            _text(shown, "title", name)
        _text(self.root, "text", words, x="12", y=_number(y + 22), **{"class": "small soft"})
        x = 12.0
        chips = [(str(vcpu), f"vCPU {vcpu} is in {name}") for vcpu in vcpus[:_MOST_CHIPS]]
        if len(vcpus) > _MOST_CHIPS:
            more = ", ".join(map(str, vcpus[_MOST_CHIPS:]))
            chips.append((f"+{len(vcpus) - _MOST_CHIPS}", f"vCPUs {more} are in {name}"))
        for text, title in chips:
            self._shown.add("vcpu")
            width = 8 + _SMALL_LETTER * len(text)
            chip = ET.SubElement(self.root, "g")
            self._rect(chip, "vcpu", x, y + 27, width, 13).set("rx", "6")
            at = {"x": _number(x + width / 2), "y": _number(y + 37), "class": "vcpu-number middle"}
            _text(chip, "text", text, **at)
            _text(chip, "title", title)
            x += width + 4

    def _rests(self, group: ET.Element, name: str, y: float) -> None:
        """Draw the background of a view: columns that it has not set."""
        for folded, numbers in groupby(
            range(len(self._axis.columns)),
            lambda number: (self._axis.columns[number].folded and number + 1,
                            self._axis.columns[number].first >= BEHIND),
        ):  # fmt: skip
            columns = list(numbers)
            kind = "folded" if folded[0] else "added" if folded[1] else "rest"
            box = self._box(group, kind, columns[0], columns[-1], y, _STRIP)
            column = self._axis.columns[columns[0]]
            if kind == "folded":
                where = place_name(column.first, column.count)
                words = f"{where}: unchanged in all views, {size(column.count)}, folded"
            else:
                words = f"{name}: as in the host p2m"
            _text(box, "title", words)
            self._shown.add(kind)

    def _cells(self, group: ET.Element, name: str, cells: Sequence[Counts], y: float) -> None:
        """Draw the access of columns; adjacent ones with the same access become one box."""
        columns = self._axis.columns

        def kind(number: int) -> tuple[Access | None, int | None]:
            """Return the access, if there is only one; and a number that prevents joining."""
            column = columns[number]
            [*values] = cells[number]
            if len(values) == 1 and cells[number][values[0]] == column.count:
                return values[0], number if column.first >= BEHIND else None
            return None, number

        for (access, _), numbers in groupby(range(len(columns)), kind):
            run = list(numbers)
            first, last = run[0], run[-1]
            where = self._where(first, last)
            if access is not None:
                self._seen.add(access)
                box = self._box(group, f"run {access}", first, last, y, _STRIP)
                box.set("fill", colour(access))
                title = f"{name}: {where}: {access}"
                _text(box, "title", title)
                if access in FIRST_ACCESS:
                    _text(self._hatched(group, first, last, y), "title", title)
                self._write(group, str(access), access, first, last, y)
            elif cells[first]:
                counts = cells[first]
                box = self._box(group, "run mixed", first, last, y, _STRIP)
                box.set("fill", _mixed(counts))
                rest = columns[first].count - counts.total()
                told = _counted(counts) + (f", {rest} as in the host p2m" if rest else "")
                _text(box, "title", f"{name}: {where}, drawn as one: {told}")
                self._shown.add("mixed")

    def _write(
        self, group: ET.Element, text: str, access: Access, first: int, last: int, y: float
    ) -> None:
        """Write a text into a box, if it fits."""
        x, end = self._x(first), self._x(last + 1, end=True)
        if end - x < _TEXT_WIDTH:
            return
        tone = "light" if is_dark(colour(access)) else "dark"
        at = {"x": _number((x + end) / 2), "y": _number(y + _STRIP / 2 + 4)}
        at |= {"class": f"small middle {tone}", "pointer-events": "none"}
        if access in FIRST_ACCESS:  # legible on the hatch
            at |= {"paint-order": "stroke", "stroke": colour(access), "stroke-width": "4"}
        _text(group, "text", text, **at)

    def _bits(self, group: ET.Element, name: str, cells: Sequence[Counts], y: float) -> None:
        """Draw the runs of suppress-#VE bits."""
        columns = self._axis.columns
        for values, numbers in groupby(
            range(len(columns)), lambda number: tuple(sorted(cells[number]))
        ):
            run = list(numbers)
            if not values:
                continue
            first, last = run[0], run[-1]
            kind = "some" if len(values) > 1 else "on" if values[0] else "off"
            box = self._box(group, f"ve {kind}", first, last, y, _BAR)
            words = {"on": "on", "off": "off", "some": "on and off"}[kind]
            where = self._where(first, last)
            _text(box, "title", f"{name}: {where}: suppress #VE {words}")
            self._shown.add(kind)

    def _arc(self, group: ET.Element, name: str, remap: _Remap, y: float) -> None:
        """Draw an arc from a remapped gfn to its target."""
        source, target = self._middle(remap.source), self._middle(remap.target)
        part = min(1.0, abs(target - source) / max(self._edges[-1], 1.0))
        top = y - (14 + (_ARCS - 10) * part) * 4 / 3
        path = {"class": "remap", "marker-end": "url(#shows)"}
        path["d"] = (
            f"M {_number(source)} {_number(y)} C {_number(source)} {_number(top)} "
            f"{_number(target)} {_number(top)} {_number(target)} {_number(y)}"
        )
        arc = ET.SubElement(group, "path", path)
        (gfn, new), *others = remap.pairs
        words = f"{place_name(position(gfn))} maps {place_name(position(new))}"
        if others:
            arc.set("stroke-width", "2.5")
            words = f"{len(remap.pairs)} remaps drawn as one, the first: {words}"
        _text(arc, "title", f"{name}: {words}")
        dot = {"class": "dot", "cx": _number(source), "cy": _number(y), "r": "2.2"}
        ET.SubElement(group, "circle", dot)
        self._shown.add("remap")

    # Axis and legend.

    def _draw_axis(self, y: float) -> None:
        group = ET.SubElement(self.root, "g", {"class": "axis"})
        columns = self._axis.columns
        places = [
            (column.folded, self._middle(number) - 4 if column.folded else self._x(number), column)
            for number, column in enumerate(columns)
        ]
        taken: list[float] = []
        for folded, x, column in sorted(places, key=lambda place: place[:2]):
            at = bisect_right(taken, x)
            if any(abs(x - other) < _LABEL_DISTANCE for other in taken[max(at - 1, 0) : at + 1]):
                continue
            taken.insert(at, x)
            words, kind = place_name(column.first).removeprefix("gfn "), "label"
            if folded:
                words, kind = size(column.count), "length soft"
            else:
                tick = {"class": "tick", "x1": _number(x), "x2": _number(x)}
                tick |= {"y1": _number(y - _BETWEEN + 2), "y2": _number(y - 6)}
                ET.SubElement(group, "line", tick)
            turned = f"translate({_number(x + 3)} {_number(y)}) rotate(70)"
            _text(group, "text", words, transform=turned, **{"class": f"small {kind}"})
        for vcpu, gfn in self._state.notify:
            x = self._middle(self._axis.column(gfn))
            points = _triangle(x, y - 14)
            mark = ET.SubElement(group, "polygon", {"class": "notify", "points": points})
            _text(mark, "title", f"vCPU {vcpu} gets the cause of a #VE at {place_name(gfn)}")
            self._shown.add("notify")

    def _legend(self, y: float) -> float:
        """Explain the shapes in the drawing; return the legend's lower edge."""
        group = ET.SubElement(self.root, "g", {"class": "legend"})
        x = 12.0
        for kind, words in self._entries():
            wide = 44 + _SMALL_LETTER * len(words)
            if x > 12 and x + wide > self._width:
                x, y = 12.0, y + 22
            self._sample(group, kind, x, y - 10)
            at = {"x": _number(x + 28), "y": _number(y), "class": "small"}
            _text(group, "text", words, **at)
            x += wide
        if self._axis.columns:
            y += 22
            words = "Not to scale: places where a view changes are drawn wide, and long runs short."
            _text(group, "text", words, x="12", y=_number(y), **{"class": "small soft"})
        return y

    def _entries(self) -> Iterator[tuple[Access | str, str]]:
        for access in (*COLOURS, *FIRST_ACCESS):
            if access in self._seen:
                yield access, str(access)
        for kind, words in (
            ("rest", "as in the host p2m"),
            ("mixed", "several accesses, drawn as one"),
            ("folded", "unchanged in all views: folded"),
            ("added", "added pages"),
            ("remap", "remap: from a gfn to its target"),
            ("on", "suppress #VE on"),
            ("off", "suppress #VE off"),
            ("some", "suppress #VE on and off"),
            ("hidden", "hidden from the guest"),
            ("notify", "a vCPU's #VE page"),
            ("vcpu", "vCPUs in the view"),
        ):
            if kind in self._shown:
                yield kind, words

    def _sample(self, group: ET.Element, kind: Access | str, x: float, y: float) -> None:
        if isinstance(kind, Access):
            self._rect(group, "sample", x, y, 22, 12).set("fill", colour(kind))
            if kind in FIRST_ACCESS:
                self._rect(group, "hatched", x, y, 22, 12).set("fill", "url(#hatch)")
        elif kind == "mixed":
            both = Counter({Access.R: 1, Access.X: 1})
            self._rect(group, "sample", x, y, 22, 12).set("fill", _mixed(both))
        elif kind == "remap":
            path = {"class": "remap", "marker-end": "url(#shows)"}
            path["d"] = f"M {_number(x)} {_number(y + 12)} c 0 -14 20 -14 20 0"
            ET.SubElement(group, "path", path)
        elif kind == "notify":
            points = _triangle(x + 11, y + 2)
            ET.SubElement(group, "polygon", {"class": "notify", "points": points})
        elif kind in ("on", "off", "some"):
            self._rect(group, kind, x, y + 3, 22, _BAR)
        else:
            self._rect(group, kind, x, y, 22, 12).set("rx", "6" if kind == "vcpu" else "0")

    def _where(self, first: int, last: int) -> str:
        """Name the positions of adjacent columns."""
        start = self._axis.columns[first].first
        return place_name(start, self._axis.columns[last].end - start)

    # Shapes.

    def _box(
        self, group: ET.Element, kind: str, first: int, last: int, y: float, height: float
    ) -> ET.Element:
        x, end = self._x(first), self._x(last + 1, end=True)
        return self._rect(group, kind, x, y, end - x, height)

    def _hatched(self, group: ET.Element, first: int, last: int, y: float) -> ET.Element:
        box = self._box(group, "hatched", first, last, y, _STRIP)
        box.set("fill", "url(#hatch)")
        return box

    @staticmethod
    def _rect(
        group: ET.Element, kind: str, x: float, y: float, width: float | str, height: float | str
    ) -> ET.Element:
        sides = {"x": x, "y": y, "width": width, "height": height}
        given = {
            name: side if isinstance(side, str) else _number(side) for name, side in sides.items()
        }
        return ET.SubElement(group, "rect", {"class": kind, **given})

    def _add_hatch(self) -> None:
        definitions = ET.SubElement(self.root, "defs")
        hatch = {"id": "hatch", "width": "5", "height": "5", "patternUnits": "userSpaceOnUse"}
        hatch["patternTransform"] = "rotate(45)"
        pattern = ET.SubElement(definitions, "pattern", hatch)
        line = {"y2": "5", "stroke": "#1b1f24", "stroke-width": "3", "stroke-opacity": ".65"}
        ET.SubElement(pattern, "line", line)
        arrow = {"id": "shows", "viewBox": "0 0 8 8", "refX": "7", "refY": "4", "orient": "auto"}
        arrow |= {"markerWidth": "6", "markerHeight": "6", "markerUnits": "userSpaceOnUse"}
        marker = ET.SubElement(definitions, "marker", arrow)
        ET.SubElement(marker, "path", {"class": "dot", "d": "M 0 0 L 8 4 L 0 8 z"})


def _triangle(x: float, y: float) -> str:
    """Return the corners of a triangle that points up at (x, y)."""
    corners = (x, y), (x - 4, y + 8), (x + 4, y + 8)
    return " ".join(f"{_number(across)},{_number(down)}" for across, down in corners)


def _number(value: float) -> str:
    return f"{round(value, 2):.10g}"


class _Remap(NamedTuple):
    """Remaps between the same two columns."""

    source: int
    target: int
    pairs: list[tuple[Place, Place]]


def _remaps(view: ViewState, axis: Axis, most: int, bundles: int) -> list[_Remap]:
    """Return a view's remaps, joined to bundles if there are too many for single arcs."""
    coarse = 1
    while True:
        found: dict[tuple[int, int], _Remap] = {}
        for pair in view.remaps:
            source, target = (axis.column(position(place)) for place in pair)
            key = source // coarse, target // coarse
            found.setdefault(key, _Remap(source, target, [])).pairs.append(pair)
        if len(found) <= (most if coarse == 1 else bundles):
            return list(found.values())
        coarse *= 2


def _mixed(counts: Counts) -> str:
    """Return the mean colour of several accesses."""
    parts = [(channels(colour(access)), count) for access, count in counts.items()]
    total = counts.total()
    mean = [sum(channels[at] * count for channels, count in parts) // total for at in range(3)]
    return "#" + "".join(f"{channel:02x}" for channel in mean)
