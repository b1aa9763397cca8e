# SPDX-License-Identifier: LGPL-2.1-or-later
"""Patches: what the guest executes, and what it reads, on the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.breakpoints import operand_size as instructions
from xenaltp2m.tools.breakpoints.hooks import Hit, WatchpointHit
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.symbols import Symbol, Symbols
from xenaltp2m.types import PAGE_SIZE

from .hooked import INC_EAX, INC_ECX, NOP, RET, WAYS, Hooked, Make, call, store_byte
from .machinecode import CODE, DATA, HALT, OTHER, PRESENT, STACK, WRITABLE, Computer

NEXT = CODE + PAGE_SIZE
THERE = CODE + 0x100
BP = 3
CODE_32 = 0xC9B
"""A flat code segment of 32-bit code, which compatibility mode has."""


def mov_eax(value: int) -> bytes:
    return b"\xb8" + value.to_bytes(4, "little")


def load_ebx(address: int) -> bytes:
    return b"\x8b\x1d" + address.to_bytes(4, "little")


def load_eax(address: int) -> bytes:
    return b"\xa1" + address.to_bytes(4, "little")


def add_to(address: int, value: int) -> bytes:
    """ADD of a byte to a dword in memory."""
    return b"\x83\x05" + address.to_bytes(4, "little") + bytes([value])


def number(data: bytes) -> int:
    return int.from_bytes(data[:4], "little")


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda *args, **options: Hooked(*args, stack=stack, **options)


def with_function(main: bytes, function: bytes) -> bytes:
    """A function at THERE."""
    return main.ljust(THERE - CODE, NOP) + function


@WAYS
def test_fault_28_other_code_is_executed_and_the_original_is_read(
    make: Make, fast: bool, int3: bool
) -> None:
    main = call(CODE, THERE) + load_ebx(THERE) + HALT
    guest = make(with_function(main, mov_eax(1) + RET), fast=fast, int3=int3)
    patch = guest.breakpoints.patch(THERE, mov_eax(2))
    assert (patch.address, patch.code, patch.inserted) == (THERE, mov_eax(2), True)
    assert guest.go().halted
    assert guest.register("rax") == 2
    assert guest.register("rbx") == number(mov_eax(1))
    assert guest.read(THERE, 6) == mov_eax(1) + RET
    assert len(guest.breakpoints) == 0


@WAYS
def test_fault_28_a_removed_patch_is_executed_no_more(make: Make, fast: bool, int3: bool) -> None:
    main = call(CODE, THERE) + b"\x89\xc2" + call(CODE + 7, THERE) + HALT  # MOV EDX, EAX
    guest = make(with_function(main, mov_eax(1) + RET), fast=fast, int3=int3)
    patch = guest.breakpoints.patch(THERE, bytearray(mov_eax(2)))

    def remove(hit: Hit) -> None:
        patch.remove()
        patch.remove()

    guest.breakpoints.insert(CODE + 5, remove)
    assert guest.go().halted
    assert (guest.register("rdx"), guest.register("rax")) == (2, 1)
    assert not patch.inserted
    patch.remove()


@WAYS
def test_fault_28_a_patch_across_the_end_of_a_page(make: Make, fast: bool, int3: bool) -> None:
    code = call(CODE, NEXT - 3) + load_ebx(NEXT - 2) + HALT
    code = code.ljust(NEXT - 3 - CODE, NOP) + mov_eax(0x01020304) + RET
    guest = make(code, fast=fast, int3=int3)
    patch = guest.breakpoints.patch(NEXT - 3, mov_eax(0x0A0B0C0D))
    assert [at for at, _ in patch.pieces] == [NEXT - 3, NEXT]
    assert guest.go().halted
    assert guest.register("rax") == 0x0A0B0C0D
    assert guest.register("rbx") == 0x01020304
    patch.remove()
    assert guest.breakpoints._session.guarded.pages == {}


@WAYS
def test_fault_28_a_patch_by_name_goes_on_where_the_page_tables_lead(
    make: Make, fast: bool, int3: bool
) -> None:
    apart = OTHER + 8 * PAGE_SIZE
    main = call(CODE, NEXT - 3) + HALT
    code = main.ljust(NEXT - 3 - CODE, NOP) + mov_eax(1)[:3]
    guest = make(code, {apart: mov_eax(1)[3:] + RET}, fast=fast, int3=int3)
    guest.computer.go_long()
    guest.computer.set(cs_arbytes=CODE_32)
    guest.computer.map(NEXT, apart | PRESENT | WRITABLE)
    known = Symbols([(NEXT - 3, 1, Symbol("there", NEXT - 3, 6))], "by hand")
    patch = guest.breakpoints.patch("there", mov_eax(0x0A0B0C0D), symbols=known, trust=True)
    assert [at for at, _ in patch.pieces] == [NEXT - 3, apart]
    assert guest.go().halted
    assert guest.register("rax") == 0x0A0B0C0D


def test_fault_28_a_patch_whose_second_page_is_none_is_not_there_at_all(make: Make) -> None:
    last = (2048 << 10) - 3
    guest = make(HALT)
    with pytest.raises((xa.NotMappedError, xa.InvalidArgumentError)):
        guest.breakpoints.patch(last, mov_eax(1))
    assert guest.breakpoints._session.guarded.pages == {}
    assert guest.breakpoints._session.patching.patches == []
    assert guest.go().halted


@WAYS
def test_fault_28_patched_code_that_reads_its_own_page(make: Make, fast: bool, int3: bool) -> None:
    """It reads what the guest reads, in its page and in the rest of its own patch."""
    other = THERE + 12
    main = call(CODE, THERE) + HALT
    guest = make(with_function(main, b"\x11" * 16 + b"\x22" * 16), fast=fast, int3=int3)
    guest.breakpoints.patch(THERE, load_eax(THERE + 24) + load_ebx(other) + RET + b"\x33" * 4)
    assert guest.go().halted
    assert guest.register("rax") == 0x22222222
    assert guest.register("rbx") == 0x11111111


@WAYS
def test_fault_28_without_capstone_the_next_bytes_of_a_patch_are_read_as_patched(
    make: Make, fast: bool, int3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the instruction may have: 15."""
    monkeypatch.setattr(instructions, "decoded", lambda code, size: None)
    main = call(CODE, THERE) + HALT
    guest = make(with_function(main, b"\x11" * 32), fast=fast, int3=int3)
    guest.breakpoints.patch(THERE, load_eax(THERE + 15) + load_ebx(THERE + 12) + RET + b"\x33" * 6)
    assert guest.go().halted
    assert guest.register("rax") == 0x11111111
    assert guest.register("rbx") == 0x33333333


@WAYS
def test_fault_28_patched_code_that_writes_to_its_own_page(
    make: Make, fast: bool, int3: bool
) -> None:
    """Once beside the patch, once across the page's end, once into the patch itself."""
    patched = (
        add_to(CODE + 0x200, 5) + add_to(NEXT - 2, 6) + store_byte(THERE, 0x77) + mov_eax(2) + RET
    )
    main = call(CODE, THERE) + call(CODE + 5, THERE) + load_ebx(CODE + 0x200) + HALT
    guest = make(with_function(main, RET * 32), fast=fast, int3=int3)
    before = guest.read(CODE, 2 * PAGE_SIZE)
    guest.breakpoints.patch(THERE, patched)
    guest.breakpoints.insert(NEXT, guest.note)
    assert guest.go().halted
    wanted = bytearray(before)
    wanted[THERE - CODE] = 0x77
    for at, more in ((0x200, 10), (PAGE_SIZE - 2, 12)):
        value = number(before[at:]) + more
        wanted[at : at + 4] = value.to_bytes(4, "little")
    assert guest.read(CODE, 2 * PAGE_SIZE) == wanted
    assert guest.register("rax") == 2
    assert guest.register("rbx") == number(before[0x200:]) + 10


@WAYS
def test_fault_28_patched_code_whose_stack_is_in_its_page(
    make: Make, fast: bool, int3: bool
) -> None:
    main = call(CODE, THERE) + INC_ECX + HALT
    guest = make(
        with_function(main, RET * 32), fast=fast, int3=int3, rcx=0, rsp=CODE + 0x300, rax=7
    )
    guest.breakpoints.patch(THERE, b"\x50\x5b" + RET)  # PUSH EAX, POP EBX
    assert guest.go().halted
    assert guest.read(CODE + 0x2F8, 8) == b"\x07\0\0\0" + (CODE + 5).to_bytes(4, "little")
    assert (guest.register("rbx"), guest.register("rcx")) == (7, 1)


@WAYS
def test_fault_28_a_breakpoint_at_a_patch_and_one_beside_it(
    make: Make, fast: bool, int3: bool
) -> None:
    """The instruction that is stepped after the hit is the patched one."""
    main = call(CODE, THERE) + HALT
    guest = make(with_function(main, mov_eax(1) + INC_EAX + RET), fast=fast, int3=int3)
    guest.breakpoints.insert(THERE, guest.note)
    guest.breakpoints.patch(THERE, mov_eax(8))
    after = guest.breakpoints.insert(THERE + 5, guest.note)
    guest.breakpoints.insert(CODE, guest.note)
    assert guest.go().halted
    assert guest.seen == [CODE, THERE, THERE + 5]
    assert guest.register("rax") == 9
    after.remove()
    assert len(guest.breakpoints) == 2


@WAYS
@pytest.mark.parametrize("there", [THERE, NEXT])
def test_fault_28_breakpoints_go_and_the_patch_stays(
    make: Make, fast: bool, int3: bool, there: int
) -> None:
    main = call(CODE, there) + call(CODE + 5, there) + HALT
    code = main.ljust(there - CODE, NOP) + INC_EAX * 5 + INC_ECX + RET
    guest = make(code, fast=fast, int3=int3, rcx=0)
    guest.breakpoints.patch(there, mov_eax(8))
    hooks = [guest.breakpoints.insert(there + at, lambda hit: None) for at in (0, 5)]
    done: list[int] = []

    def end(hit: Hit) -> None:
        done.append(hit.registers.rax)
        for hook in hooks:
            hook.remove()

    guest.breakpoints.insert(CODE + 5, end)
    assert guest.go().halted
    assert done == [8]
    assert (guest.register("rax"), guest.register("rcx")) == (8, 2)
    assert [hook.hits for hook in hooks] == [1, 1]


@WAYS
def test_fault_28_a_callback_puts_a_patch_where_it_was_hit(
    make: Make, fast: bool, int3: bool
) -> None:
    main = call(CODE, THERE) + b"\x89\xc2" + call(CODE + 7, THERE) + HALT
    guest = make(with_function(main, mov_eax(1) + RET), fast=fast, int3=int3)
    patches: list[xa.Patch] = []

    def turn(hit: Hit) -> None:
        if patches:
            patches[0].remove()
        else:
            patches.append(guest.breakpoints.patch(THERE, mov_eax(2)))

    guest.breakpoints.insert(THERE, turn)
    assert guest.go().halted
    assert (guest.register("rdx"), guest.register("rax")) == (2, 1)


@WAYS
def test_fault_28_the_guest_writes_over_a_patch(make: Make, fast: bool, int3: bool) -> None:
    """What it reads changes, and not what it executes, until the patch is removed."""
    main = (
        store_byte(THERE + 1, 5) + store_byte(THERE + 5, INC_ECX[0]) + call(CODE + 14, THERE)
        + load_ebx(THERE) + NOP + call(CODE + 26, THERE) + HALT
    )  # fmt: skip
    guest = make(with_function(main, mov_eax(1) + NOP + RET), fast=fast, int3=int3, rcx=0, rdx=0)
    patch = guest.breakpoints.patch(THERE, mov_eax(2))
    seen = []

    def remove(hit: Hit) -> None:
        seen.append(hit.registers.rax)
        patch.remove()

    guest.breakpoints.insert(CODE + 25, remove)
    assert guest.go().halted
    assert seen == [2]
    assert guest.register("rbx") == number(mov_eax(5))
    assert (guest.register("rax"), guest.register("rcx")) == (5, 2)


@WAYS
def test_fault_28_int3_in_a_patch_and_under_one(make: Make, fast: bool, int3: bool) -> None:
    """The first is the guest's own exception; the second is not executed."""
    code = with_function(b"\xcc" + INC_EAX + call(CODE + 2, THERE) + HALT, RET)
    guest = make(code, fast=fast, int3=int3, rax=0)
    guest.breakpoints.patch(CODE, NOP)
    guest.breakpoints.insert(CODE, guest.note)
    guest.breakpoints.patch(THERE, b"\xcc")
    guest.go()
    assert guest.seen == [CODE]
    assert guest.register("rax") == 1
    assert guest.computer.vector == BP


@WAYS
def test_fault_28_a_watch_in_a_page_with_a_patch(make: Make, fast: bool, int3: bool) -> None:
    """Each use of it by patched code is told once, with what it was and is."""
    watched = CODE + 0x200
    main = call(CODE, THERE) + load_ebx(watched) + HALT
    guest = make(with_function(main, RET * 32), fast=fast, int3=int3)
    before = guest.read(watched, 4)
    told: list[tuple[int | None, bool, bytes, bytes | None]] = []

    def note(touch: WatchpointHit) -> None:
        assert touch.address == watched
        told.append((touch.length, touch.written, touch.old, touch.new))

    guest.breakpoints.watch(watched, 4, after=note, reads=True)
    guest.breakpoints.patch(THERE, add_to(watched, 5) + add_to(watched, 3) + RET)
    guest.breakpoints.insert(THERE, guest.note)
    guest.breakpoints.insert(CODE + 5, guest.note)
    assert guest.go().halted
    middle, after = ((number(before) + more).to_bytes(4, "little") for more in (5, 8))
    assert guest.read(watched, 4) == after
    assert told == [(4, True, before, middle), (4, True, middle, after), (4, False, after, after)]
    assert guest.seen == [THERE, CODE + 5]


@WAYS
def test_fault_28_a_repeated_instruction_in_a_patch(make: Make, fast: bool, int3: bool) -> None:
    """REP STOSB into its own page, with a breakpoint: one hit, and each byte is written."""
    main = call(CODE, THERE) + HALT
    guest = make(
        with_function(main, RET * 8), fast=fast, int3=int3, rcx=5, rdi=CODE + 0x200, rax=0x5A
    )
    guest.breakpoints.patch(THERE, b"\xf3\xaa" + RET)
    after = guest.read(CODE + 0x205, 1)
    guest.breakpoints.insert(THERE, guest.note)
    assert guest.go().halted
    assert guest.seen == [THERE]
    assert guest.read(CODE + 0x200, 6) == b"\x5a" * 5 + after
    assert guest.register("rcx") == 0


@WAYS
def test_fault_28_a_patch_that_an_instruction_reaches_from_the_page_before(
    make: Make, fast: bool, int3: bool
) -> None:
    """ADD [DATA], imm8 whose last byte is patched; DATA is in a page with a breakpoint."""
    at = NEXT - 6
    main = b"\xe9" + (at - CODE - 5).to_bytes(4, "little")
    code = main.ljust(at - CODE, NOP) + add_to(DATA, 1) + HALT
    guest = make(code, {DATA: bytes(4)}, fast=fast, int3=int3)
    guest.breakpoints.insert(DATA + 0x80, guest.note)
    guest.breakpoints.patch(NEXT, b"\x07")
    assert guest.go().halted
    assert number(guest.read(DATA, 4)) == 7
    assert guest.read(NEXT, 1) == b"\x01"


@pytest.mark.parametrize("at", [0, 5])
def test_fault_28_a_page_that_cannot_be_planted(make: Make, at: int) -> None:
    """Writes before a breakpoint have moved instructions: each fetch is looked at."""
    place = CODE + 0x200
    main = store_byte(place - 1, 0x90) + call(CODE + 7, THERE) + HALT
    guest = make(with_function(main, mov_eax(1) + RET), rax=0)
    guest.breakpoints.patch(THERE, mov_eax(2))
    guest.breakpoints.insert(THERE + at, guest.note)
    guest.breakpoints.insert(place, guest.note)
    guest.computer.write(place - 1, b"\x05")
    guest.breakpoints._session.guarded.pages[CODE >> 12].before[0x200] = guest.read(place - 14, 14)
    assert guest.go().halted
    assert guest.register("rax") == 2
    assert guest.seen == [THERE + at]
    assert not guest.breakpoints._session.guarded.pages[CODE >> 12].armed


def test_fault_28_a_write_under_a_patch_moves_no_instructions(make: Make) -> None:
    """Before a breakpoint: what is not executed does not count."""
    main = store_byte(THERE, 0x33) + call(CODE + 7, THERE) + HALT
    guest = make(with_function(main, mov_eax(1) + INC_EAX + RET))
    guest.breakpoints.patch(THERE, mov_eax(2))
    guest.breakpoints.insert(THERE + 5, guest.note)
    assert guest.go().halted
    assert guest.register("rax") == 3
    assert guest.seen == [THERE + 5]
    assert guest.breakpoints._session.guarded.pages[CODE >> 12].armed


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda one: one.patch(CODE, "code"), "code must be bytes"),
        (lambda one: one.patch(CODE, b""), "length of code must be 0x1 to 0x1000"),
        (lambda one: one.patch(CODE, bytes(4097)), "length of code must be 0x1 to 0x1000"),
        (lambda one: one.patch(-1, NOP), "address must be"),
        (lambda one: one.patch(True, NOP), "address must be an integer"),
        (lambda one: one.patch(1.5, NOP), "an address is a number"),
        (lambda one: one.patch("there", NOP), "no symbols are given"),
        (lambda one: one.patch(THERE + 4, NOP), "overlap <Patch of 5 bytes"),
        (lambda one: one.patch(THERE - 1, NOP * 2), "overlap <Patch of 5 bytes"),
        (lambda one: one.patch(DATA - 1, NOP * 2), "the breakpoint at 0x20000 would be inside"),
        (lambda one: one.patch(DATA - 4, NOP * 8), "the breakpoint at 0x20000 would be inside"),
        (lambda one: one.insert(THERE + 1, print), "would be inside <Patch of 5 bytes"),
    ],
)
def test_fault_28_bad_patches_are_refused(
    make: Make, call: Callable[[Any], object], match: str
) -> None:
    guest = make(with_function(HALT, mov_eax(1) + RET))
    guest.breakpoints.patch(THERE, mov_eax(2))
    guest.breakpoints.insert(DATA, guest.note)
    with pytest.raises(xa.InvalidArgumentError, match=match):
        call(guest.breakpoints)
    assert len(guest.breakpoints._session.patching.patches) == 1
    assert len(guest.breakpoints) == 1
    assert guest.go().halted


def test_fault_28_no_view_is_left_for_a_patch(make: Make) -> None:
    guest = make(call(CODE, OTHER) + HALT, {OTHER: mov_eax(1) + RET})
    for _ in range(6):  # with view 0, hooks, step and write, these are 10
        guest.altp2m.create_view()
    with pytest.raises(xa.InvalidArgumentError, match="no view is left"):
        guest.breakpoints.patch(OTHER, mov_eax(2))
    assert guest.go().halted
    assert guest.register("rax") == 1


@WAYS
def test_fault_28_views_that_are_lost_are_made_again_with_patches(
    make: Make, fast: bool, int3: bool
) -> None:
    main = call(CODE, THERE) + HALT
    guest = make(with_function(main, mov_eax(1) + RET), fast=fast, int3=int3)
    guest.breakpoints.patch(THERE, load_eax(CODE + 0x200) + RET)
    guest.host.altp2m_set_domain_state(guest.domid, False)
    assert guest.breakpoints.verify() == [CODE >> 12]
    assert guest.go().halted
    assert guest.register("rax") == number(guest.read(CODE + 0x200, 4))
    assert guest.breakpoints.verify() == []


@WAYS
def test_fault_28_patches_are_carried(make: Make, fast: bool, int3: bool) -> None:
    main = call(CODE, THERE) + HALT
    guest = make(with_function(main, mov_eax(1) + RET), fast=fast, int3=int3)
    guest.breakpoints.patch(THERE, load_ebx(THERE + 8) + RET)
    with xa.Migration(guest.dom):
        guest.host.migrate(int(guest.dom.domid))
    guest.domid = int(guest.dom.domid)
    assert len(guest.breakpoints._session.patching.patches) == 1
    page = guest.breakpoints._session.guarded.pages[CODE >> 12]
    assert page.patches == {THERE - CODE: load_ebx(THERE + 8) + RET}
    assert page.copy is not None
    assert guest.breakpoints.verify() == []


@WAYS
@pytest.mark.parametrize("steps", range(1, 9))
def test_fault_28_ending_at_any_step_loses_no_write(fast: bool, int3: bool, steps: int) -> None:
    """Patched code adds to its own page, for ever, and the agent ends after so many events."""
    host = MockBackend((4, 17), memory_pages=1 << 13)
    main = call(CODE, THERE) + b"\x41" + b"\xeb\xf8"  # INC ECX, JMP to the CALL
    computer = Computer(with_function(main, add_to(CODE + 0x200, 1) + RET), host=host)
    computer.set(rcx=0)
    before = number(computer.read(CODE + 0x200, 4))
    host.steps_at_once = 1
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        Breakpoints(altp2m, monitor, fast=fast, int3=int3) as breakpoints,
    ):
        breakpoints.patch(THERE, add_to(CODE + 0x200, 1))
        left = iter(range(steps))

        def answer(event: xa.Event) -> xa.Response | None:
            if next(left, None) is None:
                monitor.stop()
            return breakpoints(event)

        monitor.run(answer, timeout=0.01)
    done = number(computer.read(CODE + 0x200, 4)) - before
    assert done - computer.register("rcx") in (0, 1)
    assert not any(vcpu.event_pauses for vcpu in computer.vcpus)
    assert not host._mappings


def test_fault_28_patched_code_of_two_vcpus_in_one_page() -> None:
    """Both write to it all the time: no write is lost, and none is told of wrongly."""
    host = MockBackend((4, 17), memory_pages=1 << 13)
    turns = 40
    loop = add_to(CODE + 0x200, 1) + b"\x49\x75\xf6" + HALT  # DEC ECX, JNZ to the ADD
    second = add_to(CODE + 0x300, 1) + b"\x49\x75\xf6" + HALT
    code = with_function(NOP * 12 + HALT, b"").ljust(0x180, NOP)
    computer = Computer(code.ljust(0x400, NOP), host=host, vcpus=2)
    host.execute(computer.domid, {"rip": CODE, "rcx": turns, "rsp": STACK}, 0)
    host.execute(computer.domid, {"rip": CODE + 0x80, "rcx": turns, "rsp": STACK}, 1)
    before = [number(computer.read(CODE + at, 4)) for at in (0x200, 0x300)]
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        Breakpoints(altp2m, monitor) as breakpoints,
    ):
        breakpoints.patch(CODE, loop)
        breakpoints.patch(CODE + 0x80, second)
        host.steps_at_once = 7
        monitor.run(breakpoints, timeout=0.01)
        now = [number(dom.memory.read(CODE + at, 4)) for at in (0x200, 0x300)]
    assert [after - was for after, was in zip(now, before, strict=True)] == [turns, turns]


TURNS = 40


def two_vcpus_add(at_once: int, *, int3: bool) -> int:
    """Have both add to a dword with LOCK, 1 by a patch and 2 by code of its own; the sum."""
    host = MockBackend((4, 17), memory_pages=1 << 13)
    place = CODE + 0x200
    loop = b"\xf0" + add_to(place, 1) + b"\x49\x75\xf5" + HALT  # DEC ECX, JNZ to the ADD
    own = loop[:7] + b"\x02" + loop[8:]
    computer = Computer((NOP * 0x80 + own).ljust(0x400, NOP), host=host, vcpus=2)
    for vcpu, rip in enumerate((CODE, CODE + 0x80)):
        host.execute(computer.domid, {"rip": rip, "rcx": TURNS, "rsp": STACK}, vcpu)
    before = number(computer.read(place, 4))
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        Breakpoints(altp2m, monitor, int3=int3) as breakpoints,
    ):
        breakpoints.patch(CODE, loop)
        host.steps_at_once = at_once
        monitor.run(breakpoints, timeout=0.01)
        return number(dom.memory.read(place, 4)) - before


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_fault_28_another_vcpu_writes_to_what_patched_code_changes(at_once: int) -> None:
    """Each addition counts."""
    assert two_vcpus_add(at_once, int3=True) == 3 * TURNS


@WAYS
def test_fault_28_a_limit_a_byte_that_it_is_patched_with_is_not_written(
    make: Make, fast: bool, int3: bool
) -> None:
    """To the instruction's own first byte, which the patch has already: a CPU writes 0xc6."""
    patch = store_byte(THERE, 0xC6)
    main = call(CODE, THERE) + HALT
    guest = make(with_function(main, NOP * len(patch) + RET), fast=fast, int3=int3)
    guest.breakpoints.patch(THERE, patch)
    assert guest.go().halted
    assert guest.read(THERE, 1) == NOP


@WAYS
def test_a_limit_a_vcpu_within_what_is_replaced_goes_on_in_the_new_bytes(
    make: Make, fast: bool, int3: bool
) -> None:
    guest = make(NOP * 3 + HALT, fast=fast, int3=int3, rip=CODE + 1, rax=0, rcx=0)
    guest.breakpoints.patch(CODE, INC_EAX + INC_ECX + INC_ECX)
    assert guest.go().halted
    assert (guest.register("rax"), guest.register("rcx")) == (0, 2)


def test_a_limit_without_int3_a_write_of_two_vcpus_in_one_moment_may_be_lost() -> None:
    """As :func:`test_fault_28_another_vcpu_writes_to_what_patched_code_changes`, without int3."""
    added = {at_once: two_vcpus_add(at_once, int3=False) for at_once in (1, 2, 3, 7)}
    assert max(added.values()) <= 3 * TURNS
    assert min(added.values()) < 3 * TURNS, added
