# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pictures of states: each thing in its place, in a browser and in a terminal."""

from __future__ import annotations

import io
import random
import re
import sys
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenaltp2m import cli
from xenaltp2m.tools.state.layout import COLOURS
from xenaltp2m.tools.state.svg import html, svg
from xenaltp2m.tools.state.terminal import LETTERS, strips
from xenaltp2m.types import Access
from xenaltp2m.values.intervals import Intervals
from xenaltp2m.values.state import PageState, State, ViewState

ACCESSES = [access for access in Access.__members__.values() if access is not Access.DEFAULT]
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</text><script>alert(1)</script>\x00\x1b[31m\ud800\u202e]]>&amp;\"'"


def view(
    *access: tuple[int, int, Access],
    bits: tuple[tuple[int, int, bool], ...] = (),
    remaps: tuple[tuple[int, int], ...] = (),
    label: str = "hooks",
    visible: bool = True,
) -> ViewState:
    return ViewState(label, Access.RWX, visible, Intervals.of(access), Intervals.of(bits), remaps)


def pages(count: int) -> tuple[PageState, ...]:
    return tuple(PageState(f"{number:064x}") for number in range(count))


def hooked(count: int, gfns: int) -> State:
    """Hooks here and there, each with its shadow page."""
    chosen = sorted(random.Random(7).sample(range(gfns // 20), count))
    places = [20 * number + 10 for number in chosen]
    return State(
        (
            view(
                *((-number, 1, Access.X) for number in range(count, 0, -1)),
                *((gfn, 1, Access.X) for gfn in places),
                remaps=tuple((gfn, -1 - number) for number, gfn in enumerate(places)),
            ),
        ),
        pages(count),
        (0,),
    )


# What is in a picture, found by its tooltips.


class Box(NamedTuple):
    """A rectangle, and the places it stands for: those that were added are below 0."""

    view: str
    first: int
    gfns: int
    words: str
    x: float
    end: float
    y: float
    kind: str


def places(words: str) -> tuple[int, int] | None:
    """Read "gfns 0x1..0x5" or "added page 3"."""
    found = re.search(r"(gfn|added page)s? (\w+)(?:\.\.(\w+))?", words)
    if found is None:
        return None
    kind, first, last = found.groups()
    if kind == "gfn":
        return int(first, 16), int(last or first, 16) - int(first, 16) + 1
    return -1 - int(first), int(last or first) - int(first) + 1


def boxes(root: ET.Element) -> Iterator[Box]:
    for group in root.iter(f"{SVG}g"):
        if group.get("class") != "view":
            continue
        for rect in group.iter(f"{SVG}rect"):
            title = rect.findtext(f"{SVG}title")
            assert title is not None
            name, _, words = title.rpartition(": ")
            name, _, _ = name.partition(":")
            there = places(title)
            if there is None:
                continue
            x, y = float(rect.attrib["x"]), float(rect.attrib["y"])
            kind = rect.attrib["class"]
            yield Box(name, *there, words, x, x + float(rect.attrib["width"]), y, kind)


class Arc(NamedTuple):
    words: str
    start: float
    end: float
    y: float


def arcs(root: ET.Element) -> list[Arc]:
    found = []
    for path in root.iter(f"{SVG}path"):
        title = path.findtext(f"{SVG}title")
        if title is None:
            continue
        numbers = [float(text) for text in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]
        x, y, _, _, _, _, to_x, to_y = numbers
        assert y == to_y
        found.append(Arc(title, x, to_x, y))
    return found


def drawn(state: State) -> ET.Element:
    text = svg(state)
    text.encode()
    return ET.fromstring(text)


def across(place: int) -> tuple[bool, int]:
    """Sort places from left to right."""
    return (False, place) if place >= 0 else (True, -place)


def test_every_run_is_in_its_place() -> None:
    runs = [(-2, 1, Access.X), (-1, 1, Access.R), (0x100, 64, Access.RX), (0x140, 1, Access.N),
            (0x141, 2, Access.RW), (0x143, 1 << 20, Access.R_PW)]  # fmt: skip
    root = drawn(State((view(*runs), view((0x120, 0x25, Access.R), label="other")), pages(2)))
    found = {(box.view, box.first, box.gfns, box.words): box for box in boxes(root)
             if box.kind.startswith("run")}  # fmt: skip
    assert set(found) == {("view 0 hooks", first, count, str(access))
                          for first, count, access in runs} | {
        ("view 1 other", 0x120, 0x25, "r--")
    }  # fmt: skip
    row = sorted((box for box in found.values() if "hooks" in box.view),
                 key=lambda box: across(box.first))  # fmt: skip
    assert len({box.y for box in row}) == 1
    for before, after in pairwise(row):
        assert before.end <= after.x
        if before.first + before.gfns == after.first:
            assert before.end == pytest.approx(after.x)
    [other] = [box for box in found.values() if "other" in box.view]
    assert other.y > row[0].y
    wide, *_, final = [box for box in row if box.first >= 0]
    assert wide.x < other.x < wide.end
    assert final.x < other.end < final.end


def test_remaps_are_arcs_between_their_places() -> None:
    state = hooked(9, 1 << 20)
    root = drawn(state)
    at = {box.first: box for box in boxes(root) if box.kind.startswith("run")}
    found = {arc.words: arc for arc in arcs(root)}
    assert len(found) == 9
    for gfn, new in state.views[0].remaps:
        arc = found[f"view 0 hooks: gfn {gfn:#x} maps added page {-1 - new}"]
        assert at[gfn].x < arc.start < at[gfn].end
        assert at[new].x < arc.end < at[new].end
        assert arc.y == at[gfn].y


def test_the_legend_explains_what_is_there_and_nothing_else() -> None:
    def words(*access: tuple[int, int, Access], hidden: bool = False) -> set[str | None]:
        state = State((view(*access, visible=not hidden),), (), (0,))
        [legend] = (
            group for group in drawn(state).iter(f"{SVG}g") if "legend" in group.get("class", "")
        )
        return {text.text for text in legend.iter(f"{SVG}text")}

    there = words((0x10, 8, Access.R), (0x20, 2, Access.N2RWX))
    assert {"r--", "n2rwx", "as in the host p2m", "vCPUs in the view"} <= there
    assert not {"--x", "hidden from the guest", "remap: from a gfn to its target"} & there
    assert "hidden from the guest" in words((0x10, 8, Access.X), hidden=True)
    remapped = State((view((0x10, 1, Access.X), remaps=((0x10, -1),)),), pages(1), (0,))
    assert "remap: from a gfn to its target" in svg(remapped)


def test_each_of_fifty_hooks_in_4_gib_is_seen() -> None:
    state = hooked(50, 1 << 20)
    root = drawn(state)
    hooks = [box for box in boxes(root) if box.kind.startswith("run") and box.first >= 0]
    assert [box.first for box in hooks] == [gfn for gfn, _ in state.views[0].remaps]
    assert min(box.end - box.x for box in hooks) >= 5
    folded = [box for box in boxes(root) if box.kind == "folded"]
    lengths = [text.text for text in root.iter(f"{SVG}text") if "length" in text.attrib["class"]]
    assert len(folded) == len(lengths) == 50
    assert folded[0].gfns == hooks[0].first
    labels = {text.text for text in root.iter(f"{SVG}text") if "label" in text.attrib["class"]}
    assert {hex(box.first) for box in hooks} <= labels
    assert float(root.attrib["width"]) < 3000


@pytest.mark.parametrize(
    ("gfns", "words"), [(9, "36 KiB"), (1 << 8, "1 MiB"), (1 << 20, "4 GiB"), (1 << 35, "128 TiB")]
)
def test_lengths_of_what_is_folded(gfns: int, words: str) -> None:
    root = drawn(State((view((gfns, 1, Access.R)),)))
    [length] = [text for text in root.iter(f"{SVG}text") if "length" in text.attrib["class"]]
    assert length.text == words


def test_suppress_ve_hidden_views_vcpus_and_ve_pages() -> None:
    bits = ((0x10, 4, True), (0x14, 2, False))
    root = drawn(
        State(
            (view((0x10, 8, Access.R), bits=bits, visible=False), view(label="empty")),
            (),
            (0, 1, None, 1),
            ((3, 0x17),),
        )
    )
    runs = {box.first: box for box in boxes(root) if box.kind.startswith("run")}
    bars = {(box.first, box.gfns, box.words): box for box in boxes(root)
            if box.kind.startswith("ve")}  # fmt: skip
    assert set(bars) == {(0x10, 4, "suppress #VE on"), (0x14, 2, "suppress #VE off")}
    on, off = bars.values()
    assert on.end == pytest.approx(off.x)
    assert runs[0x10].x == on.x < off.x < off.end < runs[0x10].end
    assert on.y > runs[0x10].y
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert "view 0 hooks is hidden: the guest's VMFUNC cannot enter it" in titles
    assert not any("empty is hidden" in str(title) for title in titles)
    for vcpu, name in enumerate(("view 0 hooks", "view 1 empty", "none of these views",
                                 "view 1 empty")):  # fmt: skip
        assert f"vCPU {vcpu} is in {name}" in titles
    [mark] = [shape for shape in root.iter(f"{SVG}polygon") if len(shape)]
    assert mark.findtext(f"{SVG}title") == "vCPU 3 gets the cause of a #VE at gfn 0x17"
    tip = float(mark.attrib["points"].partition(",")[0])
    assert off.end < tip < runs[0x10].end


@pytest.mark.parametrize("draw", [svg, html])
def test_labels_are_text_and_nothing_else(draw: object) -> None:
    assert callable(draw)
    origin = {"name": HOSTILE, "xen": HOSTILE, "domain": [HOSTILE]}
    state = State((view((1, 1, Access.R), label=HOSTILE),), origin=origin)
    text = draw(state)
    text.encode()
    root = ET.fromstring(text.partition("\n")[2] if draw is html else text)
    assert not [tag for tag in root.iter() if str(tag.tag).endswith("script")]
    assert not set(text) & set("\x00\x1b\u202e")
    shown = [str(tag.text) for tag in root.iter() if "alert(1)" in str(tag.text)]
    assert shown
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg\")", text), "it needs no other file"
    assert "\x1b" not in "".join(span.text for line in strips(state, 80) for span in line)


def test_many_runs_are_few_shapes() -> None:
    """Neighbours are drawn as one, and that is said."""
    count = 1 << 18
    runs = Intervals(tuple(range(count)), (1,) * count, (Access.R, Access.RX) * (count // 2))
    remaps = tuple((gfn, gfn + 2 * count) for gfn in range(0, count, 5))
    many = ViewState("many", Access.RWX, True, runs, Intervals(), remaps)
    few = view((3 * count, 1, Access.N), label="few")
    text = svg(State((many, few)))
    assert len(text) < 1 << 20
    root = ET.fromstring(text)
    titles = [str(title.text) for title in root.iter(f"{SVG}title")]
    told = [title for title in titles if "view 0 many" in title and "drawn as one: r" in title]
    for access in ("r--", "r-x"):
        numbers = re.findall(f"{access} (\\d+)", "\n".join(told))
        assert sum(map(int, numbers)) == count // 2
    assert sum("as the host p2m" in title for title in told) <= 1, "where the runs end"
    for title in told[:-1]:
        where = places(title)
        assert where is not None
        assert where[1] == sum(map(int, re.findall(r" r-[-x] (\d+)", title)))
    bundles = [int(arc.words.split()[3]) for arc in arcs(root) if "drawn as one" in arc.words]
    single = [arc for arc in arcs(root) if "drawn as one" not in arc.words]
    assert sum(bundles) + len(single) == len(remaps)
    assert len(bundles) + len(single) <= 64
    colours = {
        rect.get("fill") for rect in root.iter(f"{SVG}rect") if "mixed" in rect.attrib["class"]
    }
    assert not colours & set(COLOURS.values())


def test_many_views_are_bounded() -> None:
    one = view(*((gfn, 1, Access.R) for gfn in range(0, 2000, 2)))
    text = svg(State((one,) * 512, pages(1 << 12)))
    assert text.count("<rect") < 1 << 16
    assert len(text) < 16 << 20


@pytest.mark.parametrize("state", [State(()), State((), vcpus=(None,)), State((view(),))])
def test_where_there_is_nothing(state: State) -> None:
    root = drawn(state)
    assert float(root.attrib["height"]) > 0
    assert list(boxes(root)) == []
    ET.fromstring(html(state).partition("\n")[2])
    strips(state, 80)


@st.composite
def states(draw: st.DrawFn) -> State:
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    added = draw(st.integers(0, 4))

    def runs(values: list[object]) -> Intervals[object]:
        found: list[tuple[int, int, object]] = [
            (-page, 1, chance.choice(values)) for page in range(added, 0, -1)
            if chance.random() < 0.5
        ]  # fmt: skip
        at = 0
        for _ in range(chance.randrange(12)):
            at += chance.choice([0, 1, 3, 40, 1 << 18])
            count = chance.choice([1, 1, 2, 100, 1 << 18])
            found.append((at, count, chance.choice(values)))
            at += count
        return Intervals.of(found)

    def remaps() -> tuple[tuple[int, int], ...]:
        gfns = chance.sample(range(1 << 20), chance.randrange(4))
        return tuple((gfn, chance.choice([gfn + 1, *range(-added, 0)])) for gfn in gfns)

    views = tuple(
        ViewState("", Access.RWX, True, runs([*ACCESSES]), runs([True, False]), remaps())  # type: ignore[arg-type]
        for _ in range(draw(st.integers(1, 3)))
    )
    return State(views, pages(added), notify=((0, 5),) if chance.random() < 0.5 else ())


@settings(max_examples=60, deadline=None)
@given(states())
def test_any_state_is_drawn_from_left_to_right(state: State) -> None:
    root = drawn(state)
    found = list(boxes(root))
    for number, wanted in enumerate(state.views):
        row = [box for box in found if box.view == f"view {number}"]
        here = sorted((box for box in row if box.kind.startswith("run")),
                      key=lambda box: across(box.first))  # fmt: skip
        for before, after in pairwise(here):
            assert before.end <= after.x + 0.01
        for first, count, access in wanted.access:
            [_] = [
                box
                for box in here
                if box.words == str(access)
                and {first, last(first, count)} <= set(inside(box.first, box.gfns))
            ]
        assert sum(box.gfns for box in here) == sum(count for _, count, _ in wanted.access)
    assert len(arcs(root)) == sum(len(view.remaps) for view in state.views)
    right = float(root.attrib["width"])
    assert all(0 <= box.x < box.end <= right for box in found)


def inside(first: int, count: int) -> range:
    """Added pages count downwards."""
    return range(first, first + count) if first >= 0 else range(first, first - count, -1)


def last(first: int, count: int) -> int:
    return inside(first, count)[-1]


# Colours.

# Machado, Oliveira, Fernandes 2009: what protanopes, deuteranopes and tritanopes see.
SEEN = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
                   (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
                     (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
                   (0.004733, 0.691367, 0.303900)),
}  # fmt: skip


def lab(colour: str, matrix: tuple[tuple[float, ...], ...]) -> tuple[float, float, float]:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    r, g, b = (
        min(1.0, max(0.0, sum(a * c for a, c in zip(row, linear, strict=True)))) for row in matrix
    )

    def root(value: float) -> float:
        return value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116

    x, y, z = (
        root((0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047),
        root(0.2126 * r + 0.7152 * g + 0.0722 * b),
        root((0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883),
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_are_told_apart(eyes: str) -> None:
    """2.3 is what one just notices in CIELAB."""
    style = svg(State(()))
    rests = re.findall(r"\.rest \{ fill: (#\w{6})", style)
    assert len(rests) == 2, "in light and in dark"
    for one, other in combinations([*COLOURS.values(), *rests], 2):
        difference = zip(lab(one, SEEN[eyes]), lab(other, SEEN[eyes]), strict=True)
        assert sum((a - b) ** 2 for a, b in difference) ** 0.5 > 15, (one, other)


def test_every_access_has_a_letter_and_a_look_of_its_own() -> None:
    assert set(LETTERS) == set(ACCESSES)
    assert len(set(LETTERS.values())) == len(LETTERS)
    root = drawn(State((view(*((gfn, 1, one) for gfn, one in enumerate(ACCESSES))),)))
    looks: dict[float, list[str]] = {}
    for group in root.iter(f"{SVG}g"):
        for rect in group.findall(f"{SVG}rect"):
            if group.get("class") == "view" and rect.get("fill"):
                looks.setdefault(float(rect.attrib["x"]), []).append(rect.attrib["fill"])
    assert len(looks) == len(ACCESSES) == len({tuple(look) for look in looks.values()})


# In a terminal.


def lines(state: State, width: int = 80) -> list[str]:
    return ["".join(span.text for span in line).rstrip() for line in strips(state, width)]


def test_strips() -> None:
    state = State(
        (
            view(
                (-1, 1, Access.X), (0x10, 2, Access.R), (0x12, 1, Access.X),
                (0x20, 1, Access.RX2RW),
                bits=((0x11, 1, True), (0x12, 1, False)), remaps=((0x12, -1),),
            ),
            view(label="", visible=False),
        ),
        pages(1),
        (0, None),
        ((0, 0x20),),
    )  # fmt: skip
    head, first, access, remaps, bits, second, other, axis, *rest = lines(state, 60)
    assert head == "none of these views: vCPU 1"
    assert first == "view 0 hooks: default rwx, vCPU 0"
    assert re.fullmatch(r"  access (~+)(r+)(x+)(~+)(3+) (x+)", access)
    assert {len(access), len(other)} == {60}
    page = access.rindex(" ") + 1
    assert remaps[page:] == access[page:].replace("x", "^")
    assert remaps[9:page].strip() == access[9:page].strip("~3r ").replace("x", "o")
    assert bits.index("-") == remaps.index("o") == access.index("x")
    assert access[bits.index("+")] == "r"
    assert bits.rindex("+") == bits.index("-") - 1
    assert second == "view 1: default rwx, hidden"
    assert set(other.removeprefix("  access ")) == {"~", ".", " "}
    assert "<64 KiB>" in axis
    assert "<52 KiB>" in axis
    assert axis.index("!") == access.index("3")
    gfns = "\n".join(rest)
    for label in ("0x10", "0x11", "0x12", "0x20", "#0"):
        assert label in gfns
    legend = " ".join(rest)
    for mark in ("r r--", "3 rx2rw", "~ unchanged", "+ suppress", "! a #VE page"):
        assert mark in legend
    assert "n ---" not in legend


@settings(max_examples=60, deadline=None)
@given(states(), st.integers(40, 200))
def test_strips_have_the_width_of_the_terminal(state: State, width: int) -> None:
    drawn = lines(state, width)
    assert max(map(len, drawn)) <= width
    rows = [line for line in drawn if line.startswith("  access")]
    assert len(rows) == len(state.views) or not any(view.access for view in state.views)
    assert {len(row) for row in rows} <= {width}


def test_letters_where_there_is_no_room() -> None:
    [row] = [line for line in lines(hooked(60, 1 << 20), 50) if line.startswith("  access")]
    assert len(row) == 50
    assert "*" in row


# By the command line.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "views.json"
    path.write_bytes(hooked(3, 1 << 12).to_bytes())
    return path


def test_show_draws_into_files(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "out.html", tmp_path / "out.svg"
    show = ["state", "show", str(saved), "--html", str(page), "--svg", str(picture)]
    assert cli.main(show) == cli.DONE
    out, err = capsys.readouterr()
    assert err == f"Drawn: {page}.\nDrawn: {picture}.\n"
    assert "  remaps" in out
    assert "\x1b" not in out
    state = State.from_bytes(saved.read_bytes())
    assert page.read_text() == html(state)
    assert picture.read_text() == svg(state)
    assert cli.main([*show, "--json", "--quiet"]) == cli.DONE
    assert capsys.readouterr().out.startswith("{")


def test_show_on_a_terminal(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    for no_colour in (False, True):
        if no_colour:
            monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "stdout", shown := Terminal())
        assert cli.main(["state", "show", str(saved)]) == cli.DONE
        assert ("48;2;0;114;178m" in shown.getvalue()) is not no_colour
        rows = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()).splitlines()
        assert [len(row) for row in rows if row.startswith("  access")] == [70]


def test_wrong_files(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(tmp_path / "none" / "out.svg")
    assert cli.main(["state", "show", str(saved), "--svg", where]) == cli.USAGE
    assert f"error: {where}: No such file or directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["state", "diff", str(saved), str(saved), "--svg", where])
    assert "--html and --svg are for show" in capsys.readouterr().err
