# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches of memory in every situation that a few instructions can make, on the simulator."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.breakpoints import operand_size as instructions
from xenaltp2m.tools.breakpoints.hooks import Watchpoint, WatchpointHit
from xenaltp2m.tools.breakpoints.views import UsedTurn
from xenaltp2m.tools.symbols import Symbols
from xenaltp2m.types import PAGE_SIZE

from .accesslog import AccessLog
from .hooked import INC_EAX, NOP, STEPS, WAYS, Hooked, Make, store_byte
from .machinecode import (
    CODE,
    DATA,
    HALT,
    HANDLERS,
    KERNEL_CODE,
    OTHER,
    PRESENT,
    RF,
    STACK,
    TABLES,
    WRITABLE,
    Computer,
)

AT = DATA + 0x100
MOVSB, STOSB = b"\xa4", b"\xaa"
ACCESSED, DIRTY, OSFXSR = 1 << 5, 1 << 6, 1 << 9
PAGE_FAULT = 14


def address(where: int) -> bytes:
    return where.to_bytes(4, "little")


def load(where: int) -> bytes:
    """To eax."""
    return b"\xa1" + address(where)


def store(where: int, size: int) -> bytes:
    """As many bytes of al, eax or xmm0."""
    return {1: b"\xa2", 4: b"\xa3", 16: b"\xf3\x0f\x7f\x05"}[size] + address(where)


def number(value: int, size: int = 4) -> bytes:
    return (value % (1 << 8 * size)).to_bytes(size, "little")


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda *args, **options: Hooked(*args, stack=stack, **options)


@pytest.fixture(params=[True, False], ids=["capstone", "without"])
def decoded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether there is a package that knows what instructions use."""
    if not request.param:
        monkeypatch.setitem(sys.modules, "capstone", None)
    caches = instructions._disassembler, instructions._shapes
    for cache in caches:
        cache.cache_clear()
    yield request.param
    for cache in caches:
        cache.cache_clear()


class Notes:
    """What was told of watches."""

    def __init__(self) -> None:
        self.touches: list[WatchpointHit] = []
        self.values: list[bytes] = []

    def __call__(self, touch: WatchpointHit) -> None:
        self.touches.append(touch)
        self.values.append(touch.watchpoint.read())

    @property
    def kinds(self) -> str:
        return "".join("w" if touch.written else "r" for touch in self.touches)


@STEPS
@pytest.mark.parametrize(
    ("distance", "size", "reaches"),
    [
        (0, 1, True), (3, 1, True), (4, 1, False), (-1, 1, False), (-1, 4, True), (-4, 4, False),
        (-3, 4, True), (3, 4, True), (-15, 16, True), (-16, 16, False), (-64, 4, False),
        (0x700, 4, False),
    ],
)  # fmt: skip
def test_bytes_not_pages(
    make: Make, fast: bool, decoded: bool, distance: int, size: int, reaches: bool
) -> None:
    """Of 4 watched bytes; a write that begins at some distance."""
    guest = make(store(AT + distance, size) + HALT, fast=fast, rax=0x01010101, cr4=OSFXSR)
    notes = Notes()
    watch = guest.breakpoints.watch(AT, 4, notes)
    near = -64 < distance < 0
    assert guest.go().halted
    assert guest.read(AT + distance, 1) == (b"\0" if size == 16 else b"\1")
    told = reaches if decoded else reaches or near
    assert (watch.hits, watch.passed) == (int(told), int(not told))
    assert [touch.certain for touch in notes.touches] == [decoded or not near] * told
    assert [touch.address for touch in notes.touches] == [AT + distance] * told


@STEPS
def test_before_and_after(make: Make, fast: bool) -> None:
    code = store_byte(AT, 1) + load(AT) + store_byte(AT, 2) + HALT
    guest = make(code, fast=fast)
    before, after = Notes(), Notes()
    guest.breakpoints.watch(AT, 1, before, after=after)
    assert guest.go().halted
    assert (before.values, after.values) == ([b"\0", b"\1"], [b"\1", b"\2"])
    assert [touch.registers.rip for touch in before.touches] == [CODE, CODE + 12]
    assert [touch.registers.rip for touch in after.touches] == [CODE + 7, CODE + 19]
    assert guest.register("rax") == 1


@STEPS
@pytest.mark.parametrize("reads", [False, True])
def test_reads_where_they_are_wanted(make: Make, fast: bool, reads: bool) -> None:
    code = load(AT) + load(OTHER) + load(AT + 4) + store_byte(AT, 2) + HALT
    guest = make(code, {AT: b"\x07\0\0\0\x08"}, fast=fast)
    notes = Notes()
    watch = guest.breakpoints.watch(AT, 4, notes, reads=reads)
    assert guest.go().halted
    assert notes.kinds == ("rw" if reads else "w")
    assert watch.passed == int(reads)
    assert guest.register("rax") == 8


@STEPS
def test_an_instruction_that_reads_one_and_writes_another(make: Make, fast: bool) -> None:
    """In one page, and in two; and a breakpoint is where it is."""
    guest = make(MOVSB * 2 + HALT, fast=fast, rsi=AT, rdi=AT + 0x10, rcx=0)
    source, target, other = Notes(), Notes(), Notes()
    guest.breakpoints.watch(AT, 2, source, reads=True)
    guest.breakpoints.watch(AT + 0x10, 1, target)
    guest.computer.write(AT, b"ab")
    guest.breakpoints.watch(AT + 0x11, 1, after=other)
    guest.breakpoints.insert(CODE + 1, guest.note)
    assert guest.go().halted
    assert (source.kinds, target.kinds, other.kinds) == ("rr", "w", "w")
    assert other.values == [b"b"]
    assert guest.seen == [CODE + 1]
    guest = make(MOVSB + HALT, fast=fast, rsi=AT, rdi=OTHER)
    source, target = Notes(), Notes()
    guest.breakpoints.watch(AT, 1, source, reads=True)
    guest.breakpoints.watch(OTHER, 1, after=target)
    assert guest.go().halted
    assert (source.kinds, target.kinds) == ("r", "w")


REP, STD = b"\xf3", b"\xfd"


@STEPS
def test_each_repetition(make: Make, fast: bool) -> None:
    guest = make(REP + STOSB + HALT, fast=fast, rax=7, rdi=AT - 2, rcx=8)
    notes = Notes()
    watch = guest.breakpoints.watch(AT, 4, after=notes, each_iteration=True)
    assert guest.go().halted
    assert notes.values == [b"\7" * count + b"\0" * (4 - count) for count in (1, 2, 3, 4)]
    assert watch.passed == 4


@STEPS
def test_a_range_in_two_pages(make: Make, fast: bool) -> None:
    end = DATA + PAGE_SIZE
    code = store(end - 2, 4) + store_byte(end, 5) + store_byte(end - 1, 6) + store_byte(end + 4, 7)
    guest = make(code + HALT, fast=fast, rax=0x01010101)
    notes = Notes()
    watch = guest.breakpoints.watch(end - 4, 8, after=notes)
    assert list(watch.gfns) == [DATA >> 12, OTHER >> 12]
    assert guest.go().halted
    assert [value.hex() for value in notes.values] == [
        "0000010101010000", "0000010105010000", "0000010605010000"
    ]  # fmt: skip
    assert watch.passed == 1


@STEPS
def test_code_that_is_watched_and_written(make: Make, fast: bool) -> None:
    """Of a page with breakpoints: what is written is told, and executed."""
    there = CODE + 0x80
    code = store_byte(there, INC_EAX[0]) + load(there) + b"\x31\xc0" + b"\xeb"
    code += bytes([0x80 - len(code) - 1])
    guest = make(code.ljust(0x80, NOP) + NOP + HALT, fast=fast, rax=0)
    writes, reads = Notes(), Notes()
    guest.breakpoints.watch(there, 1, after=writes)
    guest.breakpoints.watch(there, 1, reads, reads=True)
    guest.breakpoints.insert(there, guest.note)
    assert guest.go().halted
    assert guest.seen == [there]
    assert guest.register("rax") == 1
    assert (writes.values, reads.kinds) == ([INC_EAX], "wr")


@STEPS
def test_a_write_from_a_watched_page_into_code(make: Make, fast: bool) -> None:
    """One instruction: neither may be missed."""
    there = CODE + PAGE_SIZE
    guest = make(
        store(there - 2, 4) + b"\xe9" + (there - CODE - 10).to_bytes(4, "little"),
        {there: NOP * 8 + HALT},
        fast=fast,
        rax=int.from_bytes(NOP * 2 + INC_EAX * 2, "little"),
    )
    notes = Notes()
    guest.breakpoints.watch(there - 2, 1, notes)
    guest.breakpoints.insert(there + 4, guest.note)
    assert guest.go().halted
    assert guest.seen == [there + 4]
    assert guest.register("rax") == int.from_bytes(NOP * 2 + INC_EAX * 2, "little") + 2
    assert notes.kinds == "w"


@STEPS
def test_entries_of_page_tables(make: Make, fast: bool) -> None:
    """The CPU itself marks them as used: a write of 8 bytes, whoever it is for."""
    last = TABLES + 3 * PAGE_SIZE
    guest = make(b"\x8b\x04\x25" + address(AT) + store(0, 1)[:0] + HALT, fast=fast)
    guest.computer.go_long()
    entry, neighbour = Notes(), Notes()
    watch = guest.breakpoints.watch(last + (AT >> 12) * 8, 8, after=entry)
    other = guest.breakpoints.watch(last + (AT >> 12) * 8 - 8, 8, neighbour)
    assert guest.go().halted
    expected = (AT & -PAGE_SIZE) | PRESENT | WRITABLE | ACCESSED
    assert int.from_bytes(entry.values[-1], "little") == expected
    assert all(touch.certain for touch in entry.touches)
    assert watch.hits == 1
    assert neighbour.touches == []
    assert other.passed >= 1


@STEPS
def test_taking_them_out(make: Make, fast: bool) -> None:
    code = store_byte(AT, 1) + store_byte(AT, 2) + load(OTHER) + HALT
    guest = make(code, fast=fast)
    once = guest.breakpoints.watch(AT, 4, lambda touch: touch.watchpoint.remove())
    gone = guest.breakpoints.watch(OTHER, 4, reads=True)
    gone.remove()
    gone.remove()
    assert (once.inserted, gone.inserted) == (True, False)
    assert guest.go().halted
    assert (once.hits, gone.hits, once.inserted) == (1, 0, False)
    hooks = guest.breakpoints.hooks
    assert {hooks.effective_access(gfn) for gfn in (DATA >> 12, OTHER >> 12)} == {xa.Access.RWX}


@STEPS
def test_a_callback_that_fails_or_jumps(make: Make, fast: bool) -> None:
    guest = make(store_byte(AT, 1) + store_byte(AT, 2) + HALT, fast=fast)

    def fail(touch: WatchpointHit) -> None:
        raise RuntimeError(f"of {touch!r}")

    first = guest.breakpoints.watch(AT, 1, after=fail)
    with pytest.raises(
        RuntimeError, match="of <WatchpointHit of <Watchpoint of 1 bytes at 0x20100> by vCPU 0>"
    ):
        guest.go()
    first.remove()
    guest.breakpoints.watch(AT, 1, lambda touch: touch.set_registers(rip=CODE + 14))
    assert guest.go().halted
    assert guest.read(AT, 1) == b"\1"


def test_closing_in_a_callback(make: Make) -> None:
    guest = make(store_byte(AT, 1) + store_byte(AT, 2) + HALT)
    guest.breakpoints.watch(AT, 1, lambda touch: guest.breakpoints.close())
    guest.go()
    guest.go()
    assert guest.halted
    assert guest.read(AT, 1) == b"\2"


def test_bad_ranges(make: Make) -> None:
    guest = make(HALT)

    def refused(at: int, length: int, match: str) -> None:
        with pytest.raises(xa.InvalidArgumentError, match=match):
            guest.breakpoints.watch(at, length)

    refused(AT, 0, "0 bytes cannot be watched")
    refused(AT, -1, "-1 bytes")
    refused(-1, 4, "must be at least 0x0")
    refused(0x4000_0000, 4, "a gfn is a hole")
    guest.breakpoints.insert(CODE, guest.note)
    refused(guest.breakpoints._session.guarded.pages[CODE >> 12].shadow_gfn << 12, 4, "is a shadow")
    assert guest.go().halted


@STEPS
def test_a_view_that_xen_has_reset(make: Make, fast: bool) -> None:
    guest = make(store_byte(AT, 1) + HALT, fast=fast)
    watch: Watchpoint = guest.breakpoints.watch(AT, 1)
    assert guest.breakpoints.verify() == []
    guest.host.altp2m_set_mem_access(guest.domid, guest.breakpoints.hooks.id, DATA >> 12, 7)
    assert guest.breakpoints.verify() == [DATA >> 12]
    assert guest.breakpoints.verify() == []
    assert guest.go().halted
    assert watch.hits == 1


# Breakpoints at linear addresses.


def store_entry(page: int, entry: int) -> bytes:
    """In the last table, then INVLPG; 64-bit."""
    at = address(TABLES + 3 * PAGE_SIZE + (page >> 12) * 8)
    return b"\xc7\x04\x25" + at + address(entry) + b"\x0f\x01\x3c\x25" + address(page)


def call_linear(target: int) -> bytes:
    return b"\xb8" + address(target) + b"\xff\xd0"  # mov, call *%rax


@STEPS
def test_a_page_that_is_mapped_later(make: Make, fast: bool) -> None:
    """It is not there at first; then it is, elsewhere, and gone again."""
    new, first, second = 0x1F0000, 0x70000, 0x71000
    present = PRESENT | WRITABLE
    code = store_entry(new, first | present) + call_linear(new + 4)
    code += store_entry(new, second | present) + call_linear(new + 4) * 2
    code += store_entry(new, 0) + HALT
    routine = NOP * 6 + b"\xff\xc3\xc3"  # inc %ebx; ret
    guest = make(code, {first: routine, second: routine}, fast=fast, rbx=0)
    guest.computer.go_long(flags=present)
    guest.computer.map(new, 0)
    seen: list[int | None] = []
    space = guest.dom.memory.address_space()
    hook = guest.breakpoints.insert_va(space, new + 4, lambda hit: seen.append(hook.physical))
    assert hook.physical is None
    assert guest.go().halted
    assert seen == [first + 4, second + 4, second + 4]
    assert (hook.hits, hook.moves, hook.physical) == (3, 3, None)
    assert guest.register("rbx") == 3
    hook.remove()
    hook.remove()
    assert guest.breakpoints._session.guarded.watched == {}


@WAYS
def test_a_hit_is_one_hit_though_tables_are_marked(make: Make, fast: bool, int3: bool) -> None:
    """By the instruction at a breakpoint: the entry that leads to its data lies in such a page."""
    load_linear = b"\x8b\x04\x25" + address(DATA)  # mov, to %eax
    guest = make(load_linear + HALT, {DATA: b"\5"}, fast=fast, int3=int3)
    guest.computer.go_long()
    space = guest.dom.memory.address_space()
    hook = guest.breakpoints.insert_va(space, CODE, guest.note)
    assert guest.go().halted
    assert guest.seen == [CODE]
    assert hook.hits == 1
    assert guest.register("rax") == 5


@WAYS
def test_a_hit_is_not_missed_where_tables_are_watched(make: Make, fast: bool, int3: bool) -> None:
    """With their reads: each fetch is one, before it comes to the breakpoint."""
    guest = make(NOP * 2 + HALT, fast=fast, int3=int3)
    guest.computer.go_long()
    notes = Notes()
    guest.breakpoints.watch(TABLES, 8, notes, reads=True)
    for place in (CODE, CODE + 1):
        guest.breakpoints.insert(place, guest.note)
    assert guest.go().halted
    assert guest.seen == [CODE, CODE + 1]
    assert notes.touches


def test_tables_that_come_one_by_one(make: Make) -> None:
    """Each level is not present at first."""
    far = 0x7F_FFE0_0000  # tables of its own below the first
    code = b"".join(
        b"\xc7\x04\x25" + address(table + index * 8) + address(entry | PRESENT | WRITABLE)
        for table, index, entry in [
            (0x74000, 511, 0x75000), (TABLES, 0, TABLES + PAGE_SIZE),
            (TABLES + PAGE_SIZE, 511, 0x74000), (0x75000, 0, 0x70000),
        ]
    )  # fmt: skip
    code += b"\x48\xb8" + far.to_bytes(8, "little") + b"\xff\xd0" + HALT
    guest = make(code, {0x70000: NOP * 2 + b"\xff\xc3\xc3"}, rbx=0)
    guest.computer.go_long()
    space = guest.dom.memory.address_space()
    hook = guest.breakpoints.insert_va(space, far, guest.note)
    assert guest.go().halted
    assert guest.seen == [far]
    assert (hook.physical, guest.register("rbx")) == (0x70000, 1)


def test_linear_addresses_are_checked(make: Make) -> None:
    guest = make(HALT)
    with pytest.raises(xa.InvalidArgumentError, match="paging is off"):
        guest.breakpoints.insert_va(guest.dom.memory.address_space(), CODE, guest.note)
    guest.computer.go_long()
    with pytest.raises(xa.InvalidArgumentError, match="must be 0x0 to 0xffffffffffffffff"):
        guest.breakpoints.insert_va(guest.dom.memory.address_space(), -1, guest.note)
    assert guest.go().halted


def test_a_trace_of_what_is_not_mapped_yet(tmp_path: Path) -> None:
    new, there = 0x1F0000, 0x70000
    code = store_entry(new, there | PRESENT | WRITABLE) + call_linear(new) * 3 + HALT
    host = MockBackend(memory_pages=1 << 13)
    computer = Computer(code, {there: NOP + b"\xc3"}, host=host)
    computer.describe()
    computer.go_long()
    computer.map(new, 0)
    kernel = tmp_path / "kallsyms"
    kernel.write_text(f"{new:016x} T late\n{1 << 40:016x} T never\n")
    symbols = Symbols.open(kernel)
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        xa.Trace(dom, "late", "never", symbols=symbols, returns=True, trust=True) as trace,
    ):
        host.steps_at_once = 200
        seen = list(trace.calls(timeout=0.01))
        assert [type(one).__name__ for one in seen] == ["Call", "Return"] * 3
        assert trace.hits == {"late": 3, "never": 0}
        assert trace.ended is not None


@pytest.mark.parametrize("high", [True, False], ids=["kernel", "user"])
def test_a_trace_of_what_changes_the_page_tables(tmp_path: Path, high: bool) -> None:
    """As execve() does, or a kernel's thread that borrows those of whoever ran before.

    A kernel's stack, in the upper half, is nobody else's; a process's is at the same address as
    another's.
    """
    other, call, function = 0x66000, b"\xe8\x01\0\0\0", CODE + 6
    load_cr3 = b"\xb8" + address(other) + b"\x0f\x22\xd8"
    host = MockBackend(memory_pages=1 << 13)
    computer = Computer(call + HALT + load_cr3 + b"\xc3", host=host)
    computer.describe()
    computer.go_long()
    upper = 0xFFFF_8000_0000_0000
    computer.write(TABLES + 8 * 256, computer.read(TABLES, 8))
    computer.write(other, computer.read(TABLES, PAGE_SIZE))
    computer.set(rsp=upper + STACK if high else STACK)
    kernel = tmp_path / "kallsyms"
    kernel.write_text(f"{function:016x} T switch\n")
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        xa.Trace(dom, "switch", symbols=Symbols.open(kernel), returns=True, trust=True) as trace,
    ):
        host.steps_at_once = 200
        seen = list(trace.calls(timeout=0.01))
        assert trace.ended is not None
    assert [type(one).__name__ for one in seen] == ["Call", "Return"][: 1 + high]
    assert computer.register("cr3") == other


def test_a_trace_before_paging_is_on(tmp_path: Path) -> None:
    host = MockBackend(memory_pages=1 << 13)
    computer = Computer(HALT, host=host)
    kernel = tmp_path / "kallsyms"
    kernel.write_text(f"{0xFFFFFFFF81000000:016x} T early\n")
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        pytest.raises(xa.NotMappedError, match="has not turned paging on yet"),
    ):
        xa.Trace(dom, "early", symbols=Symbols.open(kernel))


@pytest.mark.parametrize("how", ["carried", "reset"])
def test_tables_that_were_written_unheard(make: Make, how: str) -> None:
    """While the domain was carried, or Xen had reset the views that are watched."""
    new, first, second = 0x1F0000, 0x70000, 0x71000
    present = PRESENT | WRITABLE
    entry = TABLES + 3 * PAGE_SIZE + (new >> 12) * 8
    guest = make(call_linear(new) + HALT, {first: b"\xc3", second: b"\xc3"})
    guest.computer.go_long(flags=present)
    guest.computer.map(new, first | present)
    hook = guest.breakpoints.insert_va(guest.dom.memory.address_space(), new, guest.note)
    assert hook.physical == first
    if how == "carried":
        with xa.Migration(guest.dom):
            guest.dom.memory.write(entry, (second | present).to_bytes(8, "little"))
    else:
        guest.dom.memory.write(entry, (second | present).to_bytes(8, "little"))
        guest.host.altp2m_set_mem_access(guest.domid, 0, entry >> 12, 7)
        assert guest.breakpoints.verify() == [entry >> 12]
    assert hook.physical == second
    assert guest.go().halted
    assert guest.seen == [new]
    hook.remove()


# What an instruction uses besides the first byte that Xen reports.

TOP = AT + 0x40
"""Of the stack."""
PUSHAD, LCALL, FXSAVE = b"\x60", b"\x9a", b"\x0f\xae\x05"
FLAGS = 2
"""EFLAGS as they are at first."""


def words(*values: int) -> bytes:
    return b"".join(number(value) for value in values)


@STEPS
@pytest.mark.parametrize(
    ("code", "written"),
    [
        (PUSHAD, words(0xD1, 0x51, 0xB9, TOP, 0xB, 0xD, 0xC, 0xA)),
        (b"\xcd\x20", words(CODE + 2, KERNEL_CODE, FLAGS)),
        (b"\x0f\x0b", words(CODE, KERNEL_CODE, FLAGS | RF)),
        (LCALL + address(CODE + 7) + b"\x08\x00", words(CODE + 7, KERNEL_CODE)),
        (b"\xc8\x10\x00\x00", words(0xB9)),
        (b"\xc8\x10\x00\x02", words(TOP - 4, 0x99, 0xB9)),
        (b"\xff\x35" + address(AT), words(0x77)),
        (b"\x9c", words(FLAGS)),
    ],
    ids=["PUSHAD", "INT", "UD2", "CALL FAR", "ENTER", "nested ENTER", "PUSH memory", "PUSHFD"],
)
def test_fault_10_each_dword_on_the_stack(
    make: Make, fast: bool, code: bytes, written: bytes
) -> None:
    """Xen tells of the first that is pushed."""
    guest = make(code + HALT, fast=fast, rsp=TOP, rax=0xA, rcx=0xC, rdx=0xD, rbx=0xB)
    guest.computer.set(rbp=0xB9, rsi=0x51, rdi=0xD1)
    if code.startswith(b"\xc8"):
        guest.computer.set(rbp=AT + 8)
        written = written.replace(words(0xB9), words(AT + 8))
        guest.computer.write(AT + 4, words(0x99))
    guest.computer.write(AT, words(0x77))
    touches: dict[int, list[WatchpointHit]] = {}
    first = TOP - len(written)
    for at in range(first - 8, TOP + 4, 4):
        touches[at] = []
        guest.breakpoints.watch(at, 4, after=touches[at].append)
    guest.go()
    assert guest.dom.info().shutdown
    for at, told in touches.items():
        if not first <= at < TOP:
            assert told == [], hex(at)
            continue
        [touch] = told
        value = written[at - first :][:4]
        if code.startswith(b"\xcd") and at == TOP - 4:  # RF differs by the violation
            assert touch.new is not None
            value = bytes([*value[:2], touch.new[2], *value[3:]])
        assert (touch.start, touch.old, touch.new, touch.written) == (at, bytes(4), value, True)
        assert touch.certain


@STEPS
def test_fault_10_what_is_pushed_again(make: Make, fast: bool) -> None:
    """Nothing changes, and it is told nevertheless."""
    frame = words(CODE + 2, KERNEL_CODE, FLAGS)
    guest = make(b"\xcd\x20" + HALT, fast=fast, rsp=TOP)
    guest.computer.write(TOP - 12, frame)
    guest.computer.write(TOP - 20, words(1, 2))
    notes = [Notes() for _ in range(5)]
    for at, note in zip(range(TOP - 20, TOP, 4), notes, strict=True):
        guest.breakpoints.watch(at, 4, after=note)
    guest.go()
    assert [note.kinds for note in notes] == ["", "", "w", "w", "w"]


@STEPS
def test_fault_10_a_store_across_two_watched_pages(make: Make, fast: bool) -> None:
    guest = make(store(OTHER - 1, 4) + HALT, fast=fast, rax=0x04030201)
    lower, upper, both = Notes(), Notes(), Notes()
    guest.breakpoints.watch(OTHER - 4, 4, lower)
    guest.breakpoints.watch(OTHER, 4, upper)
    guest.breakpoints.watch(OTHER - 1, 4, after=both)
    assert guest.go().halted
    assert (lower.kinds, upper.kinds, both.kinds) == ("w", "w", "w")
    [touch] = both.touches
    assert (touch.address, touch.length) == (OTHER - 1, 4)
    assert (touch.old, touch.new) == (bytes(4), b"\1\2\3\4")


@STEPS
@pytest.mark.parametrize("far", [False, True], ids=["one page", "two pages"])
def test_fault_10_both_operands_of_a_comparison(make: Make, fast: bool, far: bool) -> None:
    other = OTHER if far else AT + 0x10
    guest = make(b"\xa6" + HALT, fast=fast, rsi=AT, rdi=other)
    notes = [Notes() for _ in range(3)]
    for at, note in zip((AT, other, other + 1), notes, strict=True):
        guest.breakpoints.watch(at, 1, note, reads=True)
    assert guest.go().halted
    assert [note.kinds for note in notes] == ["r", "r", ""]


@STEPS
def test_fault_10_a_move_within_one_watch_is_one_touch(make: Make, fast: bool) -> None:
    guest = make(MOVSB + HALT, fast=fast, rsi=AT, rdi=AT + 2)
    guest.computer.write(AT, b"abc")
    before, after = Notes(), Notes()
    watch = guest.breakpoints.watch(AT, 4, before, after=after, reads=True)
    assert guest.go().halted
    assert (before.kinds, after.kinds, watch.hits) == ("w", "w", 1)
    assert after.values == [b"aba\0"]


@STEPS
def test_fault_10_a_state_that_is_saved(make: Make, fast: bool) -> None:
    """FXSAVE begins further before what is watched than an operand is long."""
    xmm0 = AT + 160
    guest = make(FXSAVE + address(AT) + HALT, fast=fast, cr4=OSFXSR)
    guest.computer.write(xmm0, b"\xee" * 16)
    notes, beside = Notes(), Notes()
    guest.breakpoints.watch(xmm0, 16, notes)
    guest.breakpoints.watch(AT + 464, 16, beside)  # which it leaves alone
    assert guest.go().halted
    assert (notes.kinds, beside.kinds) == ("w", "")


@STEPS
def test_fault_10_sixteen_bytes_compared_and_exchanged(make: Make, fast: bool) -> None:
    """CMPXCHG16B writes what was there where it is not equal."""
    code = b"\x48\x0f\xc7\x0c\x25" + address(AT)
    guest = make(code * 2 + HALT, {AT: b"\7" * 16}, fast=fast, rax=1, rdx=2, rbx=3, rcx=4)
    guest.computer.go_long()
    low, high = Notes(), Notes()
    guest.breakpoints.watch(AT, 8, after=low)
    guest.breakpoints.watch(AT + 8, 8, after=high)
    assert guest.go().halted
    assert (low.kinds, high.kinds) == ("ww", "ww")
    assert high.values == [b"\7" * 8, number(4, 8)]


@STEPS
@pytest.mark.parametrize("prefix", [b"", b"\x64", b"\x36"], ids=["DS", "FS", "SS"])
def test_fault_10_segments_with_a_base(make: Make, fast: bool, prefix: bytes) -> None:
    """16-bit addresses, which wrap within the segment."""
    base = AT & ~0xFFF
    guest = make(prefix + b"\x67\x66\x89\x47\x20" + HALT, fast=fast, rbx=0x1_FFF0)
    guest.computer.set(rax=0x0201, ds_base=base, fs_base=base + 4, ss_base=base + 8)
    there = base + 0x10 + {b"": 0, b"\x64": 4, b"\x36": 8}[prefix]
    within, behind = Notes(), Notes()
    guest.breakpoints.watch(there + 1, 1, after=within)
    guest.breakpoints.watch(there + 2, 1, after=behind)
    guest.go()
    assert (within.values, behind.values) == ([b"\2"], [])
    assert [touch.length for touch in within.touches] == [2]


@STEPS
def test_fault_10_entries_of_one_table_that_are_marked_at_once(make: Make, fast: bool) -> None:
    """Those that lead to the code and to its data lie in one page, which the CPU marks both in."""
    last = TABLES + 3 * PAGE_SIZE
    guest = make(b"\xc7\x04\x25" + address(AT) + bytes(4) + HALT, fast=fast)
    guest.computer.go_long()
    notes = {page: Notes() for page in (CODE, DATA)}
    for page, note in notes.items():
        guest.breakpoints.watch(last + (page >> 12) * 8, 8, after=note)
    assert guest.go().halted
    for page, note in notes.items():
        entry = int.from_bytes(note.values[-1], "little")
        dirty = DIRTY if page == DATA else 0
        assert entry == page | PRESENT | WRITABLE | ACCESSED | dirty
        assert all(touch.certain and touch.written for touch in note.touches)
        assert len({touch.new for touch in note.touches}) == len(note.touches)


@STEPS
def test_fault_10_what_decoding_does_not_tell(make: Make, fast: bool, decoded: bool) -> None:
    """Is found by comparing: ``before`` is called late where there is no ``after``."""
    guest = make(b"\xc8\x00\x00\x02" + HALT, fast=fast, rsp=TOP, rbp=STACK)  # enter $0, $2
    notes = Notes()
    guest.breakpoints.watch(TOP - 12, 4, notes)
    assert guest.go().halted
    [touch] = notes.touches
    assert (touch.certain, touch.executed) == (True, not decoded)
    assert notes.values == [bytes(4) if decoded else number(TOP - 4)]


@STEPS
def test_fault_10_vcpus_that_write_at_once(fast: bool) -> None:
    """Old and new bytes are of each one's own instruction, and none is told twice."""
    loop = b"\xf0\xff\x05" + address(AT) + b"\x49\x75\xf6\xeb\xfe"  # lock incl; dec %ecx; jnz
    host = MockBackend(memory_pages=1 << 13)
    computer = Computer(loop, host=host, vcpus=3, rcx=5)
    for other in computer.vcpus[1:]:
        other.context[:] = computer.vcpu.context
        other.initialised = other.online = True
    notes: list[tuple[int, bytes, bytes | None]] = []
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        xa.Breakpoints(altp2m, monitor, fast=fast) as breakpoints,
    ):
        breakpoints.watch(
            AT, 4, after=lambda touch: notes.append((touch.vcpu, touch.old, touch.new))
        )
        host.run(computer.domid, 30)
        host.steps_at_once = 30
        monitor.run(breakpoints, timeout=0.01)
        host.steps_at_once = 0
        assert [one[1:] for one in notes] == [(number(n), number(n + 1)) for n in range(15)]
        assert {one[0] for one in notes} == {0, 1, 2}


@STEPS
def test_fault_10_a_vcpu_that_never_ends_its_step(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that another resets within it: the others wait for a while, and then go on."""
    monkeypatch.setattr(UsedTurn, "MOST_REFUSALS", 5)
    host = MockBackend(memory_pages=1 << 13)
    code = store_byte(AT, 1) + b"\xeb\xfe"
    computer = Computer(code, host=host, vcpus=2)
    other = computer.vcpus[1]
    other.context[:] = computer.vcpu.context
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        xa.Breakpoints(altp2m, monitor, fast=fast) as breakpoints,
    ):
        told: list[int] = []
        breakpoints.watch(AT, 1, lambda touch: told.append(touch.vcpu), after=lambda touch: None)
        host.run(computer.domid, 5)
        monitor.run(breakpoints, timeout=0.01)
        assert told == [0]
        computer.vcpu.online = False
        other.initialised = other.online = True
        host.run(computer.domid, 5)
        host.steps_at_once = 5
        monitor.run(breakpoints, timeout=0.01)
        host.steps_at_once = 0
        assert told == [0, 1]
        assert other.register("rip") == CODE + 7
        assert dom.memory.read(AT, 1) == b"\1"


@STEPS
def test_a_limit_an_instruction_that_faults_half_way_is_told_again(make: Make, fast: bool) -> None:
    """MOVSB reads, and has nowhere to write to; the handler gives it another place."""
    guest = make(MOVSB + HALT, {AT: b"\x5a"}, fast=fast, rsi=AT, rdi=OTHER)
    guest.computer.go_long()
    guest.computer.describe()
    guest.computer.map(OTHER, 0)
    elsewhere = b"\x48\x83\xc4\x08\xbf" + address(DATA + 0x900) + b"\x48\xcf"  # the error code
    guest.computer.write(HANDLERS + 16 * PAGE_FAULT, elsewhere)
    notes = Notes()
    guest.breakpoints.watch(AT, 1, notes, reads=True)
    assert guest.go().halted
    assert guest.read(DATA + 0x900, 1) == b"\x5a"
    assert [(touch.registers.rip, touch.registers.rdi) for touch in notes.touches] == [
        (CODE, OTHER),
        (CODE, DATA + 0x900),
    ]


@STEPS
def test_a_limit_reads_of_one_table_after_the_first(make: Make, fast: bool) -> None:
    """What leads to the code and what leads to its data lie in one page: the first is told."""
    guest = make(b"\xa1" + number(AT, 8) + HALT, fast=fast)
    guest.computer.go_long(PRESENT | WRITABLE | ACCESSED | DIRTY)
    notes = {page: Notes() for page in (CODE, DATA)}
    for page, note in notes.items():
        guest.breakpoints.watch(TABLES + 3 * PAGE_SIZE + (page >> 12) * 8, 8, note, reads=True)
    assert guest.go().halted
    assert notes[CODE].touches[0].registers.rip == CODE
    assert notes[DATA].touches == []


# Repeated string instructions.


@STEPS
@pytest.mark.parametrize("backwards", [False, True])
def test_fault_11_an_execution_is_one_touch(make: Make, fast: bool, backwards: bool) -> None:
    begin = AT + 5 if backwards else AT - 2
    code = (STD if backwards else b"") + REP + STOSB + HALT
    guest = make(code, fast=fast, rax=7, rdi=begin, rcx=8)
    before, after = Notes(), Notes()
    watch = guest.breakpoints.watch(AT, 4, before, after=after)
    assert guest.go().halted
    assert (before.values, after.values) == ([bytes(4)], [b"\7" * 4])
    [touch] = after.touches
    assert (touch.start, touch.old, touch.new) == (AT, bytes(4), b"\7" * 4)
    assert (watch.hits, watch.passed) == (1, 0)


@STEPS
def test_fault_11_one_that_goes_through_many_pages(make: Make, fast: bool) -> None:
    """In two of three that are watched; and another that begins where it was."""
    count = PAGE_SIZE // 4
    again = b"\xb9" + address(4) + b"\xbf" + address(DATA + 0x800) + REP + b"\xab"
    guest = make(REP + b"\xab" + again + HALT, fast=fast, rax=-1, rdi=DATA + 0x800, rcx=count)
    both, upper, behind = Notes(), Notes(), Notes()
    guest.breakpoints.watch(DATA + 0x804, PAGE_SIZE, after=both)
    guest.breakpoints.watch(OTHER, 4, after=upper)
    guest.breakpoints.watch(OTHER + PAGE_SIZE, 4, after=behind)
    assert guest.go().halted
    assert (both.kinds, upper.kinds, behind.kinds) == ("ww", "w", "")
    assert both.touches[0].new == b"\xff" * (PAGE_SIZE - 4) + bytes(0)


@STEPS
def test_fault_11_a_loop_is_no_repetition(make: Make, fast: bool) -> None:
    """Though its registers move as those of one do."""
    loop = b"\xaa\x49\x75\xfc"  # stosb; dec %ecx; jnz
    guest = make(loop + HALT, fast=fast, rax=7, rdi=AT, rcx=3)
    notes = Notes()
    guest.breakpoints.watch(AT, 4, notes)
    assert guest.go().halted
    assert notes.kinds == "www"


def calls_of(host: MockBackend) -> Counter[str]:
    """How often each call was made since the last look."""
    found = Counter(call.op for call in host.calls)
    host.calls.clear()
    return found


def test_fault_17_watching_much_memory() -> None:
    """All of a guest's: in bulk, and without a copy of it."""
    host, size = MockBackend(memory_pages=1 << 13), 16 << 20
    domid = host.add_domain("big", memory_kib=size >> 10, superpages=False)
    with (
        xa.connect(host) as xen,
        xen.domain(domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        xa.Breakpoints(altp2m, monitor) as breakpoints,
    ):
        calls_of(host)
        tracemalloc.start()
        watch = breakpoints.watch(0, size, reads=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        made = calls_of(host)
        assert made["altp2m_set_mem_access_multi"] <= 8  # in four views
        assert made["altp2m_set_mem_access"] <= 8
        assert made["foreignmemory_map"] <= size >> 20  # a megabyte at once
        assert peak < size // 2
        gfns = range(0, size >> 12, 97)
        assert {breakpoints.hooks.access(gfn) for gfn in gfns} == {xa.Access.X}
        calls_of(host)
        watch.remove()
        assert calls_of(host)["altp2m_set_mem_access"] <= 8
        assert {breakpoints.hooks.access(gfn) for gfn in gfns} == {xa.Access.RWX}


def test_fault_17_a_hole_in_much_memory(make: Make) -> None:
    """Is found before anything is set."""
    guest = make(HALT)
    with pytest.raises(xa.InvalidArgumentError, match="a gfn is a hole"):
        guest.breakpoints.watch(0, 3 << 20)  # it has two
    assert guest.breakpoints._session.guarded.watched == {}
    assert guest.breakpoints._session.views.used is None
    assert guest.go().halted


# Random programs: each watch is told just what the engine says that the program does.

FIRST, LAST = DATA, DATA + 3 * PAGE_SIZE
"""The program's data and stack."""
INT_20, UD2, BTS = b"\xcd\x20", b"\x0f\x0b", b"\x0f\xab\x05"
ADD_2_IRET = b"\x83\x04\x24\x02\xcf"  # addl $2, (%esp); iret
FILLED = bytes(range(1, 256)) * 49


class Programs:
    """Makes random programs of 32-bit instructions that use memory in every way there is."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.has_vague = False
        """Whether some instruction uses more or less by the CPU, or by its privilege level."""

    def place(self, size: int = 4) -> int:
        """Somewhere in the data: anywhere, at a page's end, or at a few places used often."""
        chance = self.chance
        at = chance.choice([
            chance.randrange(FIRST, LAST - 64),
            chance.choice([FIRST, FIRST + PAGE_SIZE]) + PAGE_SIZE - chance.randrange(1, 9),
            FIRST + PAGE_SIZE + 0x200 + chance.randrange(48),
        ])  # fmt: skip
        return min(at, LAST - size)

    def stack(self) -> bytes:
        return b"\xbc" + address(max(self.place(64), FIRST + 0x400))

    def instruction(self) -> bytes:
        chance, at = self.chance, address(self.place())
        repeated = chance.choice([b"", REP, b"\xf2"])
        string = b"\xb9" + address(chance.randrange(1, 12)) + chance.choice([STD, b"\xfc"])
        source, target = (self.place(64) for _ in range(2))
        string += b"\xbe" + address(source) + b"\xbf" + address(target)
        width = chance.choice([b"", b"\x66"])
        vague = [
            INT_20, UD2, b"\x61" + self.stack(), b"\x1e",
            b"\x0f\xae\x05" + address(min(self.place() & -16, LAST - 512)),
        ]  # fmt: skip
        if chance.random() < 0.1:
            self.has_vague = True
            return chance.choice(vague)
        return chance.choice([
            b"\xa3" + at, b"\xa1" + at, b"\xa2" + at, width + b"\x89\x1d" + at,
            b"\xc7\x05" + at + bytes(4), b"\xff\x05" + at, b"\x09\x05" + at, b"\x87\x0d" + at,
            b"\xf0\x0f\xc1\x05" + at, b"\x0f\xb1\x0d" + at, b"\x0f\xc7\x0d" + at, b"\x84\x05" + at,
            b"\x0f\x94\x05" + at, b"\x8f\x05" + at, b"\xff\x35" + at, b"\x60",
            width + b"\x50", width + b"\x5b", b"\x9c", b"\x6a\x00", b"\xc8\x00\x00\x00\xc9",
            b"\xc8\x10\x00" + bytes([chance.randrange(4)]),
            b"\xe8" + bytes(4) + b"\x83\xc4\x04", b"\xe8\x02\0\0\0\xeb\x01\xc3",
            b"\x66\x0f\x7f\x05" + address(self.place() & -16),
            b"\xf3\x0f\x7f\x05" + at, b"\xf3\x0f\x6f\x05" + at, b"\xd9\x35" + at,
            b"\xdd\x1d" + at + b"\xd9\xee",
            b"\xb8" + number(chance.randrange(-4096, 4096)) + BTS + address(OTHER + 0x800),
            b"\xbb" + at + b"\xd7", b"\x0f\x01\x05" + at, b"\x67\x89\x07",
            b"\x64\xa3" + address(self.place() - FIRST),
            string + repeated + width + chance.choice([b"\xa5", b"\xab", b"\xad"]),
            string + repeated + chance.choice([MOVSB, STOSB, b"\xac"]),
            string + repeated + width + chance.choice([b"\xa6", b"\xa7", b"\xae", b"\xaf"]),
            string + MOVSB, string + b"\xa6", self.stack(), b"\xbd" + at, b"\x40", b"\x31\xc0",
        ])  # fmt: skip

    def code(self, length: int) -> bytes:
        return self.stack() + b"".join(self.instruction() for _ in range(length)) + HALT

    def ranges(self, count: int) -> list[tuple[int, int, bool]]:
        """What is watched: address, length, reads."""
        chance = self.chance
        found = []
        for _ in range(count):
            at = self.place(16)
            length = chance.choice([1, 2, 4, 8, 16, 300, PAGE_SIZE])
            found.append((at, min(length, LAST - at), chance.random() < 0.4))
        return found


def prepare(computer: Computer) -> None:
    """Handlers that return: of INT behind it, of UD2 behind that."""
    computer.write(HANDLERS + 16 * 0x20, b"\xcf")
    computer.write(HANDLERS + 16 * 6, ADD_2_IRET)
    computer.write(FIRST, FILLED[: LAST - FIRST])
    computer.set(cr4=OSFXSR, rax=0, rbx=FIRST, rcx=1, rdx=2, rbp=FIRST + 0x800, fs_base=FIRST)


def compared(make: Make, seed: int, **options: bool) -> int:
    """Run a program twice, and compare; return how many touches there were."""
    programs = Programs(seed)
    code, ranges = programs.code(programs.chance.randrange(5, 40)), programs.ranges(6)
    computer = Computer(code)
    computer.describe()
    prepare(computer)
    gfns = range(FIRST >> 12, LAST >> 12)
    expected = AccessLog(computer).run(gfns)
    guest = make(code, **options)
    prepare(guest.computer)
    told: list[tuple[int, bool, bytes, bool]] = []

    def note(which: int) -> Callable[[WatchpointHit], None]:
        return lambda touch: told.append(
            (which, touch.written, touch.watchpoint.read(), touch.certain)
        )

    for which, (at, length, reads) in enumerate(ranges):
        guest.breakpoints.watch(at, length, after=note(which), reads=reads)
    assert guest.go().halted
    has_int = INT_20 in code  # in whose frame RF differs by the violation
    for gfn in gfns:
        same = guest.read(gfn << 12, PAGE_SIZE) == computer.read(gfn << 12, PAGE_SIZE)
        assert same or has_int, hex(gfn)
    for which, (at, length, reads) in enumerate(ranges):
        wanted = []
        for one in expected:
            if one.reaches(at, at + length, reads=reads):
                memory = b"".join(one.after.values())[at - FIRST :][:length]
                is_written = one.reaches(at, at + length, reads=False)
                wanted.append((is_written, b"" if has_int else memory))
        mine = [(one[1], b"" if has_int else one[2], one[3]) for one in told if one[0] == which]
        certain = [one[:2] for one in mine if one[2]]
        where = f"seed {seed}: {length} bytes at {at:#x}, reads={reads}"
        if programs.has_vague:
            assert is_part(certain, wanted), where
            assert is_part(wanted, [one[:2] for one in mine]), where
        else:
            assert certain == wanted, where
            assert len(certain) == len(mine), where
    return len(told)


def is_part(some: Sequence[object], all_of_them: Iterable[object]) -> bool:
    """Whether some are among others, in their order."""
    rest = iter(all_of_them)
    return all(one in rest for one in some)


@pytest.mark.parametrize("seed", range(8))
def test_fault_10_random_programs_are_told_as_the_engine_tells(make: Make, seed: int) -> None:
    assert sum(compared(make, 100 * seed + number) for number in range(5)) > 0
