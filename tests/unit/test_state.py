# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views as values: captured, written, read, compared and restored."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from errno import EINVAL
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import xenaltp2m as xa
from xenaltp2m import cli
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.testing import Failing
from xenaltp2m.tools.state.capture import (
    _places_of_memory,
    capture,
    compare,
    differences,
    obstacles,
    restore,
)
from xenaltp2m.values import state as viewstate
from xenaltp2m.values.intervals import Intervals
from xenaltp2m.values.state import FORMAT, MonitorState, PageState, State, ViewState, diff

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "state.schema.json").read_text())
GFNS = 256
EMPTY: Intervals[Any] = Intervals()
ACCESSES = [xa.Access.N, xa.Access.R, xa.Access.X, xa.Access.RX, xa.Access.RW, xa.Access.RWX,
            xa.Access.N2RWX, xa.Access.RX2RW]  # fmt: skip


class Host:
    """A mock with a domain, and its altp2m open."""

    def __init__(
        self,
        stack: ExitStack,
        xen: tuple[int, int] = (4, 17),
        pages: int = 1024,
        mock: MockBackend | None = None,
    ) -> None:
        self.mock = mock or MockBackend(xen, memory_pages=max(1 << 13, 2 * pages))
        self.domid = self.mock.add_domain(
            "guest", vcpus=2, memory_kib=4 * pages, superpages=False,
            pool_pages=max(1 << 10, pages >> 6),
        )  # fmt: skip
        self.xen = stack.enter_context(xa.connect(self.mock))
        self.dom = stack.enter_context(self.xen.domain(self.domid))
        self.altp2m = stack.enter_context(self.dom.altp2m())


def populate(host: Host, chance: random.Random) -> None:
    """Ask for anything."""
    added = list(host.dom.add_pages(chance.randrange(1, 4))) if chance.random() < 0.8 else []
    for gfn in added:
        host.dom.memory.write_page(gfn, chance.randbytes(4096))
    views = [
        host.altp2m.create_view(label=chance.choice(["", "hooks", "víews"]) or None)
        for _ in range(chance.randrange(4))
    ]
    for view in views:
        for _ in range(chance.randrange(12)):
            first = chance.randrange(GFNS)
            kind = chance.random()
            if kind < 0.5:
                gfns = range(first, first + chance.randrange(1, 20))
                view.set_access(gfns, chance.choice(ACCESSES))
            elif kind < 0.7:
                view.set_access(chance.choice([first, *added]), chance.choice(ACCESSES))
            elif kind < 0.9:
                new = chance.choice([*added, chance.randrange(GFNS)])
                if new != first:
                    remap(view, first, new, chance.choice(ACCESSES[:6]))
            else:
                view.set_suppress_ve(range(first, first + chance.randrange(1, 9)), bool(first % 2))
        if chance.random() < 0.3:
            view.set_visibility(False)
    if views and views[-1].visible and chance.random() < 0.5:
        host.altp2m.switch_to_view(views[-1])
    if chance.random() < 0.3:
        host.altp2m.enable_notify(1, 7)


def remap(view: xa.View, gfn: int, new: int, access: xa.Access) -> None:
    """Remap, unless gfns would show each other's pages."""
    view.remap(gfn, new, access=access)
    try:
        view.remaps_in_order()
    except xa.BusyError:
        view.revert(gfn)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([(4, 14), (4, 17), (4, 20), (4, 22)]))
def test_captured_restored_and_captured_it_is_the_same(seed: int, xen: tuple[int, int]) -> None:
    """In the same domain, in another one, on another release."""
    with ExitStack() as stack:
        host = Host(stack)
        populate(host, random.Random(seed))
        state = capture(host.altp2m, contents=True, verify=True)
        data = state.to_bytes(origin=False)
        assert State.from_bytes(data) == state
        assert State.from_bytes(data).to_bytes(origin=False) == data
        jsonschema.validate(json.loads(plain(state)), SCHEMA)
        other = Host(stack, xen)
        assert obstacles(other.dom, state) == []
        restore(other.altp2m, State.from_bytes(data))
        again = xa.capture(other.altp2m, contents=True, verify=True)
        assert diff(state, again) == []
        assert again.to_bytes(origin=False) == data
        for view in host.altp2m.views:
            view.close()
        host.altp2m.switch_to_view(None)
        for vcpu in list(host.altp2m.notified):
            host.altp2m.disable_notify(vcpu)
        for gfns in list(host.dom.context.added):
            host.dom.remove_pages(gfns)
        assert xa.capture(host.altp2m) == State((), vcpus=(None, None))
        restore(host.altp2m, state)
        assert xa.capture(host.altp2m, contents=True, verify=True).to_bytes(origin=False) == data


def small() -> State:
    """One with several views, and several added pages."""
    with ExitStack() as stack:
        host = Host(stack)
        populate(host, random.Random(3))
        state = capture(host.altp2m, contents=True)
    assert len(state.views) > 1
    assert len(state.pages) > 1
    return state


def test_differences_in_words() -> None:
    with ExitStack() as stack:
        host = Host(stack)
        view = host.altp2m.create_view(label="hooks")
        [shadow] = host.dom.add_pages()
        view.set_access(range(5, 9), xa.Access.R)
        before = xa.capture(host.altp2m)
        view.set_access(7, xa.Access.RX)
        view.remap(3, shadow, access=xa.Access.X)
        host.dom.memory.write(shadow << 12, b"x")
        host.altp2m.switch_to_view(view)
        other = host.altp2m.create_view()
        after = xa.capture(host.altp2m)
        assert diff(before, before) == []
        assert diff(before, after) == [
            "view 0: access --x of gfn 0x3 is new",
            "view 0: access r-- of gfns 0x5..0x8 is gone",
            "view 0: access r-- of gfns 0x5..0x6 is new",
            "view 0: access r-x of gfn 0x7 is new",
            "view 0: access r-- of gfn 0x8 is new",
            "view 0: gfn 0x3 shows added page 0, before itself",
            "view 1 ('') is new",
            "the content of added page 0 differs",
            "vCPU 0 was in none of these views, now view 0",
            "vCPU 1 was in none of these views, now view 0",
        ]
        other.close()


def test_what_is_in_the_way() -> None:
    state = small()
    with ExitStack() as stack:
        host = Host(stack, (4, 14))
        bare = replace(state, pages=tuple(replace(page, content=None) for page in state.pages))
        assert obstacles(host.dom, bare) == [
            f"the content of {len(state.pages)} added pages was not captured"
        ]
        [first, *rest] = state.views
        access = Intervals.of([(5, 1, xa.Access.R_PW), (1 << 30, 1, xa.Access.R)])
        odd = replace(first, access=access)
        found = obstacles(host.dom, replace(state, views=(odd, *rest), vcpus=(0, 1)))
        assert found == [
            "Xen 4.14 does not know the access r_pw",
            f"it has access for gfn 0x40000000, but the domain ends at {host.dom.maximum_gfn:#x}",
            "its vCPUs are in several views, but Xen moves all of them or none",
        ]
        bits = Intervals.of([(0, 1 << 36, True)])
        endless = replace(first, suppress_ve=bits)
        [past] = obstacles(host.dom, replace(state, views=(endless,), vcpus=()))
        assert past.startswith("it has a suppress-#VE bit for gfn 0xfffffffff, but the domain")
        with pytest.raises(xa.UnsupportedError, match="does not know the access r_pw"):
            restore(host.altp2m, replace(state, views=(odd, *rest)))
        assert host.altp2m.views == ()


def test_more_views_than_the_domain_may_have_are_in_the_way() -> None:
    one = replace(small().views[0], remaps=(), access=Intervals.of([]))
    for xen, others, most in (((4, 17), 0, 9), ((4, 20), 2, 7), ((4, 22), 0, 9)):
        with ExitStack() as stack:
            host = Host(stack, xen)
            for _ in range(others):
                host.mock.altp2m_create_view(host.domid, 7)
            assert obstacles(host.dom, State((one,) * most)) == []
            state = State((one,) * (most + 1))
            [found] = obstacles(host.dom, state)
            assert found == f"it has {most + 1} views, but the domain can have {most} more"
            with pytest.raises(xa.UnsupportedError, match="can have"):
                restore(host.altp2m, state)


def test_remaps_of_what_is_no_ram_there_are_in_the_way() -> None:
    with ExitStack() as stack:
        large, small_one = Host(stack, pages=4096), Host(stack)
        view = large.altp2m.create_view()
        view.remap(0x20, 0x21)
        assert obstacles(small_one.dom, xa.capture(large.altp2m)) == []
        view.remap(0x900, 0x22)
        view.remap(0x23, 0x901)
        [found] = obstacles(small_one.dom, xa.capture(large.altp2m))
        assert found.startswith("2 gfns that are remapped, or remapped to, are not ordinary RAM")
        assert found.endswith(" 0x900")
        last = large.dom.maximum_gfn
        beyond = replace(xa.capture(large.altp2m).views[0], remaps=((0x20, int(last) + 1),))
        [found] = obstacles(small_one.dom, State((beyond,)))
        assert found.startswith("1 gfns")


@pytest.mark.parametrize(
    ("xen", "access", "word"),
    [
        ((4, 17), xa.Access.RX, "not the view's default r-x"),
        ((4, 20), xa.Access.N, "takes them for holes"),
        ((4, 20), xa.Access.RX, None),
        ((4, 17), xa.Access.RWX, None),
    ],
)
def test_what_has_another_effect_there_is_told_and_not_in_the_way(
    xen: tuple[int, int], access: xa.Access, word: str | None
) -> None:
    view = replace(small().views[0], default_access=access, remaps=(), access=Intervals.of([]))
    with ExitStack() as stack:
        host = Host(stack, xen)
        assert obstacles(host.dom, State((view,))) == []
        found = differences(host.dom, State((view,)))
        assert len(found) == (word is not None)
        assert all(line.startswith("view 0: ") and str(word) in line for line in found)


def test_all_of_it_or_nothing() -> None:
    """Whichever call fails."""
    state = small()
    number, calls = 0, 1 << 30
    while number <= calls:
        with ExitStack() as stack:
            mock = Failing(memory_pages=1 << 13)
            host = Host(stack, mock=mock)
            before = host.dom.info()
            mock.start({number: EINVAL})
            try:
                restore(host.altp2m, state)
            except xa.XenError as error:
                mock.start({})
                if "unpausing" in error.message:  # all of it is there, and stands still
                    assert xa.capture(host.altp2m, contents=True) == state
                    host.altp2m.close()
                assert host.altp2m.views == ()
                host.dom.close()  # what could not be undone then, is now
                assert mock.domain_getinfolist(host.domid, 1) == [before]
            else:
                calls = calls if number else mock.made
                mock.start({})
                assert xa.capture(host.altp2m, contents=True) == state
        number += 1
    assert calls > 20


def test_a_quarter_million_gfns() -> None:
    """Each with an access of its own: within a second and 50 MB."""
    count = 1 << 18
    with ExitStack() as stack:
        host = Host(stack, pages=count)
        view = host.altp2m.create_view()
        view.set_access(range(0, count, 2), xa.Access.R)
        view.set_access(range(1, count, 2), xa.Access.RX)
        assert view.differences()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.process_time()
        state = xa.capture(host.altp2m)
        data = state.to_bytes()
        captured = time.process_time() - begun
        [was] = state.views
        inner = was.access[1:-1]
        access = Intervals.of([(0, 1, xa.Access.X), *inner, (count - 1, 1, xa.Access.X)])
        other = replace(state, views=(replace(was, access=access),))
        begun = time.process_time()
        assert len(diff(state, other)) == 4
        compared = time.process_time() - begun
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        print(
            f"captured and written in {captured:.2f} s, compared in {compared:.2f} s, "
            f"{len(data)} bytes, {grown >> 10} MiB"
        )
        assert grown >> 10 < 50
        assert State.from_bytes(data) == state


WRONG: list[tuple[str, Any]] = [
    ("format", "other"), ("version", 2), ("version", None), ("views", {}), ("views", [7]),
    ("views", [{}]), ("pages", [{"sha256": "x"}]), ("vcpus", [9]), ("vcpus", [True]),
    ("notify", [[0]]), ("notify", [[0, -9]]), ("notify", [[1, 2], [0, 2]]), ("origin", 5),
    ("pages", [{"sha256": "0" * 64, "content": "AAAA"}]),
]  # fmt: skip
WRONG_VIEWS: list[tuple[str, Any]] = [
    ("label", 5), ("visible", 1), ("default", "q"), ("default", "default"), ("access", []),
    ("access", {"r--": [0]}), ("access", {"r--": [0, 0]}), ("access", {"r--": [0, 5, 4, 1]}),
    ("access", {"default": [0, 1]}), ("access", {"r--": [-9, 1]}),
    ("access", {"r--": [0, 1 << 40]}),
    ("access", {"r--": [0.5, 1]}), ("access", {"r--": [True, 1]}), ("suppress_ve", {"yes": [0, 1]}),
    ("remaps", [1, 2, 3, 1]), ("remaps", [1, 1]), ("remaps", [1, 2, 1, 3]), ("remaps", [1]),
    ("access", {"r--": [-1, 2]}),
    ("remaps", [1, -9]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_files_that_cannot_be(name: str, value: Any) -> None:
    document = json.loads(plain(small()))
    with pytest.raises(xa.StateError) as error:
        State.from_bytes(signed(document | {name: value}))
    assert "checksum mismatch" not in error.value.message


def test_the_schema_tells_shapes_apart() -> None:
    document = json.loads(plain(small()))
    wrong = [("views", {}), ("version", 2), ("notify", [[0]]), ("vcpus", ["a"]), ("pages", [{}])]
    for name, value in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document | {name: value}, SCHEMA)


@pytest.mark.parametrize(("name", "value"), WRONG_VIEWS)
def test_views_that_cannot_be(name: str, value: Any) -> None:
    document = json.loads(plain(small()))
    document["views"][0][name] = value
    with pytest.raises(xa.StateError) as error:
        State.from_bytes(signed(document))
    assert "checksum mismatch" not in error.value.message


def signed(document: dict[str, Any]) -> bytes:
    """With its checksum set right."""
    rest = {name: value for name, value in document.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    return b'{"checksum":"%s",' % hashlib.sha256(text).hexdigest().encode() + text[1:]


def test_a_ve_page_that_was_added_is_told_by_its_place() -> None:
    with ExitStack() as stack:
        one, other = Host(stack), Host(stack)
        one.altp2m.enable_notify(1, one.dom.add_pages(2)[1])
        state = State.from_bytes(xa.capture(one.altp2m, contents=True).to_bytes())
        assert state.notify == ((1, -2),)
        other.dom.add_pages(5)
        restore(other.altp2m, state)
        [_, added] = other.dom.context.added
        assert other.altp2m.notified == {1: added[1]}


def test_a_state_that_could_not_be_read_again_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = small()
    data = state.to_bytes()
    monkeypatch.setattr(viewstate, "MAX_FILE", len(data))
    assert State.from_bytes(state.to_bytes()) == state
    monkeypatch.setattr(viewstate, "MAX_FILE", len(data) - 1)
    with pytest.raises(xa.StateError, match="the limit is"):
        state.to_bytes()


@pytest.mark.parametrize(
    "origin", [{"added": ["x"]}, {"added": [-1]}, {"added": [1 << 40]}, {"views": [True]}]
)
def test_an_origin_that_cannot_be_is_not_compared(origin: dict[str, Any]) -> None:
    with ExitStack() as stack:
        host = Host(stack)
        view = host.altp2m.create_view()
        view.set_access(host.dom.add_pages()[0], xa.Access.R)
        state = xa.capture(host.altp2m)
        assert compare(host.dom, state) == []
        with pytest.raises(xa.StateError, match="not captured from domain"):
            compare(host.dom, replace(state, origin={**state.origin, **origin}))


def test_more_gfns_than_the_domain_has_are_not_looked_at() -> None:
    with ExitStack() as stack:
        host = Host(stack)
        host.altp2m.create_view()
        state = xa.capture(host.altp2m)
        access = Intervals.of([(0, 1 << 36, xa.Access.R)])
        endless = replace(state, views=(replace(state.views[0], access=access),))
        [found] = compare(host.dom, State.from_bytes(endless.to_bytes()))
        assert found.startswith("it has access for gfn 0xfffffffff, but the domain ends at")


def test_an_altered_file_is_refused() -> None:
    data = plain(small())
    for old, new in ((b'"visible":true', b'"visible":false'), (b"r-x", b"rwx")):
        assert old in data
        with pytest.raises(xa.StateError, match="checksum mismatch"):
            State.from_bytes(data.replace(old, new, 1))


def plain(state: State) -> bytes:
    data = state.to_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
MORE = st.dictionaries(st.text(max_size=4).map("x{}".format), JSON, max_size=2)
PLACES = st.one_of(st.integers(-2, 200), st.sampled_from([-3, (1 << 36) - 1, 1 << 36]))
LABELS = st.one_of(
    st.text(max_size=8),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\ud83d\ude00", "x" * 1024, "x" * 1025, "\U0001f600" * 1024]),
)
MANY_RUNS = st.lists(st.tuples(PLACES, st.sampled_from([*[1] * 9, 0, 2]), st.none()), max_size=4)


def runs_of(values: list[Any]) -> st.SearchStrategy[Intervals[Any]]:
    def made(runs: list[tuple[int, int, None]], chosen: list[Any]) -> Intervals[Any]:
        ascending = sorted(runs, key=lambda run: run[0])
        return Intervals.of(
            (first, count, value)
            for (first, count, _), value in zip(ascending, chosen, strict=False)
        )

    return st.builds(made, MANY_RUNS, st.lists(st.sampled_from(values), min_size=4, max_size=4))


VIEWS = st.builds(
    ViewState,
    LABELS,
    st.sampled_from(list(xa.Access.__members__.values())),
    st.booleans(),
    runs_of(ACCESSES),
    runs_of([True, False]),
    st.lists(st.tuples(PLACES, PLACES), max_size=2).map(tuple),
    MORE,
)
PAGES = st.builds(
    lambda content, kept, more: PageState(
        hashlib.sha256(content).hexdigest(), content if kept else None, more
    ),
    st.binary(max_size=3).map(lambda head: head.ljust(4096)),
    st.booleans(),
    MORE,
)
MONITORS = st.builds(
    MonitorState,
    st.lists(
        st.sampled_from(
            [xa.MemAccess.on(), xa.Cpuid.on(), xa.WriteCtrlreg.on(xa.ControlRegister.CR3),
             xa.MovToMsr.on(0xC0000080)]
        ),
        max_size=3,
    ).map(tuple),
    st.booleans(),
    MORE,
)  # fmt: skip
STATES = st.builds(
    State,
    st.lists(VIEWS, max_size=3).map(tuple),
    st.lists(PAGES, max_size=4).map(tuple),
    st.lists(st.sampled_from([None, None, None, 0, 1]), max_size=3).map(tuple),
    st.lists(st.tuples(st.integers(0, 3), PLACES), max_size=1).map(tuple),
    st.one_of(st.none(), MONITORS),
    MORE,
    MORE,
)


@settings(max_examples=200, deadline=None)
@given(STATES)
def test_fault_17_what_is_written_is_read(state: State) -> None:
    """Every field: what could not be read again is refused when it is written."""
    try:
        data = state.to_bytes()
    except xa.StateError:
        event("refused")
        return
    event("written")
    found = State.from_bytes(data)
    assert found == state
    assert found.origin == state.origin
    assert found.more == state.more
    assert [one.more for one in found.views] == [one.more for one in state.views]
    assert [one.more for one in found.pages] == [one.more for one in state.pages]
    assert found.to_bytes() == data


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"views": (ViewState("x" * 1025, xa.Access.R, True, EMPTY, EMPTY, ()),)}, "the label 'xx"),
        ({"views": (ViewState("\ud800", xa.Access.R, True, EMPTY, EMPTY, ()),)}, "the label"),
        ({"vcpus": (1,)}, "a vCPU in view 1"),
        ({"origin": {"name": b"guest"}}, "JSON does not support"),
        ({"more": {"x": {1, 2}}}, "JSON does not support"),
    ],
)
def test_fault_17_what_could_not_be_read_is_not_written(change: dict[str, Any], why: str) -> None:
    with pytest.raises(xa.StateError, match=why):
        State(**{"views": ()} | change).to_bytes()


MOST_VALUES = 10_400_000
"""Somewhat less than is refused."""
HOSTILE: dict[str, Callable[[], bytes]] = {
    "objects": lambda: b"[{}" + b",{}" * (MOST_VALUES // 2) + b"]",
    "keys": lambda: b"{%s}" % b",".join(b'"%x":0.5' % number for number in range(1_040_000)),
    "wide": lambda: b'"' + b"a" * ((1 << 27) - 1000) + b'\\ud83d\\ude00"',
    "too many lists": lambda: b"[[]" + b",[]" * 40_000_000 + b"]",
}
PEAK = r"""
import re, resource, sys, xenaltp2m as xa
from xenaltp2m.values.state import State
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
data = sys.stdin.buffer.read()
def peak():  # ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
before = peak()
try:
    State.from_bytes(data)
except (xa.StateError, MemoryError):
    pass
print(peak() - before)
"""


@pytest.mark.parametrize("kind", [*HOSTILE, "packed zeros"])
def test_fault_17_a_hostile_file_takes_no_more_memory_than_four_legal_states(kind: str) -> None:
    """The largest legal one: 2^22 runs, each a first (32 bytes), a count (28), three pointers."""
    if kind == "packed zeros":
        data = gzip.compress(bytes(1 << 28), 1)
    else:
        fields = b'"format":"xenaltp2m views","monitor":null,"notify":[],"pages":[],"vcpus":[]'
        text = b'{%s,"version":1,"views":[],"zz":%s}' % (fields, HOSTILE[kind]())
        checksum = hashlib.sha256(text).hexdigest().encode()
        data = gzip.compress(b'{"checksum":"%s",%s\n' % (checksum, text[1:]), 1)
    done = subprocess.run([sys.executable, "-c", PEAK], input=data, capture_output=True, check=True)
    peak = int(done.stdout) << 10
    print(f"{len(data) >> 10} KiB: {peak >> 20} MiB")
    assert peak < 4 * (1 << 22) * (32 + 28 + 3 * 8)


def test_fault_17_runs_are_limited_in_all_views_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(counts: tuple[int, int]) -> State:
        return State(
            tuple(
                ViewState(
                    "",
                    xa.Access.RWX,
                    True,
                    EMPTY,
                    EMPTY,
                    tuple(zip(range(n), range(9, 9 + n), strict=True)),
                )
                for n in counts
            )
        )

    monkeypatch.setattr(viewstate, "_MAX_RUNS", 5)
    data = state((2, 3)).to_bytes()
    assert State.from_bytes(data) == state((2, 3))
    with pytest.raises(xa.StateError, match="more than 5 runs and remaps"):
        state((3, 3)).to_bytes()
    monkeypatch.setattr(viewstate, "_MAX_RUNS", 4)
    with pytest.raises(xa.StateError, match="more than 4 runs and remaps"):
        State.from_bytes(data)


def test_other_files() -> None:
    for data in (b"", b"{", b"[]", b"\x1f\x8b", b"[" * 100000, gzip.compress(b"x" * (1 << 29), 1)):
        with pytest.raises(xa.StateError):
            State.from_bytes(data)
    with pytest.raises(xa.StateError, match="the limit is"):
        State.from_bytes(bytes((1 << 26) + 1))


def test_fields_of_a_later_version_are_kept() -> None:
    document = json.loads(plain(small())) | {"hints": {"a": 1}}
    assert document["format"] == FORMAT
    state = State.from_bytes(signed(document))
    assert json.loads(plain(state))["hints"] == {"a": 1}
    assert state == small()


def test_fields_of_a_later_version_are_kept_wherever_they_are() -> None:
    with ExitStack() as stack:
        host = Host(stack)
        host.altp2m.create_view().remap(3, host.dom.add_pages()[0])
        stack.enter_context(host.dom.monitor(xa.MemAccess))
        captured = xa.capture(host.altp2m)
    document = json.loads(plain(captured))
    for part in (document["views"][0], document["pages"][0], document["monitor"]):
        part["hints"] = {"a": 1}
    state = State.from_bytes(signed(document))
    assert state == captured
    assert plain(state) == plain(State.from_bytes(plain(state)))
    assert json.loads(plain(state)) == document | {"checksum": json.loads(plain(state))["checksum"]}
    document["monitor"]["subscriptions"][0]["hints"] = 1
    with pytest.raises(xa.StateError, match="a subscription to"):
        State.from_bytes(signed(document))


def test_views_that_xen_has_reset_are_not_captured() -> None:
    with ExitStack() as stack:
        host = Host(stack)
        view = host.altp2m.create_view()
        view.set_access(5, xa.Access.R)
        host.mock.altp2m_set_mem_access(host.domid, int(view.id), 5, 7)
        with pytest.raises(xa.StateError, match="other access at 1 gfns, the first 0x5"):
            xa.capture(host.altp2m, verify=True)


# The command line.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.write_bytes(small().to_bytes())
    return path


def test_show(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["state", "show", str(saved), "--json"]) == cli.DONE
    document = json.loads(capsys.readouterr().out)
    state = small()
    assert document["pages"] == len(state.pages)
    assert [view["remaps"] for view in document["views"]] == [
        len(view.remaps) for view in state.views
    ]
    assert cli.main(["state", "show", str(saved)]) == cli.DONE
    assert f"{len(state.pages)} added pages (domain" in capsys.readouterr().out


def test_diff_of_files(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    state = small()
    other.write_bytes(replace(state, views=state.views[:-1], vcpus=()).to_bytes())
    assert cli.main(["state", "diff", str(saved), str(saved)]) == cli.DONE
    assert "the same" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        cli.main(["state", "diff", str(saved), str(other)])
    assert "is gone" in capsys.readouterr().out


def test_fault_18_diff_has_facts_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [(5, 4, xa.Access.R), (-1, 1, xa.Access.X)]
    view = ViewState("a", xa.Access.RWX, True, Intervals.of(sorted(runs)), EMPTY, ((3, -1),))
    other = ViewState("b", xa.Access.RX, True, EMPTY, Intervals.of([(7, 2, False)]), ((3, 4),))
    monitor = MonitorState((xa.Cpuid.on(),), access_required=True)
    before = State((view, view), (PageState("0" * 64),), (0, None), ((0, 9),))
    after = State((other,), (PageState("1" * 64),), (None, None, 0), (), monitor)
    (tmp_path / "a").write_bytes(before.to_bytes())
    (tmp_path / "b").write_bytes(after.to_bytes())
    with pytest.raises(SystemExit, match="1"):
        cli.main(["state", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    found = json.loads(capsys.readouterr().out)["differences"]
    assert [one.pop("words") for one in found] == diff(before, after)
    cpuid = {"event": "Cpuid", "options": {}, "deniable": False}
    assert found == [
        {"what": "label", "view": 0, "before": "a", "after": "b"},
        {"what": "default_access", "view": 0, "before": "rwx", "after": "r-x"},
        {"what": "access", "view": 0, "gfn": -1, "count": 1, "before": "--x", "after": None},
        {"what": "access", "view": 0, "gfn": 5, "count": 4, "before": "r--", "after": None},
        {"what": "suppress_ve", "view": 0, "gfn": 7, "count": 2, "before": None, "after": False},
        {"what": "remap", "view": 0, "gfn": 3, "before": -1, "after": 4},
        {"what": "view", "view": 1, "before": "a", "after": None},
        {"what": "content", "page": 0, "before": "0" * 64, "after": "1" * 64},
        {"what": "vcpu", "vcpu": 0, "before": 0, "after": None},
        {"what": "vcpus", "before": 2, "after": 3},
        {"what": "notify", "before": [[0, 9]], "after": []},
        {
            "what": "monitor",
            "before": None,
            "after": {"access_required": True, "subscriptions": [cpuid]},
        },
    ]


def test_restore_for_a_while(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--connect", "mock", "state", "restore", str(saved), "guest"]
    with monkeypatch.context() as patch:
        patch.setattr(MockBackend, "altp2m_set_domain_state", None)
        assert cli.main([*command, "--dry-run"]) == cli.DONE
    assert "no obstacles" in capsys.readouterr().out
    assert cli.main([*command, "--duration", "0", "--json"]) == cli.DONE
    out, err = capsys.readouterr()
    views = list(range(1, len(small().views) + 1))
    assert json.loads(out) == {"obstacles": [], "differences": [], "views": views}
    assert "Undone: views destroyed, altp2m off." in err


def test_a_dry_run_tells_what_has_another_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view = replace(small().views[0], default_access=xa.Access.RX, remaps=())
    (tmp_path / "odd").write_bytes(State((view,)).to_bytes())
    command = ["--connect", "mock", "state", "restore", str(tmp_path / "odd"), "guest", "--dry-run"]
    assert cli.main(command) == cli.DONE
    out = capsys.readouterr().out
    assert out.index("no obstacles") < out.index("different effect in this domain")
    assert "not the view's default r-x" in out
    assert cli.main([*command, "--json"]) == cli.DONE
    [told] = json.loads(capsys.readouterr().out)["differences"]
    assert told in out


def test_a_dry_run_ends_as_restoring_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view = replace(small().views[0], remaps=())
    (tmp_path / "many").write_bytes(State((view,) * 14).to_bytes())
    for options in (["--dry-run"], ["--dry-run", "--json"], []):
        command = ["state", "restore", str(tmp_path / "many"), "guest", *options]
        assert cli.main(["--connect", "mock", *command]) == cli.REFUSED
        out, err = capsys.readouterr()
        assert "it has 14 views, but the domain can have 9 more" in out
        assert "cannot be restored here" in err


def test_what_xen_has_passed_over_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Access of gfns that the domain does not have: Xen says it was set."""
    access = Intervals.of([(0x20, 2, xa.Access.R), (0x8000, 3, xa.Access.R)])
    view = replace(small().views[0], access=access, remaps=(), default_access=xa.Access.RWX)
    (tmp_path / "large").write_bytes(State((view,)).to_bytes())
    command = ["--connect", "mock", "state", "restore", str(tmp_path / "large"), "guest"]
    assert cli.main([*command, "--duration", "0"]) == cli.DONE
    told = capsys.readouterr().err
    assert "skipped some of it: view 1: gfn 0x8000 has no entry, not r--, and 2 more" in told


def test_a_dry_run_refuses_what_restoring_would(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mock = MockBackend()
    mock.add_domain("guest", mode=xa.Altp2mMode.MIXED)
    monkeypatch.setattr("xenaltp2m.cli.state.connect", lambda *_: xa.connect(mock))
    assert cli.main(["state", "restore", str(saved), "guest", "--dry-run"]) == cli.REFUSED
    assert "--accept mixed" in capsys.readouterr().err


def test_what_cannot_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"nothing", b"{}"):
        (tmp_path / "bad").write_bytes(content)
        assert cli.main(["state", "show", str(tmp_path / "bad")]) == cli.USAGE
        assert f"{tmp_path / 'bad'}: " in capsys.readouterr().err
    assert cli.main(["state", "show", str(tmp_path / "none")]) == cli.USAGE
    assert "No such file" in capsys.readouterr().err
    for wrong in (["show", "a", "b"], ["diff", "a"], ["restore", "a"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["state", *wrong])
    bare = small()
    count = len(bare.pages)
    bare = replace(bare, pages=tuple(replace(page, content=None) for page in bare.pages))
    (tmp_path / "bare").write_bytes(bare.to_bytes())
    command = ["--connect", "mock", "state", "restore", str(tmp_path / "bare"), "guest"]
    assert cli.main(command) == cli.REFUSED
    out, err = capsys.readouterr()
    assert f"the content of {count} added pages was not captured" in out
    assert "cannot be restored here" in err


@pytest.mark.parametrize(
    ("pages", "last", "places"),
    [
        (100, 99, [range(100)]),
        (4096, 0xFF010, [range(4096), range(0xFE011, 0xFF011)]),
        (1 << 19, 0xFF010, [range(1 << 19), range(0xFE011, 0xFF011)]),
        (0x140000, 0x150000, [range(0x150001)]),
        (0x101000, 0x300000, [range(0x201000), range(0x2FF001, 0x300001)]),
    ],
)
def test_where_memory_may_be(pages: int, last: int, places: list[range]) -> None:
    assert _places_of_memory(pages, last) == places
