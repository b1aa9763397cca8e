# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches of memory in every situation that a few instructions can make, on the simulator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m import instructions
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.hooks import Touch, Watch
from xenaltp2m.symbols import Symbols
from xenaltp2m.types import PAGE_SIZE

from .hooked import INC_EAX, NOP, STEPS, WAYS, Hooked, Make, store_byte
from .machinecode import (
    CODE,
    DATA,
    HALT,
    OTHER,
    PRESENT,
    STACK,
    TABLES,
    WRITABLE,
    Computer,
)

AT = DATA + 0x100
MOVSB, STOSB = b"\xa4", b"\xaa"
ACCESSED, OSFXSR = 1 << 5, 1 << 9


def address(where: int) -> bytes:
    return where.to_bytes(4, "little")


def load(where: int) -> bytes:
    """To eax."""
    return b"\xa1" + address(where)


def store(where: int, size: int) -> bytes:
    """As many bytes of al, eax or xmm0."""
    return {1: b"\xa2", 4: b"\xa3", 16: b"\xf3\x0f\x7f\x05"}[size] + address(where)


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda *args, **options: Hooked(*args, stack=stack, **options)


@pytest.fixture(params=[True, False], ids=["capstone", "without"])
def decoded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether there is a package that knows what instructions use."""
    if not request.param:
        monkeypatch.setitem(sys.modules, "capstone", None)
    instructions._disassembler.cache_clear()
    yield request.param
    instructions._disassembler.cache_clear()


class Notes:
    """What was told of watches."""

    def __init__(self) -> None:
        self.touches: list[Touch] = []
        self.values: list[bytes] = []

    def __call__(self, touch: Touch) -> None:
        self.touches.append(touch)
        self.values.append(touch.watch.read())

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


@STEPS
def test_each_repetition(make: Make, fast: bool) -> None:
    guest = make(b"\xf3" + STOSB + HALT, fast=fast, rax=7, rdi=AT - 2, rcx=8)
    notes = Notes()
    watch = guest.breakpoints.watch(AT, 4, after=notes)
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
    once = guest.breakpoints.watch(AT, 4, lambda touch: touch.watch.remove())
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

    def fail(touch: Touch) -> None:
        raise RuntimeError(f"of {touch!r}")

    first = guest.breakpoints.watch(AT, 1, after=fail)
    with pytest.raises(RuntimeError, match="of <Touch of <Watch of 1 bytes at 0x20100> by vCPU 0>"):
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
    refused(-1, 4, "not in the guest-physical")
    refused(0x4000_0000, 4, "a gfn is a hole")
    guest.breakpoints.insert(CODE, guest.note)
    refused(guest.breakpoints._pages[CODE >> 12].shadow_gfn << 12, 4, "is a shadow")
    assert guest.go().halted


@STEPS
def test_a_view_that_xen_has_reset(make: Make, fast: bool) -> None:
    guest = make(store_byte(AT, 1) + HALT, fast=fast)
    watch: Watch = guest.breakpoints.watch(AT, 1)
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
    hook = guest.breakpoints.insert_linear(space, new + 4, lambda hit: seen.append(hook.physical))
    assert hook.physical is None
    assert guest.go().halted
    assert seen == [first + 4, second + 4, second + 4]
    assert (hook.hits, hook.moves, hook.physical) == (3, 3, None)
    assert guest.register("rbx") == 3
    hook.remove()
    hook.remove()
    assert guest.breakpoints._watched == {}


@WAYS
def test_a_hit_is_one_hit_though_tables_are_marked(make: Make, fast: bool, int3: bool) -> None:
    """By the instruction at a breakpoint: the entry that leads to its data lies in such a page."""
    load_linear = b"\x8b\x04\x25" + address(DATA)  # mov, to %eax
    guest = make(load_linear + HALT, {DATA: b"\5"}, fast=fast, int3=int3)
    guest.computer.go_long()
    space = guest.dom.memory.address_space()
    hook = guest.breakpoints.insert_linear(space, CODE, guest.note)
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
    hook = guest.breakpoints.insert_linear(space, far, guest.note)
    assert guest.go().halted
    assert guest.seen == [far]
    assert (hook.physical, guest.register("rbx")) == (0x70000, 1)


def test_linear_addresses_are_checked(make: Make) -> None:
    guest = make(HALT)
    with pytest.raises(xa.InvalidArgumentError, match="paging is off"):
        guest.breakpoints.insert_linear(guest.dom.memory.address_space(), CODE, guest.note)
    guest.computer.go_long()
    with pytest.raises(xa.InvalidArgumentError, match="not an address of 64 bits"):
        guest.breakpoints.insert_linear(guest.dom.memory.address_space(), -1, guest.note)
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
        dom.trace("late", "never", symbols=symbols, returns=True) as trace,
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
        dom.trace("switch", symbols=Symbols.open(kernel), returns=True) as trace,
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
        dom.trace("early", symbols=Symbols.open(kernel))


@pytest.mark.parametrize("how", ["carried", "reset"])
def test_tables_that_were_written_unheard(make: Make, how: str) -> None:
    """While the domain was carried, or Xen had reset the views that are watched."""
    new, first, second = 0x1F0000, 0x70000, 0x71000
    present = PRESENT | WRITABLE
    entry = TABLES + 3 * PAGE_SIZE + (new >> 12) * 8
    guest = make(call_linear(new) + HALT, {first: b"\xc3", second: b"\xc3"})
    guest.computer.go_long(flags=present)
    guest.computer.map(new, first | present)
    hook = guest.breakpoints.insert_linear(guest.dom.memory.address_space(), new, guest.note)
    assert hook.physical == first
    if how == "carried":
        with guest.dom.carried():
            guest.dom.memory.write(entry, (second | present).to_bytes(8, "little"))
    else:
        guest.dom.memory.write(entry, (second | present).to_bytes(8, "little"))
        guest.host.altp2m_set_mem_access(guest.domid, 0, entry >> 12, 7)
        assert guest.breakpoints.verify() == [entry >> 12]
    assert hook.physical == second
    assert guest.go().halted
    assert guest.seen == [new]
    hook.remove()
