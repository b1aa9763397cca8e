# SPDX-License-Identifier: LGPL-2.1-or-later
"""Breakpoints: guests that look for them notice nothing, and no call is missed or counted twice.

The same on the simulator and on Xen; the guests are those of examples/guest.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import xenaltp2m as xa
from tests.thorough import THOROUGH
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.breakpoints.hooks import Breakpoint, Hit, WatchpointHit
from xenaltp2m.tools.breakpoints.manager import Breakpoints

from .conftest import LIVE
from .guests import CALLS, LINE, PATIENCE, RunningGuest, hooked, running, serve, write_image

LAB = ["mock-4.14", "mock-4.17", "mock-4.20"]
HOSTS = ["xen"] if LIVE else LAB if THOROUGH else [LAB[0], LAB[-1]]
WAYS = [(True, True), (False, True), (True, False)]
WAY_NAMES = ["fast", "toggle", "page"]
ONE_EACH = [
    pytest.param(host, *way, id=f"{host}-{name}")
    for at, host in enumerate(HOSTS)
    for way, name in zip(WAYS, WAY_NAMES, strict=True)
    if LIVE or THOROUGH or name == WAY_NAMES[at]
]
"""What takes long, and does the same on each release: on the mock each way on one of them."""
CHECKS = ("checksum", "read", "scan", "modify", "calls")


@pytest.fixture(params=HOSTS)
def host_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def checker(host_name: str) -> Iterator[RunningGuest]:
    with running(host_name, "checker") as guest:
        yield guest


@pytest.fixture(params=[1, 4])
def racer(host_name: str, request: pytest.FixtureRequest) -> Iterator[RunningGuest]:
    with running(host_name, "racer", request.param) as guest:
        yield guest


def stop_after(monitor: xa.Monitor, hits: int) -> Callable[[Hit], None]:
    def callback(hit: Hit) -> None:
        if hit.breakpoint.hits >= hits:
            monitor.stop()

    return callback


def leave_when_hot(hit: Hit) -> None:
    if hit.breakpoint.hits >= ENOUGH:
        hit.breakpoint.remove()


def noticed(guest: RunningGuest) -> dict[str, int]:
    return dict(zip(CHECKS, guest.words("noticed", 5), strict=True))


CORNERS = Path(__file__).resolve().parents[1] / "lab" / "guest" / "corners.elf"
UNUSED = range(0x300, 0x314)
"""Memory of the guest's where nothing is; more pages than shadows are added at once."""
NOTHING = dict.fromkeys(CHECKS, 0)


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
def test_the_checker_notices_nothing(checker: RunningGuest, fast: bool, int3: bool) -> None:
    with hooked(checker, fast=fast, int3=int3) as (monitor, breakpoints):
        hook = breakpoints.insert(checker.address("target"), stop_after(monitor, CALLS))
        checker.start()
        serve(monitor, breakpoints, lambda: hook.hits >= CALLS)
        with checker.dom.paused():
            # It is in the call that it was stopped at, or behind that.
            assert checker.words("counter")[0] in (CALLS - 1, CALLS)
    assert checker.words("noticed", 6)[5] > CALLS // 16 - 1
    assert noticed(checker) == NOTHING


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
def test_every_call_of_every_vcpu_is_counted(racer: RunningGuest, fast: bool, int3: bool) -> None:
    calls = CALLS // racer.vcpus
    racer.write_word("go", calls)
    with hooked(racer, fast=fast, int3=int3) as (monitor, breakpoints):
        by_vcpu: dict[int, int] = {}

        def count(hit: Hit) -> None:
            by_vcpu[hit.vcpu] = by_vcpu.get(hit.vcpu, 0) + 1

        hook = breakpoints.insert(racer.address("hit"), count)
        racer.start()
        serve(monitor, breakpoints, lambda: racer.lines("done") == [calls] * racer.vcpus)
    assert racer.lines("made") == [calls] * racer.vcpus
    assert by_vcpu == dict.fromkeys(range(racer.vcpus), calls)
    assert hook.hits == racer.words("total")[0] == calls * racer.vcpus
    assert racer.lines("noticed") == [0] * racer.vcpus


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "toggle"])
@pytest.mark.parametrize("reads", [False, True], ids=["writes", "reads"])
def test_a_watched_variable(host_name: str, fast: bool, reads: bool) -> None:
    """A vCPU's counter, in a page with those of the others, beside a breakpoint."""
    calls, one = max(CALLS // 10, 20), 1
    with running(host_name, "racer", 4) as guest:
        guest.write_word("go", calls)
        written: list[int] = []
        vcpus = set()
        with hooked(guest, fast=fast) as (monitor, breakpoints):

            def note(touch: WatchpointHit) -> None:
                vcpus.add(touch.vcpu)
                if touch.written:
                    written.append(int.from_bytes(touch.watchpoint.read(), "little"))
                if written and written[-1] == calls:
                    monitor.stop()  # it goes on reading

            watch = breakpoints.watch(
                guest.address("made") + one * LINE, 4, after=note, reads=reads
            )
            hook = breakpoints.insert(guest.address("hit"), lambda hit: None)
            guest.start()
            serve(monitor, breakpoints, lambda: guest.lines("done") == [calls] * 4)
        assert written == list(range(1, calls + 1))
        assert vcpus == {one}
        if not reads:
            assert (watch.hits, watch.passed) == (calls, 3 * calls)
        else:
            assert watch.hits > 2 * calls
        assert hook.hits == guest.words("total")[0] == 4 * calls
        assert guest.lines("noticed") == [0] * 4


BASE = 0x100000
TABLE, VECTORS, AREA, BESIDE, READ, END = (BASE + 0x1000 * n for n in range(1, 7))
"""The GDT, the IDT, two pages that are written, one that is read, and where its end is told."""
TOP = AREA + 0x800
RF = 1 << 16
YIELD_FOR_EVER = b"\xb8\x1d\0\0\0\x31\xdb\x31\xc9\x0f\x01\xc1\xeb\xf2"
"""SCHEDOP_yield: the lab's CPU takes no interrupt from a guest that spins with IF clear."""


def word(value: int) -> bytes:
    return (value & 0xFFFF_FFFF).to_bytes(4, "little")


class Instructions:
    """A program of instructions whose writes are known: from the SDM, by hand."""

    def __init__(self) -> None:
        self.code = bytearray(
            b"\x0f\x01\x15" + word(TABLE + 0x80) + b"\x0f\x01\x1d" + word(TABLE + 0x88)
        )
        self.code += b"\xea" + word(BASE + 21) + b"\x08\x00"
        self.code += b"\x66\xb8\x10\x00\x8e\xd8\x8e\xc0\x8e\xd0" + b"\x31\xc0"
        self.expected: list[tuple[int, bytes]] = []
        """Each watched dword that is written, in its order: address, content."""

    @property
    def here(self) -> int:
        """The address of the next instruction."""
        return BASE + len(self.code)

    def add(self, code: bytes, *written: tuple[int, int]) -> None:
        """Have an instruction, and what it writes."""
        self.code += code
        self.expected += sorted((place, word(value)) for place, value in written)

    def set(self, **registers: int) -> None:
        """Load registers."""
        for name, value in registers.items():
            number = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi").index(name)
            self.code += bytes([0xB8 + number]) + word(value)

    def image(self) -> bytes:
        """The pages from BASE on."""
        pages = {BASE: self.code + b"\xc7\x05" + word(END) + word(1) + YIELD_FOR_EVER}
        gdt = struct.pack("<3Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
        gdtr = struct.pack("<HI2xHI", 23, TABLE, 0x21 * 8 - 1, VECTORS)
        pages[TABLE] = bytearray((gdt.ljust(0x80, b"\0") + gdtr).ljust(0x100, b"\0"))
        pages[TABLE] += b"\x83\x04\x24\x02\xcf"  # addl $2, (%esp); iret
        gates = {0x06: TABLE + 0x100, 0x20: TABLE + 0x104}
        pages[VECTORS] = bytearray(0x21 * 8)
        for vector, to in gates.items():
            gate = struct.pack("<HHHH", to & 0xFFFF, 8, 0x8E00, to >> 16)
            pages[VECTORS][8 * vector : 8 * vector + 8] = gate
        pages[READ] = bytearray(range(64))
        pages[END] = bytearray(4)
        return b"".join(
            bytes(pages.get(BASE + at, b"")).ljust(0x1000, b"\0") for at in range(0, 0x7000, 0x1000)
        )


def every_kind() -> Instructions:
    """PUSHAD, INT, an exception, CALL FAR, ENTER, REP, and operands in two pages."""
    made = Instructions()
    made.set(eax=1, ecx=2, edx=3, ebx=4, ebp=5, esi=6, edi=7, esp=TOP)
    values = 1, 2, 3, 4, TOP, 5, 6, 7
    made.add(b"\x60", *((TOP - 4 * at, value) for at, value in enumerate(values, 1)))
    made.code += b"\x31\xc0"  # xor %eax, %eax: ZF and PF
    made.set(esp=TOP + 0x40)
    made.add(b"\xcd\x20", (TOP + 0x34, made.here + 2), (TOP + 0x38, 8), (TOP + 0x3C, 0x46))
    made.set(esp=TOP + 0x60)
    there = made.here
    made.add(b"\x0f\x0b", (TOP + 0x54, there), (TOP + 0x58, 8), (TOP + 0x5C, 0x46 | RF))
    made.expected.append((TOP + 0x54, word(there + 2)))  # by its handler
    made.set(esp=TOP + 0x80)
    made.add(
        b"\x9a" + word(made.here + 7) + b"\x08\x00", (TOP + 0x78, made.here + 7), (TOP + 0x7C, 8)
    )
    made.set(esp=TOP + 0xA0, ebp=TOP)
    made.code += b"\xc7\x05" + word(TOP - 4) + word(0x99)
    made.expected.append((TOP - 4, word(0x99)))
    made.add(b"\xc8\x10\x00\x02", (TOP + 0x9C, TOP), (TOP + 0x98, 0x99), (TOP + 0x94, TOP + 0x9C))
    made.set(esp=TOP + 0xC0)
    made.add(b"\xff\x35" + word(READ), (TOP + 0xBC, 0x03020100))
    made.set(eax=0x44332211)
    made.add(b"\xa3" + word(BESIDE - 2), (BESIDE - 4, 0x22110000), (BESIDE, 0x4433))
    made.add(b"\xa3" + word(TOP), (TOP, 0x44332211))
    made.add(b"\xa3" + word(TOP), (TOP, 0x44332211))  # changes nothing
    made.set(edi=TOP + 0x1C, ecx=3)
    places = TOP + 0x14, TOP + 0x18, TOP + 0x1C
    made.add(b"\xfd\xf3\xab\xfc", *((place, 0x44332211) for place in reversed(places)))
    made.set(edx=0, eax=0, ebx=0x77, ecx=0x88)
    made.add(b"\x0f\xc7\x0d" + word(TOP + 8), (TOP + 8, 0x77), (TOP + 12, 0x88))
    made.set(esi=READ + 4, edi=TOP + 0x24)
    made.add(b"\xa5", (TOP + 0x24, 0x07060504))
    made.set(esi=READ + 8, edi=READ + 12)
    made.code += b"\xa6"  # cmpsb: two reads of a page
    return made


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "toggle"])
def test_fault_10_each_kind_of_write_is_told_once(
    host_name: str, fast: bool, tmp_path: Path
) -> None:
    """Every dword of two pages is watched."""
    program, path = every_kind(), tmp_path / "kinds.elf"
    write_image(path, BASE, program.image())
    with running(host_name, str(path)) as guest:
        written: list[tuple[int, bytes]] = []
        model: dict[int, bytes] = {}
        read = []

        def note(touch: WatchpointHit) -> None:
            assert touch.certain
            assert touch.new is not None
            at = touch.watchpoint.address
            assert touch.written
            assert touch.watchpoint.read()[touch.start - at :][: len(touch.new)] == touch.new
            assert touch.old == model.get(at, bytes(4))[touch.start - at :][: len(touch.old)]
            model[at] = touch.watchpoint.read()
            written.append((at, touch.watchpoint.read()))

        def seen(touch: WatchpointHit) -> None:
            if touch.certain:
                read.append(touch.address)

        with hooked(guest, fast=fast) as (monitor, breakpoints):
            for at in range(TOP - 0x40, TOP + 0x100, 4):
                breakpoints.watch(at, 4, after=note)
            for at in range(BESIDE - 0x10, BESIDE + 0x10, 4):
                breakpoints.watch(at, 4, after=note)
            for at in (8, 12):
                breakpoints.watch(READ + at, 1, seen, reads=True)
            guest.start()
            serve(monitor, breakpoints, lambda: guest.dom.memory.read(END, 1) == b"\1")
    assert sorted(without_rf(written)) == sorted(without_rf(program.expected))
    assert read[0] == READ + 8


def without_rf(written: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """INT pushes RF clear; where its delivery violated a view before, some CPUs push it set."""
    return [
        (at, word(int.from_bytes(value, "little") & ~RF) if at == TOP + 0x3C else value)
        for at, value in written
    ]


ENOUGH = 60
"""Hits of a place in a loop, of which there are thousands that tell no more."""


def instructions(name: str, count: int) -> list[int]:
    """Some of the places where instructions begin: physical, paging being off; as objdump says."""
    places = json.loads(Path(__file__).with_name("instructions.json").read_text())[name]
    return random.Random(count).sample(places, count)


@pytest.mark.parametrize(
    ("host_name", "count"),
    [*((name, 10) for name in HOSTS), *((name, 200) for name in HOSTS if LIVE or THOROUGH)],
    indirect=["host_name"],
)
def test_the_checker_notices_none_of_many(host_name: str, count: int) -> None:
    chosen = instructions("checker", count)
    calls = max(CALLS // count, 20)
    with running(host_name, "checker") as guest:
        target = guest.address("target")
        with hooked(guest) as (monitor, breakpoints):
            hook = breakpoints.insert(target, stop_after(monitor, calls))
            others = [breakpoints.insert(place, leave_when_hot) for place in chosen]
            assert len(breakpoints) == count + 1
            guest.start()
            serve(monitor, breakpoints, lambda: hook.hits >= calls)
            assert sum(other.hits > 0 for other in others) > count // 2
        assert noticed(guest) == NOTHING
        assert guest.words("noticed", 6)[5] > 0


@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("count", [10, 200])
def test_calls_are_exact_beside_many(host_name: str, count: int, vcpus: int) -> None:
    calls = max(CALLS // (vcpus * count), 4)
    with running(host_name, "racer", vcpus) as guest:
        guest.write_word("go", calls)
        with hooked(guest) as (monitor, breakpoints):
            for place in instructions("racer", count):
                breakpoints.insert(place, lambda hit: None)
            hook = breakpoints.insert(guest.address("hit"), lambda hit: None)

            def done() -> bool:
                return guest.lines("done") == [calls] * vcpus

            def look(event: xa.Event) -> xa.Response | None:
                answer = breakpoints(event)
                if hook.hits >= vcpus * calls and done():
                    monitor.stop()
                return answer

            guest.start()
            serve(monitor, look, done)
        assert hook.hits == guest.words("total")[0] == vcpus * calls
        assert guest.lines("noticed") == [0] * vcpus


@pytest.mark.parametrize("vcpus", [1, 4])
def test_inserting_and_removing_at_random_loses_nothing(host_name: str, vcpus: int) -> None:
    """Of the other hooks no call; of the guest's memory no byte."""
    chance = random.Random(vcpus)
    places = instructions("racer", 200)
    calls = CALLS // vcpus
    with running(host_name, "racer", vcpus) as guest:
        before = guest.contents()
        guest.write_word("go", calls)
        with hooked(guest) as (monitor, breakpoints):
            inserted: list[Breakpoint] = []
            churned = 0

            def churn(hit: Hit) -> None:
                nonlocal churned
                if chance.random() < 0.3:
                    churned += 1
                    if inserted and chance.random() < 0.5:
                        inserted.pop(chance.randrange(len(inserted))).remove()
                    else:
                        inserted.append(breakpoints.insert(chance.choice(places), lambda hit: None))

            hook = breakpoints.insert(guest.address("hit"), churn)
            done = [calls] * vcpus

            def look(event: xa.Event) -> xa.Response | None:
                answer = breakpoints(event)
                if hook.hits == sum(done) and guest.lines("done") == done:
                    monitor.stop()
                return answer

            guest.start()
            serve(monitor, look, lambda: guest.lines("done") == done)
        assert churned > CALLS // 10
        assert hook.hits == guest.words("total")[0] == sum(done)
        assert guest.lines("noticed") == [0] * vcpus
        after = guest.contents()
        changed = {gfn for gfn in after if after[gfn] != before[gfn]}
        assert changed <= guest.writable_gfns()


def test_views_that_xen_has_reset_are_made_again(host_name: str) -> None:
    """Taking a page from among the remap targets resets all three."""
    with running(host_name, "racer", 4) as guest:
        with hooked(guest) as (monitor, breakpoints):
            hook = breakpoints.insert(guest.address("hit"), stop_after(monitor, 40))
            guest.start()
            serve(monitor, breakpoints, lambda: hook.hits >= 40)
            assert breakpoints.verify() == []
            [between] = guest.dom.add_pages()
            others = [breakpoints.insert(gfn << 12, lambda hit: None) for gfn in UNUSED]
            assert breakpoints.verify() == []
            guest.xen.backend.domain_decrease_reservation_exact(
                int(guest.dom.domid), array("Q", [between])
            )
            assert breakpoints.hooks.access(hook.address >> 12) not in (xa.Access.X, xa.Access.N)
            hooked_gfns = {one.address >> 12 for one in (hook, *others)}
            assert set(breakpoints.verify()) == hooked_gfns
            assert breakpoints.verify() == []
            before, total = hook.hits, guest.words("total")[0]
            hook.callback = stop_after(monitor, before + 40)
            serve(monitor, breakpoints, lambda: hook.hits >= before + 40)
            # No call has been lost since: those in flight are not done yet.
            assert 0 <= hook.hits - before - (guest.words("total")[0] - total) <= 8
        assert guest.lines("noticed") == [0] * 4


def change_host_access(guest: RunningGuest, gfn: int) -> None:
    guest.xen.backend.altp2m_set_mem_access(int(guest.dom.domid), 0, gfn, 7)


def populate_anew(guest: RunningGuest, gfn: int) -> None:
    """As a balloon driver: the page is given back, and another one taken in its place.

    A page with breakpoints is mapped here, and stays the domain's as long.
    """
    domid, backend = int(guest.dom.domid), guest.xen.backend
    backend.domain_setmaxmem(domid, (guest.dom.info().max_pages + 1) * 4)
    content = guest.dom.memory.read_page(gfn)
    backend.domain_decrease_reservation_exact(domid, array("Q", [gfn]))
    backend.domain_populate_physmap_exact(domid, array("Q", [gfn]))
    guest.dom.memory.write_page(gfn, content)


def reset_the_view(guest: RunningGuest, _gfn: int) -> None:
    """A page is given to the domain among the remap targets, and taken from it."""
    [between] = guest.dom.add_pages()
    with hooks_around(guest, between):
        guest.xen.backend.domain_decrease_reservation_exact(
            int(guest.dom.domid), array("Q", [between])
        )


def views(guest: RunningGuest) -> tuple[xa.View, ...]:
    altp2m = guest.dom.open_altp2m
    assert altp2m is not None
    return altp2m.views


@contextmanager
def hooks_around(guest: RunningGuest, gfn: int) -> Iterator[None]:
    """Have a view remap something to above a gfn, too, so that it is among its targets."""
    [above] = guest.dom.add_pages()
    assert above == gfn + 1
    hooks = next(view for view in views(guest) if view.label == "hooks")
    hooks.remap(UNUSED[-1], above, access=xa.Access.RWX)
    yield
    assert hooks.access(UNUSED[-1]) is None


def count_to(monitor: xa.Monitor, breakpoints: Breakpoints, hook: Breakpoint, hits: int) -> None:
    hook.callback = stop_after(monitor, hits)
    serve(monitor, breakpoints, lambda: hook.hits >= hits)


@pytest.mark.parametrize("change", [change_host_access, populate_anew, reset_the_view])
@pytest.mark.parametrize(
    ("host_name", "fast"),
    [
        *(pytest.param(host, True, id=f"{host}-fast") for host in HOSTS),
        pytest.param(HOSTS[-1], False, id=f"{HOSTS[-1]}-toggle"),
    ],
    indirect=["host_name"],
)
def test_what_the_host_changes_is_found_and_mended(
    host_name: str, fast: bool, change: Callable[[RunningGuest, int], None]
) -> None:
    """While the guest runs, with other breakpoints, and a watch, in other pages."""
    hits = 40 if LIVE or THOROUGH else 10
    with running(host_name, "racer", 4) as guest:
        with hooked(guest, fast=fast) as (monitor, breakpoints):
            told: list[xa.ViewReset] = []
            breakpoints._altp2m.on_view_reset(told.append)
            hook = breakpoints.insert(guest.address("hit"), stop_after(monitor, hits))
            watch = breakpoints.watch(guest.address("made"), 4)
            unused = [breakpoints.insert(gfn << 12, lambda hit: None) for gfn in UNUSED[:-1]]
            changed = UNUSED[0] if change is populate_anew else hook.address >> 12
            guest.start()
            for turn in range(1, 4):
                count_to(monitor, breakpoints, hook, hits * turn)
                assert breakpoints.verify() == []
                change(guest, changed)
                found = breakpoints.verify()
                assert changed in found
                if change is reset_the_view:
                    assert {hook.address >> 12, *(one.address >> 12 for one in unused)} <= {*found}
                assert breakpoints.verify() == []
                assert all(lost.reapplied for lost in told)
                assert {lost.view.label for lost in told} >= {"hooks"}
                told.clear()
                before = hook.hits, watch.hits, guest.words("total")[0], guest.lines("made")[0]
                count_to(monitor, breakpoints, hook, hook.hits + hits)
                after = hook.hits, watch.hits, guest.words("total")[0], guest.lines("made")[0]
                new, touches, calls, made = (
                    now - was for now, was in zip(after, before, strict=True)
                )
                # Not one was lost since: those in flight are not done yet.
                assert 0 <= new - calls <= 8
                assert 0 <= touches - made <= 2
        assert guest.lines("noticed") == [0] * 4


def test_a_page_with_breakpoints_that_is_given_back(host_name: str) -> None:
    """It is told of; once they are removed, the others are mended."""
    with running(host_name, "racer", 4) as guest:
        with hooked(guest) as (monitor, breakpoints):
            told: list[xa.ViewReset] = []
            breakpoints._altp2m.on_view_reset(told.append)
            hook = breakpoints.insert(guest.address("hit"), stop_after(monitor, 40))
            gone = breakpoints.insert(UNUSED[0] << 12, lambda hit: None)
            guest.start()
            serve(monitor, breakpoints, lambda: hook.hits >= 40)
            change_host_access(guest, hook.address >> 12)
            guest.xen.backend.domain_decrease_reservation_exact(
                int(guest.dom.domid), array("Q", [UNUSED[0]])
            )
            with pytest.raises(xa.XenError) as error:
                breakpoints.verify()
            assert isinstance(error.value, xa.NotMappedError | xa.InvalidArgumentError)
            assert not all(lost.reapplied for lost in told)
            assert any(lost.failure is not None for lost in told)
            gone.remove()
            breakpoints.verify()
            assert breakpoints.verify() == []
            before, total = hook.hits, guest.words("total")[0]
            hook.callback = stop_after(monitor, before + 40)
            serve(monitor, breakpoints, lambda: hook.hits >= before + 40)
            assert 0 <= hook.hits - before - (guest.words("total")[0] - total) <= 8
        assert guest.lines("noticed") == [0] * 4


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "toggle"])
def test_a_page_that_comes_and_goes(host_name: str, fast: bool) -> None:
    """paged.c maps pages when they are used, and unmaps them: a breakpoint goes along."""
    lazy = 0xFFFF_8100_0000_0000
    with running(host_name, "paged") as guest:
        frames = range(guest.address("lazy_frames"), guest.address("lazy_frames") + 6 * 4096, 4096)
        places: list[int | None] = []
        with hooked(guest, fast=fast) as (monitor, breakpoints):
            hooks = []

            def begin(hit: Hit) -> None:
                hit.breakpoint.remove()
                space = guest.dom.memory.address_space(hit.registers)
                hooks.append(breakpoints.insert_va(space, lazy, lambda hit: None))
                # Heard of each time user_main() has run, which is once in a pass.
                breakpoints.insert(guest.address("user_target"), look)

            def look(hit: Hit) -> None:
                places.append(hooks[0].physical)
                if len(places) == PASSES:
                    monitor.stop()

            breakpoints.insert(guest.address("target64"), begin)
            guest.start()
            serve(monitor, breakpoints, lambda: len(places) >= PASSES)
        [hook] = hooks
        # Mapped once and unmapped once in each pass.
        assert 2 * (PASSES - 2) <= hook.moves <= 2 * (PASSES + 1)
        assert set(places) <= {None, *frames}
        assert hook.hits == 0
        assert set(guest.words("noticed", guest.image.symbol("noticed").size // 4)) == {0}
        assert guest.words("page_faults", size=8)[0] >= 8 * (PASSES - 2)


PASSES = 12


class Ended(Exception):
    """What a callback raises."""


def end_in_a_callback(guest: RunningGuest, fast: bool, int3: bool, chance: random.Random) -> None:
    """At a moment, in one of several ways; with vCPUs in the shadow, stepping and waiting."""
    way = chance.choice(["raise", "close", "close all", "stop", "leave a loop"])
    left = chance.randrange(1, 30)
    with hooked(guest, fast=fast, int3=int3) as (monitor, breakpoints):

        def count(_: Hit | WatchpointHit) -> None:
            nonlocal left
            left -= 1
            if left > 0:
                return
            if way == "raise":
                raise Ended
            if way.startswith("close"):
                breakpoints.close()
            if way == "close all":
                monitor.close()
            else:
                monitor.stop()

        breakpoints.insert(guest.address("hit"), count)
        breakpoints.insert(guest.address("wrong_after_hit"), lambda hit: None)
        kind = "after" if chance.random() < 0.5 else "before"
        if kind == "after":
            breakpoints.watch(guest.address("made") + LINE, 4, after=count)
        else:
            breakpoints.watch(guest.address("made"), 4, count, reads=True)
        if way == "leave a loop":
            for event in monitor.events(timeout=PATIENCE):
                answer = breakpoints(event)
                left -= 1
                if left < 0:
                    break
                if answer is not None:
                    event.reply(answer)
        else:
            monitor.run(breakpoints, timeout=PATIENCE)


@pytest.mark.parametrize(("host_name", "fast", "int3"), ONE_EACH, indirect=["host_name"])
def test_ending_in_every_state(racer: RunningGuest, fast: bool, int3: bool) -> None:
    """Again and again, in a guest that goes on."""
    chance = random.Random(f"{racer.vcpus} {fast} {int3}")
    before, pages = racer.contents(), None
    if isinstance(racer.xen.backend, MockBackend):
        racer.xen.backend.steps_at_once = 20_000  # it runs at each call, and nobody waits for it
    racer.start()
    for _ in range(ENDINGS):
        with suppress(Ended):
            end_in_a_callback(racer, fast, int3, chance)
        assert not racer.dom.altp2m_active
        info = racer.dom.info()
        assert not info.paused
        assert pages in (None, (info.pages, info.max_pages))
        pages = info.pages, info.max_pages  # but the ring's page, at the first time
        totals = [racer.words("total")[0]]
        end = time.monotonic() + PATIENCE
        while totals[-1] < totals[0] + 50:
            assert time.monotonic() < end, "it does not go on"
            with racer.dom.monitor() as monitor:  # the simulator's goes on while somebody listens
                monitor.run(lambda event: None, timeout=0.01)
            totals.append(racer.words("total")[0])
    with racer.dom.paused():
        after = racer.contents()
    assert racer.lines("noticed") == [0] * racer.vcpus
    assert {gfn for gfn in after if after[gfn] != before[gfn]} <= racer.writable_gfns()


ENDINGS = int(os.environ.get("XENALTP2M_ENDINGS", "4" if LIVE else "2"))


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
@pytest.mark.parametrize(
    ("place", "times"),
    [
        pytest.param("based_target", 1, id="fault_02_a_segment_with_a_base"),
        pytest.param("own_int3", 1, id="fault_02_an_int3_of_the_guests_own_there"),
        pytest.param("aligned", 1, id="fault_03_the_page_before_changes"),
        pytest.param("fill", 1, id="fault_11_executions"),
        pytest.param("fill", 10, id="fault_11_iterations"),
    ],
)
def test_corners(host_name: str, fast: bool, int3: bool, place: str, times: int) -> None:
    """Code of tests/lab/guest/corners.S; the int3 in its segment is the guest's in each case."""
    rounds = 20
    with running(host_name, str(CORNERS)) as guest:
        guest.write_word("go", rounds)
        with hooked(guest, fast=fast, int3=int3) as (monitor, breakpoints):
            hook = breakpoints.insert(
                guest.address(place), lambda hit: None, each_iteration=times > 1
            )

            def done() -> bool:
                return guest.words("done") == (1,)

            def look(event: xa.Event) -> xa.Response | None:
                answer = breakpoints(event)
                if hook.hits >= rounds * times and done():
                    monitor.stop()  # it goes on in the page
                return answer

            guest.start()
            serve(monitor, look, done)
        assert hook.hits == rounds * times
        assert guest.words("noticed") == (0,)
        assert guest.words("based_count") == guest.words("traps") == (rounds,)


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
def test_a_limit_what_is_behind_an_instruction_that_xen_completes_is_missed(
    host_name: str, fast: bool, int3: bool, tmp_path: Path
) -> None:
    """SDM 3C, 26.5.2: the step of CPUID ends with the instruction after it."""
    turns, program, path = 5, Instructions(), tmp_path / "pair.elf"
    program.set(esi=turns)
    first = program.here
    program.code += b"\x0f\xa2\x90\x4e\x75\xfa"  # CPUID; NOP; DEC ESI; JNZ to it
    write_image(path, BASE, program.image())
    with running(host_name, str(path)) as guest:
        with hooked(guest, fast=fast, int3=int3) as (monitor, breakpoints):
            hooks = [breakpoints.insert(first + at, lambda hit: None) for at in (0, 2, 3)]
            guest.start()
            answer = with_pauses(monitor, breakpoints)
            serve(monitor, answer, lambda: guest.dom.memory.read(END, 1) == b"\1")
        assert [hook.hits for hook in hooks] == [turns, 0, turns]


# Patches.

OTHER_RETURN = b"\x8d\x44\x40\x02"
"""LEA 2(%eax, %eax, 2), %eax: of hit(), which adds 1."""


def with_pauses(
    monitor: xa.Monitor, breakpoints: Breakpoints
) -> Callable[[xa.Event], xa.Response | None]:
    """Answer, and have it looked at now and then what the guest has done: it never rests."""
    events = itertools.count(1)

    def answer(event: xa.Event) -> xa.Response | None:
        if next(events) % 64 == 0:
            monitor.stop()
        return breakpoints(event)

    return answer


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
def test_fault_28_a_patched_function_returns_another_value_each_time(
    racer: RunningGuest, fast: bool, int3: bool
) -> None:
    """To each vCPU for all its calls; and once it is removed, or closed, its own."""
    calls = CALLS // racer.vcpus // (1 if int3 else 10)  # without int3 each fetch is looked at
    every = [calls] * racer.vcpus
    at = racer.address("hit") + 4

    def until(wanted: int) -> None:
        racer.write_word("go", wanted)
        serve(monitor, breakpoints, lambda: racer.lines("done") == [wanted] * racer.vcpus)

    page = at & -xa.PAGE_SIZE
    before = racer.dom.memory.read(page, xa.PAGE_SIZE)
    pages = racer.dom.info().pages
    racer.write_word("go", calls)
    with hooked(racer, fast=fast, int3=int3) as (monitor, breakpoints):
        patch = breakpoints.patch(at, OTHER_RETURN)
        racer.start()
        until(calls)
        assert racer.lines("noticed") == every
        assert racer.dom.memory.read(page, xa.PAGE_SIZE) == before
        patch.remove()
        until(2 * calls)
        assert racer.lines("noticed") == every
        hook = breakpoints.insert(at, lambda hit: None)
        breakpoints.patch(at, OTHER_RETURN)
        some = max(calls // 20, 20)
        until(2 * calls + some)
        assert hook.hits == some * racer.vcpus
        assert racer.lines("noticed") == [calls + some] * racer.vcpus
        assert racer.words("total")[0] == (2 * calls + some) * racer.vcpus
    assert racer.dom.memory.read(page, xa.PAGE_SIZE) == before
    assert racer.dom.info().pages <= pages


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "breakpoints"])
def test_fault_28_the_checker_finds_no_patch(
    checker: RunningGuest, fast: bool, int3: bool, beside: bool
) -> None:
    """It counts elsewhere, which the guest notices; its code looks as ever, and can be changed."""
    target, counter = checker.address("target"), checker.address("counter")
    passes = 1 if LIVE else 2
    with hooked(checker, fast=fast, int3=int3) as (monitor, breakpoints):
        breakpoints.patch(target, b"\xff\x05" + word(counter + 4))
        hits: list[int] = []
        for name in ("target", "patched", "target2") if beside else ():
            breakpoints.insert(checker.address(name), lambda hit: hits.append(1))
        checker.start()
        answer = with_pauses(monitor, breakpoints)
        serve(monitor, answer, lambda: checker.words("noticed", 6)[5] >= passes)
        with checker.dom.paused():
            counted = checker.words("counter", 2)
            found, done = noticed(checker), checker.words("noticed", 6)[5]
            assert found["calls"] in (done, done + 1)
            assert found | {"calls": 0} == NOTHING
            assert counted[0] == 0
            assert 0 <= counted[1] - checker.words("calls")[0] <= 1
    assert bool(hits) == beside


def patched_program(turns: int) -> tuple[bytes, dict[str, int]]:
    """Calls two functions so many times, one across a page's end; and the places in it."""
    across, own = BASE + 0x1000 - 3, BASE + 0x800
    here = BASE + 0x400
    code = bytearray(b"\xbc" + word(READ) + b"\xbe" + word(turns))
    start = len(code)
    for target, result in ((across, END + 4), (own, END + 8)):
        code += b"\xe8" + word(target - (BASE + len(code) + 5)) + b"\xa3" + word(result)
    code += b"\x8b\x1d" + word(own) + b"\x89\x1d" + word(END + 12)
    code += b"\x4e\x0f\x85" + word(start - (len(code) + 7))  # DEC ESI, JNZ
    code += b"\xc7\x05" + word(END) + word(1) + YIELD_FOR_EVER
    pages = bytearray(0x7000)
    pages[: len(code)] = code
    pages[across - BASE : across - BASE + 6] = b"\xb8" + word(1) + b"\xc3"
    pages[own - BASE : own - BASE + 32] = b"\xb8" + word(2) + b"\xc3" * 27
    return bytes(pages), {"across": across, "own": own, "here": here}


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "breakpoint"])
def test_fault_28_patched_code_uses_its_own_page(
    host_name: str, fast: bool, int3: bool, beside: bool, tmp_path: Path
) -> None:
    """One patch goes on into the next page; one adds to its page, and reads itself from there."""
    turns = max(CALLS // 10, 20)
    image, at = patched_program(turns)
    path = tmp_path / "patched.elf"
    write_image(path, BASE, image)
    with running(host_name, str(path)) as guest:
        before = guest.dom.memory.read(BASE, len(image))
        with hooked(guest, fast=fast, int3=int3) as (monitor, breakpoints):
            breakpoints.patch(at["across"], b"\xb8" + word(0x0A0B0C0D))
            add = b"\x83\x05" + word(at["here"]) + b"\x03"
            patch = breakpoints.patch(
                at["own"], add + b"\xa1" + word(at["own"] + 16) + b"\x90" * 12 + b"\xc3"
            )
            hook = breakpoints.insert(at["own"] if beside else END + 0x800, lambda hit: None)
            guest.start()
            answer = with_pauses(monitor, breakpoints)
            serve(monitor, answer, lambda: guest.dom.memory.read(END, 1) == b"\1")
            patch.remove()
        wanted = bytearray(before)
        for place, value in (
            (at["here"], 3 * turns), (END, 1), (END + 4, 0x0A0B0C0D), (END + 8, 0xC3C3C3C3),
            (END + 12, int.from_bytes(b"\xb8" + word(2)[:3], "little")),
        ):  # fmt: skip
            wanted[place - BASE : place - BASE + 4] = word(value)
        after = bytearray(guest.dom.memory.read(BASE, len(image)))
        after[READ - 8 - BASE : READ - BASE] = bytes(8)  # its stack
        wanted[READ - 8 - BASE : READ - BASE] = bytes(8)
        assert after == wanted
        assert hook.hits == (turns if beside else 0)
