# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draws ratios as SVG: of each a dot and how far it varies, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

NAMES, PLOT, FIGURES = 480, 330, 70
"""Widths in pixels."""
LINE, TITLE, SCALE = 19, 34, 28
"""Heights in pixels: of a ratio, of a panel's title, of the numbers below it."""
STYLE = (
    "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.name{text-anchor:end}"
    ".scale{text-anchor:middle;fill:#666}.grid{stroke:#ddd}"
    ".even{stroke:#888;stroke-dasharray:4 3}.median{fill:#2a6fb0}"
    ".spread{stroke:#2a6fb0;stroke-width:5;stroke-opacity:.35}"
)


class Bar(NamedTuple):
    """What is drawn of a ratio."""

    name: str
    low: float
    median: float
    high: float


def number(value: float) -> str:
    """Write a ratio, which is positive, with two or three digits."""
    whole = math.floor(math.log10(value))
    digits = 1 - whole if whole < 0 else max(2 - whole, 0)
    return f"{value:.{digits}f}"


def draw(panels: Mapping[str, Sequence[Bar]]) -> str:
    """Draw panels, each with a title and a scale of its own, one below the other."""
    parts: list[str] = []
    height = 8
    for title, bars in panels.items():
        parts += _panel(title, bars, height)
        height += TITLE + LINE * len(bars) + SCALE
    size = f'width="{NAMES + PLOT + FIGURES}" height="{height}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        "<!-- SPDX-License-Identifier: LGPL-2.1-or-later -->",
        "<title>How fast, compared with something else in the same run</title>",
        f"<desc>{escape(_words(panels))}</desc>",
        f"<style>{STYLE}</style>",
        f'<rect {size} fill="#fff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _words(panels: Mapping[str, Sequence[Bar]]) -> str:
    return " ".join(
        f"{title}: {', '.join(f'{bar.name} {number(bar.median)}' for bar in bars)}."
        for title, bars in panels.items()
    )


def _panel(title: str, bars: Sequence[Bar], top: int) -> list[str]:
    lowest = min(1.0, *(bar.low for bar in bars))
    highest = max(1.0, *(bar.high for bar in bars))
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest) + 0.01)

    def x(value: float) -> str:
        return f"{NAMES + PLOT * (math.log10(value) - first) / (last - first):.1f}"

    start, end = top + TITLE, top + TITLE + LINE * len(bars)
    parts = [_text("title", "8", top + 16, title)]
    for power in range(first, last + 1):
        place = x(10.0**power)
        parts.append(_line("grid" if power else "even", (place, start - 6), (place, end)))
        parts.append(_text("scale", place, end + 14, f"{10.0**power:g}"))
    for row, bar in enumerate(bars):
        middle = start + LINE * row + LINE // 2
        parts += [
            _text("name", str(NAMES - 10), middle + 4, bar.name),
            _line("spread", (x(bar.low), middle), (x(bar.high), middle)),
            f'<circle class="median" cx="{x(bar.median)}" cy="{middle}" r="3.5"/>',
            _text("figure", str(NAMES + PLOT + 10), middle + 4, number(bar.median)),
        ]
    return parts


def _text(kind: str, x: str, y: int, text: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>'


def _line(kind: str, start: tuple[str, int], end: tuple[str, int]) -> str:
    ends = f'x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"'
    return f'<line class="{kind}" {ends}/>'
