# SPDX-License-Identifier: LGPL-2.1-or-later
"""Breakpoints in every situation that a few instructions can make, on the simulator.

``tests/contract/test_breakpoints.py`` has what holds on Xen, too.
"""

from __future__ import annotations

import gc
import struct
import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from errno import EBUSY, EINVAL, ENOMEM, EPERM, ESRCH
from typing import Any, TypeVar, get_type_hints

import pytest

import xenaltp2m as xa
from tests.thorough import THOROUGH
from xenaltp2m.abi.layouts import HVM_CPU
from xenaltp2m.abi.vm_event import SETTABLE_REGISTERS, encode_request
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.handles.base import Handle
from xenaltp2m.handles.vcpu import VcpuRegisterValues
from xenaltp2m.testing import Failing
from xenaltp2m.tools.breakpoints.hooks import Hit
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.symbols import Image, Symbol, Symbols
from xenaltp2m.tools.tracing import Trace
from xenaltp2m.types import PAGE_SIZE
from xenaltp2m.values.responses import RegisterValues

from .hooked import (
    INC_EAX,
    INC_ECX,
    NOP,
    RET,
    STEPS,
    WAYS,
    Hooked,
    Make,
    call,
    store_byte,
)
from .machinecode import (
    CODE,
    DATA,
    FOREVER,
    HALT,
    HANDLERS,
    HOLE,
    IDT,
    OTHER,
    PRESENT,
    STACK,
    TF,
    WRITABLE,
    Computer,
    elf,
    gate,
)

ONES = 0xFFFF_FFFF
DB, BP, GP = 1, 3, 13
NEXT = CODE + PAGE_SIZE
H = TypeVar("H", bound=Handle)


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda *args, **options: Hooked(*args, stack=stack, **options)


@WAYS
def test_each_execution_is_a_hit(make: Make, fast: bool, int3: bool) -> None:
    guest = make(INC_EAX * 3 + HALT, fast=fast, int3=int3, rax=0)
    hooks = [guest.breakpoints.insert(CODE + at, guest.note) for at in (0, 1, 2)]
    assert guest.go().halted
    assert guest.seen == [CODE, CODE + 1, CODE + 2]
    assert guest.register("rax") == 3
    assert [hook.hits for hook in hooks] == [1, 1, 1]


@WAYS
def test_the_page_reads_as_it_is(make: Make, fast: bool, int3: bool) -> None:
    load = b"\xa1" + CODE.to_bytes(4, "little")
    guest = make(load + HALT, fast=fast, int3=int3)
    guest.breakpoints.insert(CODE, guest.note)
    assert guest.go().halted
    assert guest.register("rax") == int.from_bytes((load + HALT)[:4], "little")
    assert guest.seen == [CODE]


@WAYS
def test_code_that_is_written_is_executed(make: Make, fast: bool, int3: bool) -> None:
    """By an instruction with a breakpoint, and by one without."""
    there = CODE + 0x100
    first = store_byte(there, INC_EAX[0])
    code = first + call(CODE + 7, there) + store_byte(there, INC_ECX[0]) + call(CODE + 19, there)
    guest = make((code + HALT).ljust(0x100, NOP) + NOP + RET, fast=fast, int3=int3, rax=0, rcx=0)
    for place in (CODE, there, there + 1):
        guest.breakpoints.insert(place, guest.note)
    assert guest.go().halted
    assert (guest.register("rax"), guest.register("rcx")) == (1, 1)
    assert guest.seen == [CODE, there, there + 1, there, there + 1]
    assert guest.read(there, 2) == INC_ECX + RET


@WAYS
@pytest.mark.parametrize("distance", [1, 14, 15])
def test_writes_that_may_move_instructions(
    make: Make, fast: bool, int3: bool, distance: int
) -> None:
    """Up to 14 bytes before a breakpoint: there int3 would be within an instruction, maybe."""
    there = CODE + 0x100
    hook = there + distance
    code = store_byte(there, 0xB0) + call(CODE + 7, there)  # mov $imm, %al: one byte longer
    code += store_byte(there, NOP[0]) + call(CODE + 19, there) + HALT
    routine = NOP * (distance + 4) + RET
    guest = make(code.ljust(0x100, NOP) + routine, fast=fast, int3=int3, rax=0)
    guest.breakpoints.insert(hook, guest.note)
    assert guest.go().halted
    # With the long instruction the place is none where one begins, if it is the next.
    assert guest.seen == [hook] * (1 if distance == 1 else 2)
    assert guest.register("rax") == NOP[0]


@WAYS
@pytest.mark.parametrize("first", [NEXT - 3, NEXT - 2, NEXT - 1])
def test_a_write_into_two_pages_with_breakpoints(
    make: Make, fast: bool, int3: bool, first: int
) -> None:
    """The second, of which Xen tells nothing, is executed as it was written, too."""
    store = b"\xc7\x05" + first.to_bytes(4, "little") + (INC_ECX * 4)
    code = call(CODE, NEXT) + store + call(CODE + 15, NEXT) + HALT
    routine = NOP * 4 + RET
    guest = make((code.ljust(NEXT - CODE, NOP)) + routine, fast=fast, int3=int3, rcx=0)
    for place in (CODE, NEXT + 4):
        guest.breakpoints.insert(place, guest.note)
    assert guest.go().halted
    assert guest.seen == [CODE, NEXT + 4, NEXT + 4]
    assert guest.read(first, 4) == INC_ECX * 4
    assert guest.register("rcx") == first + 4 - NEXT


@WAYS
@pytest.mark.parametrize("before", [0, 1], ids=["at the place", "behind it"])
def test_an_int3_of_the_guests_own(make: Make, fast: bool, int3: bool, before: int) -> None:
    guest = make(NOP * before + b"\xcc" + HALT, fast=fast, int3=int3)
    guest.breakpoints.insert(CODE, guest.note)
    guest.go()
    assert guest.computer.vector == BP
    assert guest.seen == [CODE]
    assert guest.computer.words(guest.register("rsp"), 1) == [CODE + before + 1]


@WAYS
@pytest.mark.parametrize("place", [CODE, CODE + 0x100, OTHER], ids=["there", "beside", "elsewhere"])
@pytest.mark.parametrize("prefix", [b"\xf3", b"\x66\x66"])
def test_an_int3_of_the_guests_own_with_prefixes(
    make: Make, fast: bool, int3: bool, place: int, prefix: bytes
) -> None:
    """Wherever breakpoints are: it comes to its handler, and not again and again."""
    guest = make(prefix + b"\xcc" + HALT, fast=fast, int3=int3)
    guest.breakpoints.insert(place, guest.note)
    guest.go()
    assert guest.computer.vector == BP
    assert guest.seen == [CODE] * (place == CODE)
    assert guest.computer.words(guest.register("rsp"), 1) == [CODE + len(prefix) + 1]


@WAYS
def test_code_that_goes_on_into_a_page_with_a_breakpoint_at_its_start(
    make: Make, fast: bool, int3: bool
) -> None:
    """While code elsewhere changes, so that nothing is remembered of either page."""
    first = NEXT - 2
    jump = b"\xe9" + (first - CODE - 5).to_bytes(4, "little")
    loop = NOP * 3 + b"\xe2\xfb"
    guest = make(jump.ljust(first - CODE, NOP) + loop + HALT, fast=fast, int3=int3, rcx=4)

    def change(hit: Hit) -> None:
        guest.note(hit)
        guest.dom.memory.write(CODE + 0x800, bytes([len(guest.seen)]))

    guest.breakpoints.insert(first, change)
    guest.breakpoints.insert(NEXT, guest.note)
    assert guest.go().halted
    assert guest.seen == [first, NEXT] * 4


@WAYS
def test_single_steps_of_the_guests_own(make: Make, fast: bool, int3: bool) -> None:
    """Each instruction's, also of the last before a page with breakpoints: NOP, JMP, NOP."""
    set_tf = b"\x9c\x81\x0c\x24" + TF.to_bytes(4, "little") + b"\x9d"
    jump = b"\xe9" + (OTHER - CODE - len(set_tf) - 6).to_bytes(4, "little")
    handler = OTHER + 0x80
    count = b"\xff\x05" + DATA.to_bytes(4, "little") + b"\xcf"  # incl, iret
    other = (NOP + HALT).ljust(0x80, NOP) + count
    guest = make(set_tf + NOP + jump, {OTHER: other}, fast=fast, int3=int3)
    guest.computer.write(IDT + 8 * DB, gate(handler, wide=False))
    guest.breakpoints.insert(OTHER, guest.note)
    guest.go()
    assert guest.read(DATA, 1) == b"\3"
    assert guest.seen == [OTHER]


@STEPS
def test_shadows_are_not_there(make: Make, fast: bool) -> None:
    """Read, written and read again, by instructions that are stepped over and by others."""
    first = make(HALT, fast=fast).dom.maximum_gfn + 1
    for gfn in (first, first + 1, first + 15):
        there = (gfn << 12).to_bytes(4, "little")
        load, store = b"\xa1" + there, b"\xa3" + there
        with ExitStack() as stack:
            other = Hooked(
                load + b"\x89\xc3" + b"\x31\xc0" + store + load + HALT, fast=fast, stack=stack
            )
            for place in (CODE, CODE + 9):
                other.breakpoints.insert(place, other.note)
            assert other.go().halted
            assert (other.register("rbx"), other.register("rax")) == (ONES, ONES)
            assert other.seen == [CODE, CODE + 9]


def test_a_shadow_cannot_be_executed(make: Make) -> None:
    guest = make(NOP + b"\xff\xe0" + HALT)
    guest.breakpoints.insert(CODE, guest.note)
    shadow = guest.breakpoints._session.guarded.pages[CODE >> 12].shadow_gfn
    guest.computer.set(rax=shadow << 12)
    guest.go()
    assert guest.computer.vector == GP


def test_several_at_a_place(make: Make) -> None:
    guest = make(INC_EAX + HALT, rax=0)
    order: list[str] = []
    first = guest.breakpoints.insert(CODE, lambda hit: order.append("first"))
    guest.breakpoints.insert(CODE, lambda hit: order.append("second"))
    gone = guest.breakpoints.insert(CODE, lambda hit: order.append("gone"))
    gone.remove()
    gone.remove()
    assert (first.inserted, gone.inserted) == (True, False)
    assert len(guest.breakpoints) == 2
    assert guest.go().halted
    assert order == ["first", "second"]
    assert guest.register("rax") == 1


@WAYS
def test_a_callback_removes_it(make: Make, fast: bool, int3: bool) -> None:
    loop = INC_EAX + b"\xe2\xfd"  # LOOP to its start
    guest = make(loop + HALT, fast=fast, int3=int3, rax=0, rcx=5)
    guest.breakpoints.insert(CODE, lambda hit: hit.breakpoint.remove())
    assert guest.go().halted
    assert guest.register("rax") == 5
    assert len(guest.breakpoints) == 0


@WAYS
def test_a_callback_inserts_one(make: Make, fast: bool, int3: bool) -> None:
    guest = make(INC_EAX + INC_EAX + HALT, fast=fast, int3=int3, rax=0)
    guest.breakpoints.insert(CODE, lambda hit: guest.breakpoints.insert(CODE + 1, guest.note))
    assert guest.go().halted
    assert guest.seen == [CODE + 1]
    assert guest.register("rax") == 2


@WAYS
def test_a_callback_that_fails_is_heard_of_and_the_guest_goes_on(
    make: Make, fast: bool, int3: bool
) -> None:
    guest = make(INC_EAX + HALT, fast=fast, int3=int3, rax=0)

    def fail(hit: Hit) -> None:
        raise RuntimeError(f"of {hit!r}")

    guest.breakpoints.insert(CODE, fail)
    guest.breakpoints.insert(CODE, guest.note)
    with pytest.raises(RuntimeError, match="of <Hit of <Breakpoint at 0x10000> by vCPU 0>"):
        guest.go()
    assert guest.go().halted
    assert guest.seen == [CODE]
    assert guest.register("rax") == 1


@WAYS
def test_registers_can_be_set(make: Make, fast: bool, int3: bool) -> None:
    guest = make(INC_EAX + INC_ECX + HALT, fast=fast, int3=int3, rax=0, rcx=0)
    guest.breakpoints.insert(CODE, lambda hit: hit.set_registers(rax=7))
    guest.breakpoints.insert(CODE + 1, lambda hit: hit.set_registers(rip=CODE + 2, rax=9))
    assert guest.go().halted
    assert (guest.register("rax"), guest.register("rcx")) == (9, 0)


def test_registers_are_checked(make: Make) -> None:
    guest = make(INC_EAX + HALT)
    guest.breakpoints.insert(
        CODE,
        lambda hit: hit.set_registers(nothing=7),  # type: ignore[call-arg]
    )
    with pytest.raises(xa.InvalidArgumentError, match="nothing"):
        guest.go()
    assert guest.go().halted


@WAYS
def test_closing_in_a_callback(make: Make, fast: bool, int3: bool) -> None:
    guest = make(INC_EAX + HALT, fast=fast, int3=int3, rax=0)
    guest.breakpoints.insert(CODE, lambda hit: guest.breakpoints.close())
    guest.go()
    guest.go()
    assert guest.halted
    assert guest.register("rax") == 1


@WAYS
def test_nothing_is_left(make: Make, fast: bool, int3: bool) -> None:
    with ExitStack() as stack:
        guest = Hooked(INC_EAX + FOREVER, fast=fast, int3=int3, stack=stack)
        before = guest.dom.info()
        memory = guest.read(0, 0x100000)
        for place in (CODE, CODE + 1, OTHER):
            guest.breakpoints.insert(place, guest.note)
        assert (guest.dom.info().pages > before.pages) is int3
        guest.breakpoints.close()
        assert guest.altp2m.views == ()
        assert set(guest.altp2m.vcpu_views().values()) == {0}
        after = guest.dom.info()
        assert (after.pages, after.max_pages) == (before.pages, before.max_pages)
        assert guest.read(0, 0x100000) == memory
        with pytest.raises(xa.ClosedError):
            guest.breakpoints.insert(CODE, guest.note)


@WAYS
def test_the_domain_is_destroyed(make: Make, fast: bool, int3: bool) -> None:
    guest = make(INC_EAX + FOREVER, fast=fast, int3=int3)
    guest.breakpoints.insert(CODE, guest.note)
    guest.host.destroy(guest.domid)
    guest.breakpoints.close()
    assert [what for what in guest.host.open_resources() if "mapping" in what] == [
        "mapping of 1 pages"  # the ring's
    ]
    guest.breakpoints.close()


@pytest.mark.parametrize("xen", [(4, 14), (4, 17)])
def test_what_is_told_before_the_end_is_no_breakpoint_of_the_guest(
    make: Make, xen: tuple[int, int]
) -> None:
    """A vCPU has come upon an int3 that is gone when it is answered."""
    guest = make(INC_EAX + HALT, rax=0, xen=xen)
    guest.breakpoints.insert(CODE, guest.note)
    events = guest.monitor.events(timeout=0.01)
    guest.host.steps_at_once = 100
    event = next(event for event in events if isinstance(event, xa.MemAccess))
    event.reply(guest.breakpoints(event) or xa.Response.resume())
    assert isinstance(next(events), xa.SoftwareBreakpoint)
    guest.breakpoints.close()
    for _ in events:
        pass
    assert guest.halted
    assert guest.seen == []
    assert guest.register("rax") == 1


def test_bad_places(make: Make) -> None:
    guest = make(HALT)
    with pytest.raises(xa.InvalidArgumentError):
        guest.breakpoints.insert(-1, guest.note)
    with pytest.raises(xa.InvalidArgumentError):
        guest.breakpoints.insert(1 << 60, guest.note)
    with pytest.raises(xa.XenError):
        guest.breakpoints.insert(0x4000_0000, guest.note)
    guest.breakpoints.insert(CODE, guest.note)
    shadow = guest.breakpoints._session.guarded.pages[CODE >> 12].shadow_gfn
    with pytest.raises(xa.InvalidArgumentError, match="is a shadow"):
        guest.breakpoints.insert(shadow << 12, guest.note)
    assert guest.go().halted


# Whatever fails.


ERRNOS = [EPERM, EINVAL, ENOMEM, EBUSY, ESRCH]
THERE = CODE + 0x100
SELF_MODIFYING = (
    (
        store_byte(THERE, INC_EAX[0])
        + call(CODE + 7, THERE)
        + store_byte(THERE, INC_ECX[0])
        + call(CODE + 19, THERE)
        + HALT
    ).ljust(0x100, NOP)
    + INC_EAX
    + RET
)


def work(host: Failing, fast: bool, int3: bool, domid: int, opened: list[Handle]) -> None:
    """Insert, hit, mirror, remove, shut down."""

    def opening(handle: H) -> H:
        opened.append(handle)
        return handle

    dom = opening(opening(xa.Xen(host)).domain(domid))
    altp2m, monitor = opening(dom.altp2m()), opening(dom.monitor())
    breakpoints = opening(Breakpoints(altp2m, monitor, fast=fast, int3=int3))
    first = breakpoints.insert(CODE, lambda hit: None)
    breakpoints.insert(CODE, lambda hit: None)
    breakpoints.insert(THERE, lambda hit: hit.breakpoint.remove())
    breakpoints.insert(OTHER, lambda hit: None)
    patch = breakpoints.patch(CODE, SELF_MODIFYING[:7])
    stack = breakpoints.watch(STACK - 4, 4, lambda touch: None, reads=True)
    breakpoints.watch(THERE, 1, after=lambda touch: touch.watchpoint.remove())
    host.steps_at_once = 200
    monitor.run(breakpoints, timeout=0.01)
    first.remove()
    patch.remove()
    stack.remove()
    for handle in reversed(opened[1:]):
        handle.close()


@WAYS
def test_nothing_is_left_whatever_fails(fast: bool, int3: bool) -> None:
    """The 1st, 2nd … last call to the hypervisor, each in one of the ways, with an errno or two."""
    calls, number, failures, tried = 1 << 30, 0, 0, 0
    step, first = (1, 1) if THOROUGH else (3, 1 + (not fast) + 2 * (not int3))
    while number <= calls:
        host = Failing(memory_pages=1 << 13)
        computer = Computer(SELF_MODIFYING, host=host)
        computer.set(rax=0, rcx=0)
        computer.describe()
        before = host.domain_getinfolist(computer.domid, 1)[0]
        opened: list[Handle] = []
        host.start({number: ERRNOS[number % len(ERRNOS)]})
        try:
            work(host, fast, int3, computer.domid, opened)
        except xa.XenError:
            failures += 1
        if not number:
            calls = host.made
        host.start({})
        for handle in reversed(opened[1:]):
            handle.close()  # some again
        opened[0].abandon()
        host.run(computer.domid, 1000)  # to the end, if it has not come there
        assert computer.vector is None, number
        assert (computer.register("rax"), computer.register("rcx")) == (1, 1), number
        assert not any(vcpu.event_pauses for vcpu in computer.vcpus), number
        after = host.domain_getinfolist(computer.domid, 1)[0]
        assert after.max_pages == before.max_pages, number
        ring = 1  # the ring's page, which Xen takes from the guest for good
        assert after.pages in (before.pages, before.pages - ring), number
        assert not host.altp2m_get_domain_state(computer.domid), number
        assert not host._mappings, number
        number += step if number else first
        tried += 1
    assert tried >= calls // step
    assert failures > tried // 2


REVERT = (1 << 64) - 1
"""The new gfn of a remap that is none (``p2m_change_altp2m_gfn``)."""


def refuse(
    guest: Hooked, monkeypatch: pytest.MonkeyPatch, op: str, which: Callable[..., bool]
) -> None:
    """Refuse some calls from now on."""
    make_call = getattr(guest.host, op)

    def refusing(*arguments: Any) -> Any:
        if which(*arguments):
            guest.host.fail(op, 1, EPERM)
        return make_call(*arguments)

    monkeypatch.setattr(guest.host, op, refusing)


@pytest.mark.parametrize("patched", [False, True], ids=["breakpoint", "patch"])
@pytest.mark.parametrize("inserting", [False, True], ids=["removed", "inserted"])
def test_fault_28_a_shadow_that_is_shown_is_not_given_back(
    make: Make, monkeypatch: pytest.MonkeyPatch, patched: bool, inserting: bool
) -> None:
    """The page that cannot be shown again stays closed, and no other page gets its shadow."""
    guest = make(call(CODE, OTHER) + HALT, {OTHER: RET})
    breakpoints, gfn = guest.breakpoints, OTHER >> 12
    hooks = int(breakpoints.hooks.id)
    breakpoints.insert(CODE, guest.note)  # now there are shadows

    def put() -> Any:
        return breakpoints.patch(OTHER, RET) if patched else breakpoints.insert(OTHER, guest.note)

    def shows(_: int, view: int, old: int, new: int) -> bool:
        is_hiding = inserting and old != gfn and new != REVERT
        return view == hooks and (is_hiding or (old == gfn and new == REVERT))

    undo = put if inserting else put().remove
    with monkeypatch.context() as patching:
        refuse(guest, patching, "altp2m_change_gfn", shows)
        with pytest.raises(xa.LeftoverError):
            undo()
    breakpoints.insert(DATA, guest.note)
    table = guest.computer.model.views[hooks].table
    other, data = table.lookup(gfn), table.lookup(DATA >> 12)
    assert other.mfn != data.mfn
    assert other.access == 0
    assert guest.go().halted
    breakpoints.close()


@pytest.mark.parametrize("fast", [True, False])
def test_fault_28_shadows_that_cannot_be_hidden_cannot_be_touched(fast: bool) -> None:
    """Else a guest that looks would find them; or they are taken back at once."""
    calls, number = 1 << 30, 0
    step, first = (1, 1) if THOROUGH else (2, 1 + fast)
    while number <= calls:
        with ExitStack() as stack:
            host = Failing(memory_pages=1 << 13)
            computer = Computer(call(CODE, OTHER) + HALT, {OTHER: RET}, host=host)
            xen = stack.enter_context(xa.connect(host))
            dom = stack.enter_context(xen.domain(computer.domid))
            altp2m = stack.enter_context(dom.altp2m())
            monitor = stack.enter_context(dom.monitor())
            breakpoints = stack.enter_context(Breakpoints(altp2m, monitor, fast=fast))
            before = dom.info().pages
            host.start({number: EPERM})
            with suppress(xa.XenError):
                breakpoints.insert(OTHER, lambda hit: None)
            if not number:
                calls = host.made
            failed = host.failed
            host.start({})
            number += step if number else first
            shadows, pages = breakpoints._session.shadows._memory, dom.info().pages - before
            assert pages == len(shadows), (number, failed)
            rights = {
                view.access(gfn) for view in breakpoints._session.views.every for gfn in shadows
            }
            assert rights <= {xa.Access.N, xa.Access.R}, (number, failed)
            breakpoints.insert(OTHER, lambda hit: None)
            altp2m.verify()
    assert calls > 20


@WAYS
def test_fault_28_what_fails_in_an_event_fails_once(fast: bool, int3: bool) -> None:
    """The 1st, 2nd … last call while the guest runs; the guest goes on, and notices nothing."""
    calls, number = 1 << 30, 0
    while number <= calls:
        with ExitStack() as stack:
            host = Failing(memory_pages=1 << 13)
            computer = Computer(SELF_MODIFYING, host=host)
            computer.set(rax=0, rcx=0)
            computer.describe()
            xen = stack.enter_context(xa.connect(host))
            dom = stack.enter_context(xen.domain(computer.domid))
            altp2m = stack.enter_context(dom.altp2m())
            monitor = stack.enter_context(dom.monitor())
            breakpoints = stack.enter_context(Breakpoints(altp2m, monitor, fast=fast, int3=int3))
            for place in (CODE, THERE):
                breakpoints.insert(place, lambda hit: None)
            breakpoints.patch(CODE + 7, SELF_MODIFYING[7:12])
            breakpoints.watch(THERE, 1, after=lambda touch: None)
            host.start({number: EPERM})
            host.steps_at_once = 200
            for _ in range(4):
                with suppress(xa.XenError):
                    monitor.run(breakpoints, timeout=0.01, seconds=5)
            if not number:
                calls = host.made
            failed = host.failed
            host.start({})
            number += 1
            if any(op.startswith("evtchn") for op in failed):
                continue  # the event channel's own file
            assert dom.info().shutdown, (number, failed)
            assert computer.vector is None, number
            assert (computer.register("rax"), computer.register("rcx")) == (1, 1), number
    assert calls > 20


@pytest.mark.parametrize("closing", ["breakpoints", "monitor"])
def test_fault_28_int3_is_heard_of_until_vcpus_have_left(
    make: Make, monkeypatch: pytest.MonkeyPatch, closing: str
) -> None:
    """Else the guest's handler would get it."""
    guest = make(INC_EAX + b"\xeb\xfd")
    guest.breakpoints.insert(CODE, guest.note)
    guest.host.run(guest.domid, 1000)
    monitor = guest.host._monitors[guest.domid]
    with monkeypatch.context() as patching:
        for op in ("altp2m_switch_to_view", "altp2m_destroy_view"):
            refuse(guest, patching, op, lambda *_: True)
        with pytest.raises(xa.LeftoverError):
            getattr(guest, closing).close()
        assert guest.computer.vcpu.view == int(guest.breakpoints.hooks.id)
        assert "software_breakpoint" in monitor.switches
    getattr(guest, closing).close()
    assert "software_breakpoint" not in monitor.switches


@STEPS
def test_code_that_is_written_by_an_instruction_with_a_breakpoint(make: Make, fast: bool) -> None:
    """In the page that it is in; and executed where there is none."""
    there = CODE + 0x100
    code = NOP + store_byte(there, INC_EAX[0]) + call(CODE + 8, there) + HALT
    guest = make(code.ljust(0x100, NOP) + NOP + RET, fast=fast, rax=0)
    for place in (CODE, CODE + 1):
        guest.breakpoints.insert(place, guest.note)
    assert guest.go().halted
    assert guest.register("rax") == 1
    assert guest.seen == [CODE, CODE + 1]


@STEPS
def test_a_page_is_not_copied_while_another_vcpu_writes_to_it(fast: bool) -> None:
    """It was let do so, and has not run yet, when the next vCPU wants to execute the page."""
    there = CODE + 0x100
    code = call(CODE, there) + b"\xeb\xfe"
    writer = store_byte(there, INC_EAX[0]) + b"\xeb\xfe"
    host = MockBackend(memory_pages=1 << 13)
    computer = Computer(code.ljust(0x100, NOP) + NOP + RET, {OTHER: writer}, host=host, vcpus=2)
    computer.set(rip=OTHER, rsp=STACK, rax=0)
    reader = computer.vcpus[1]
    reader.context[:] = computer.vcpu.context
    reader.set_register("rip", CODE)
    reader.set_register("rsp", STACK - 0x100)
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        Breakpoints(altp2m, monitor, fast=fast) as breakpoints,
    ):
        hook = breakpoints.insert(CODE, lambda hit: None)
        host.run(computer.domid, 10_000)
        reader.initialised = reader.online = True
        host.run(computer.domid, 10_000)
        host.steps_at_once = 20_000
        told: list[tuple[str, int]] = []

        def look(event: xa.Event) -> xa.Response | None:
            told.append((type(event).__name__, int(event.vcpu)))
            return breakpoints(event)

        monitor.run(look, timeout=0.01)
        host.steps_at_once = 0
        assert told[:2] == [("MemAccess", 0), ("MemAccess", 1)]
        assert hook.hits == 1
        assert reader.register("rax") == 1


def test_nothing_keeps_those_that_are_closed(make: Make) -> None:
    guest = make(INC_EAX * 3 + HALT)
    closed = []
    for _ in range(3):
        guest.breakpoints.insert(CODE, guest.note)
        guest.breakpoints.close()
        closed.append(weakref.ref(guest.breakpoints))
        guest.breakpoints = Breakpoints(guest.altp2m, guest.monitor)
    gc.collect()
    assert [one() for one in closed[1:]] == [None, None]  # the first is the fixture's
    guest.breakpoints.insert(CODE + 1, guest.note)
    assert guest.go().halted
    assert guest.seen == [CODE + 1]
    guest.breakpoints.close()


@WAYS
def test_closing_the_connection_closes_them(
    monkeypatch: pytest.MonkeyPatch, fast: bool, int3: bool
) -> None:
    host = MockBackend(memory_pages=1 << 13)
    computer = Computer(INC_EAX + FOREVER, host=host)
    before = host.domain_getinfolist(computer.domid, 1)[0]
    monkeypatch.setattr(host, "close", lambda: None)
    xen = xa.connect(host)
    dom = xen.domain(computer.domid)
    breakpoints = Breakpoints(dom.altp2m(), dom.monitor(), fast=fast, int3=int3)
    breakpoints.insert(CODE, lambda hit: None)
    xen.close()
    assert breakpoints.closed
    after = host.domain_getinfolist(computer.domid, 1)[0]
    assert (after.pages, after.max_pages) == (before.pages - 1, before.max_pages)  # the ring's


@WAYS
def test_altp2m_is_switched_off_and_views_get_other_numbers(
    make: Make, fast: bool, int3: bool
) -> None:
    """One that was made before them is gone: so they move up."""
    guest = make(INC_EAX + b"\xe2\xfd" + HALT, fast=fast, int3=int3, rax=0, rcx=12)  # LOOP
    guest.breakpoints.close()
    first = guest.altp2m.create_view()
    breakpoints = Breakpoints(guest.altp2m, guest.monitor, fast=fast, int3=int3)

    def count(hit: Hit) -> None:
        guest.note(hit)
        if len(guest.seen) == 6:
            guest.monitor.stop()

    breakpoints.insert(CODE, count)
    guest.host.steps_at_once = 200
    guest.monitor.run(breakpoints, timeout=0.01)
    number = breakpoints.hooks.id
    first.close()
    guest.host.altp2m_set_domain_state(guest.domid, False)
    assert breakpoints.verify() == [CODE >> 12]
    assert breakpoints.hooks.id < number
    assert breakpoints.verify() == []
    guest.monitor.run(breakpoints, timeout=0.01)
    assert guest.halted
    assert (len(guest.seen), guest.register("rax")) == (12, 12)
    breakpoints.close()


@pytest.mark.timeout(60)
@WAYS
def test_a_fetch_that_was_allowed_tells_of_what_is_lost(make: Make, fast: bool, int3: bool) -> None:
    """Nobody has asked: the guest cannot go on otherwise."""
    guest = make(INC_EAX + b"\xe2\xfd" + HALT, fast=fast, int3=int3, rax=0, rcx=12)  # LOOP
    told: list[xa.ViewReset] = []
    guest.altp2m.on_view_reset(told.append)

    def restrict(hit: Hit) -> None:
        guest.note(hit)
        if len(guest.seen) == 4:  # somebody takes X from the host p2m, and so from all views
            guest.host.altp2m_set_mem_access(guest.domid, 0, CODE >> 12, 3)

    guest.breakpoints.insert(CODE, restrict)
    assert guest.go().halted
    assert all(lost.reapplied for lost in told)
    assert {lost.view for lost in told} >= ({guest.breakpoints.hooks} if int3 else set())
    assert (len(guest.seen), guest.register("rax")) == (12, 12)


@pytest.mark.timeout(60)
@STEPS
def test_a_fetch_of_a_shadow_that_was_allowed_tells_of_what_is_lost(make: Make, fast: bool) -> None:
    guest = make(NOP + INC_EAX + b"\xe2\xfd" + HALT, fast=fast, rax=0, rcx=12)  # LOOP
    told: list[xa.ViewReset] = []
    guest.altp2m.on_view_reset(told.append)

    def restrict(hit: Hit) -> None:
        hit.breakpoint.remove()  # so that its instruction is executed in the shadow
        guest.host.altp2m_set_mem_access(guest.domid, 0, CODE >> 12, 3)

    guest.breakpoints.insert(CODE, restrict)
    guest.breakpoints.insert(CODE + 1, guest.note)
    assert guest.go().halted
    assert guest.breakpoints.hooks in {lost.view for lost in told if lost.reapplied}
    assert (len(guest.seen), guest.register("rax")) == (12, 12)


@pytest.mark.timeout(60)
@STEPS
def test_a_write_that_was_allowed_is_allowed_again(make: Make, fast: bool) -> None:
    """The view in which a guest may write to a page with breakpoints has nothing of its own."""
    there = CODE + 0x100
    guest = make(INC_EAX + store_byte(there, 0x5A) + HALT, fast=fast, rax=0)

    def restrict(hit: Hit) -> None:
        guest.note(hit)
        guest.host.altp2m_set_mem_access(guest.domid, 0, CODE >> 12, 5)

    guest.breakpoints.insert(CODE, restrict)
    assert guest.go().halted
    assert (guest.seen, guest.register("rax")) == ([CODE], 1)
    assert guest.read(there, 1) == b"\x5a"


def test_a_view_that_is_reset_while_a_page_is_gone(make: Make) -> None:
    """The other page is guarded all the same: what is written to it does not go to its shadow."""
    there = CODE + 0x100
    code = NOP + store_byte(there, 0x5A) + b"\xa0" + there.to_bytes(4, "little") + HALT
    guest = make(code, {OTHER: HALT}, rax=0)
    guest.breakpoints.insert(CODE, guest.note)
    gone = guest.breakpoints.insert(OTHER, guest.note)
    guest.host.domain_decrease_reservation_exact(guest.domid, array("Q", [OTHER >> 12]))
    guest.host.altp2m_set_mem_access(guest.domid, 0, CODE >> 12, 7)
    with pytest.raises(xa.XenError):
        guest.breakpoints.verify()
    assert guest.go().halted
    assert guest.seen == [CODE]
    assert guest.read(there, 1) == b"\x5a"
    assert guest.register("rax") == 0x5A
    gone.remove()
    assert guest.breakpoints.verify() == []


def test_they_are_told_though_somebody_else_fails(make: Make) -> None:
    """Of a reset, in which the guest has written to a page whose shadow is planted."""
    there = CODE + 0x100
    jump = b"\xe9" + (there - CODE - 6).to_bytes(4, "little")
    guest = make(NOP + jump + bytes(0xFA) + INC_EAX + HALT, rax=0, rcx=0)

    def fail(_: xa.ViewReset) -> None:
        raise KeyError

    def reset(_: Hit) -> None:
        guest.dom.memory.write(there, INC_ECX)
        guest.host.altp2m_set_mem_access(guest.domid, 0, CODE >> 12, 7)
        with pytest.raises(KeyError):
            guest.breakpoints.verify()

    guest.altp2m._resets._callbacks.insert(0, fail)
    guest.breakpoints.insert(CODE, reset)
    assert guest.go().halted
    assert (guest.register("rax"), guest.register("rcx")) == (0, 1)


# Code in a segment that does not begin at 0.

BASE = CODE + 0x18
CODE_32, CODE_64, EFER_LMA = 0xC9B, 0xA9B, 1 << 10


def told_of_int3(guest: Hooked, gfn: int, *, length: int = 1, **registers: int) -> xa.Event:
    """An event as Xen sends it: the simulator has no code segments with a base of their own."""
    fields = {"software_breakpoint.gfn": gfn, "software_breakpoint.insn_length": length}
    return told(guest, xa.Reason.SOFTWARE_BREAKPOINT, fields, registers)


def told(
    guest: Hooked,
    reason: xa.Reason,
    fields: dict[str, int],
    registers: dict[str, int],
    vcpu: int = 0,
    view: xa.View | None = None,
) -> xa.Event:
    raw = encode_request(
        7,
        reason,
        vcpu,
        flags=xa.Flag.VCPU_PAUSED | xa.Flag.ALTERNATE_P2M,
        view=int((view or guest.breakpoints.hooks).id),
        fields=fields,
        registers={"cs": CODE_32 << 20 | 0xFFFFF} | registers,
    )
    return xa.Event.of(raw)


def test_fault_02_a_breakpoint_in_a_code_segment_with_a_base(make: Make) -> None:
    guest = make(NOP * 0x100 + HALT)
    guest.breakpoints.insert(BASE + 8, guest.note)
    event = told_of_int3(guest, CODE >> 12, rip=8, cs_base=BASE)
    answer = guest.breakpoints(event)
    assert guest.seen == [8]
    assert answer is not None
    assert answer.action is xa.Action.FAST_SINGLESTEP


def test_fault_02_a_fetch_in_a_code_segment_with_a_base(make: Make) -> None:
    guest = make(NOP * 0x100 + HALT, int3=False)
    guest.breakpoints.insert(BASE + 8, guest.note)
    fields = {
        "mem_access.gfn": CODE >> 12,
        "mem_access.offset": (BASE + 8) & 0xFFF,
        "mem_access.gla": BASE + 8,
        "mem_access.flags": int(xa.AccessFlag.X),
    }
    guest.breakpoints(told(guest, xa.Reason.MEM_ACCESS, fields, {"rip": 8, "cs_base": BASE}))
    assert guest.seen == [8]


@pytest.mark.parametrize("hooked", [False, True], ids=["no breakpoint", "a breakpoint beside"])
def test_fault_02_an_int3_of_the_guests_own_in_a_code_segment_with_a_base(
    make: Make, hooked: bool
) -> None:
    """Its own handler gets it; answered otherwise it would come again for ever."""
    guest = make(NOP * (BASE + 8 - CODE) + b"\xcc" + HALT)
    if hooked:
        guest.breakpoints.insert(CODE + 8, guest.note)
    event = told_of_int3(guest, CODE >> 12, rip=8, cs_base=BASE)
    assert guest.breakpoints(event) == xa.Response.reinject()
    assert guest.seen == []


@pytest.mark.parametrize(
    ("code", "base", "rip"),
    [(CODE_64, 0x3000, CODE + 8), (CODE_32, 0xFFFF_F000, CODE + 0x1008)],
    ids=["64-bit code ignores it", "the sum wraps at 4 GiB"],
)
def test_fault_02_where_xen_names_another_page(make: Make, code: int, base: int, rip: int) -> None:
    """``gfn_of_rip`` adds base and rip in any mode, and does not cut the sum to 32 bits."""
    guest = make(NOP * 0x100 + HALT)
    guest.computer.go_long()
    guest.breakpoints.insert(CODE + 8, guest.note)
    registers = {name: guest.register(name) for name in ("cr0", "cr3", "cr4")}
    registers |= {"msr_efer": EFER_LMA, "cs": code << 20 | 0xFFFFF, "cs_base": base, "rip": rip}
    told_gfn = (base + rip) >> 12 if code == CODE_64 else (1 << 64) - 1
    guest.breakpoints(told_of_int3(guest, told_gfn, **registers))
    assert guest.seen == [rip]


# Instructions that begin in the page before a breakpoint's.

MOV_EAX = 0xB8
FUNCTION = b"\x40\x41\x42\x43" + RET  # inc eax, ecx, edx, ebx: an operand of mov $…, %eax
OPERAND = 0x43424140


def changing_the_page_before(last: int, function: int) -> bytes:
    """Call a function, change the last byte before it, execute from there; and change it back."""
    code = b""
    parts: list[Callable[[int], bytes]] = [
        lambda at: call(at, function),
        lambda at: store_byte(last, MOV_EAX),
        lambda at: call(at, last),
        lambda at: b"\xa3" + DATA.to_bytes(4, "little"),  # mov %eax, (DATA)
        lambda at: store_byte(last, NOP[0]),
        lambda at: call(at, function),
    ]
    for part in parts:
        code += part(CODE + len(code))
    return code + HALT


@WAYS
@pytest.mark.parametrize("offset", [0, 3])
def test_fault_03_a_write_to_the_page_before(
    make: Make, fast: bool, int3: bool, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The int3 would be an operand: no breakpoint is where an instruction then begins."""
    code = changing_the_page_before(NEXT - 1, NEXT).ljust(PAGE_SIZE, NOP) + FUNCTION
    guest = make(code, fast=fast, int3=int3, rax=0)
    guest.breakpoints.insert(NEXT + offset, guest.note)
    assert guest.go().halted
    assert guest.read(DATA, 4) == OPERAND.to_bytes(4, "little")
    assert guest.seen == [NEXT + offset] * 2
    assert guest.read(NEXT - 1, 6) == NOP + FUNCTION
    assert guest.breakpoints._session.guarded.pages[NEXT >> 12].armed is int3  # it is as it was
    assert not caplog.messages


@STEPS
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with a breakpoint there"])
def test_fault_03_a_page_that_is_before_by_the_page_tables_only(
    make: Make, fast: bool, beside: bool
) -> None:
    """Two frames that lie apart are mapped side by side, which the breakpoints cannot know yet."""
    apart = OTHER + 8 * PAGE_SIZE
    code = changing_the_page_before(NEXT - 1, NEXT).ljust(PAGE_SIZE, NOP)
    guest = make(code, {apart: FUNCTION}, fast=fast, rax=0)
    guest.computer.go_long()
    guest.computer.set(cs_arbytes=CODE_32)  # compatibility mode
    guest.computer.map(NEXT, apart | PRESENT | WRITABLE)
    guest.breakpoints.insert(apart, guest.note)
    if beside:
        guest.breakpoints.insert(CODE, guest.note)
    assert guest.go().halted
    assert guest.read(DATA, 4) == OPERAND.to_bytes(4, "little")
    assert guest.seen == [CODE] * beside + [NEXT] * 2
    guest.dom.memory.write(apart - 1, b"\x5a")  # the physical one is left alone


@STEPS
def test_fault_03_a_breakpoint_within_an_instruction_of_the_page_before(
    make: Make, fast: bool
) -> None:
    """It was so at first: what is executed first shows it."""
    jump = b"\xe9" + (NEXT - 1 - CODE - 5).to_bytes(4, "little")
    code = jump.ljust(PAGE_SIZE - 1, NOP) + bytes([MOV_EAX]) + FUNCTION[:4] + HALT
    guest = make(code, fast=fast, rax=0)
    guest.breakpoints.insert(NEXT, guest.note)
    assert guest.go().halted
    assert guest.register("rax") == OPERAND
    assert guest.seen == []


@WAYS
def test_fault_03_writes_elsewhere_in_the_page_before(make: Make, fast: bool, int3: bool) -> None:
    """They go where they should, and cost a hit nothing but time."""
    code = b"".join(store_byte(NEXT - 0x100 + at, at) for at in range(4))
    code += call(CODE + len(code), NEXT) + HALT
    guest = make(code.ljust(PAGE_SIZE, NOP) + FUNCTION, fast=fast, int3=int3)
    hook = guest.breakpoints.insert(NEXT, guest.note)
    assert guest.go().halted
    assert guest.read(NEXT - 0x100, 4) == bytes(range(4))
    assert guest.seen == [NEXT]
    before = guest.breakpoints.hooks.access(CODE >> 12)
    assert before == (xa.Access.RX if int3 else xa.Access.RWX)
    hook.remove()
    assert guest.breakpoints.hooks.access(CODE >> 12) == xa.Access.RWX


def test_fault_03_pages_before_are_made_again(make: Make) -> None:
    """After a breakpoint in one is removed, and after Xen has reset the view."""
    code = changing_the_page_before(NEXT - 1, NEXT).ljust(PAGE_SIZE, NOP) + FUNCTION
    guest = make(code, rax=0)
    guest.breakpoints.insert(NEXT, guest.note)
    beside = guest.breakpoints.insert(CODE, guest.note)
    beside.remove()
    assert guest.breakpoints.hooks.access(CODE >> 12) == xa.Access.RX
    guest.host.altp2m_set_mem_access(guest.domid, 0, CODE >> 12, 7)
    assert guest.breakpoints.verify() == [NEXT >> 12]
    assert guest.breakpoints.hooks.effective_access(CODE >> 12) == xa.Access.RX
    assert guest.go().halted
    assert guest.read(DATA, 4) == OPERAND.to_bytes(4, "little")
    assert guest.seen == [NEXT] * 2


@STEPS
@pytest.mark.parametrize("before", [0, HOLE | PRESENT], ids=["not mapped", "no memory"])
def test_fault_03_nothing_is_before_by_the_page_tables(make: Make, fast: bool, before: int) -> None:
    """As a hostile guest has it, for whom that must not end the agent."""
    guest = make(call(CODE, OTHER) + HALT, {OTHER: INC_EAX + RET}, fast=fast, rax=0)
    guest.computer.go_long()
    guest.computer.set(cs_arbytes=CODE_32)
    guest.computer.map(OTHER - PAGE_SIZE, before)
    guest.breakpoints.insert(OTHER, guest.note)
    assert guest.go().halted
    assert guest.seen == [OTHER]
    assert guest.register("rax") == 1


def test_fault_03_nothing_is_before_the_first_page(make: Make) -> None:
    guest = make(b"\xe9" + (-CODE - 5 & ONES).to_bytes(4, "little"), {0: NOP + HALT})
    guest.breakpoints.insert(0, guest.note)
    assert guest.go().halted
    assert guest.seen == [0]


# Repeated string instructions.

REP_STOSB, REPNE_SCASB = b"\xf3\xaa", b"\xf2\xae"
TIMER = 0x20


def move(register: int, value: int) -> bytes:
    return bytes([0xB8 + register]) + value.to_bytes(4, "little")


def fill(at: int, count: int) -> bytes:
    """mov $at, %edi; mov $count, %ecx; rep stosb."""
    return move(7, at) + move(1, count) + REP_STOSB


FILL = len(fill(0, 0)) - len(REP_STOSB)
"""Where its REP STOSB is."""


@WAYS
@pytest.mark.parametrize("each", [False, True], ids=["executions", "iterations"])
def test_fault_11_a_repeated_instruction(make: Make, fast: bool, int3: bool, each: bool) -> None:
    guest = make(fill(DATA, 10) + HALT, fast=fast, int3=int3, rax=0x5A)
    hook = guest.breakpoints.insert(CODE + FILL, guest.note, each_iteration=each)
    behind = guest.breakpoints.insert(CODE + FILL + 2, guest.note)
    assert guest.go().halted
    assert guest.read(DATA, 11) == b"\x5a" * 10 + b"\0"
    assert (hook.hits, behind.hits) == (10 if each else 1, 1)


@WAYS
@pytest.mark.parametrize("count", [0, 1, 3])
def test_fault_11_executions_that_begin_alike_are_several(
    make: Make, fast: bool, int3: bool, count: int
) -> None:
    """The same registers and the same stack: only the end of each step tells them apart."""
    loop = fill(DATA, count) + b"\x4b\x75" + bytes([256 - FILL - 5])  # dec %ebx; jnz
    guest = make(loop + HALT, fast=fast, int3=int3, rbx=4)
    hook = guest.breakpoints.insert(CODE + FILL, guest.note)
    both = guest.breakpoints.insert(CODE + FILL, guest.note, each_iteration=True)
    assert guest.go().halted
    assert hook.hits == 4
    assert both.hits == 4 * max(count, 1)


@WAYS
def test_fault_11_a_search_that_goes_on_where_it_found(make: Make, fast: bool, int3: bool) -> None:
    """REPNE ends early; the next execution begins with the registers the last one ended with."""
    loop = REPNE_SCASB + b"\x75\x03\x43\xeb\xf9"  # jne: end; inc %ebx; jmp: search
    guest = make(
        loop + HALT,
        {DATA: b"..a.aa..."},
        fast=fast,
        int3=int3,
        rax=ord("a"),
        rbx=0,
        rcx=9,
        rdi=DATA,
    )
    hook = guest.breakpoints.insert(CODE, guest.note)
    assert guest.go().halted
    assert guest.register("rbx") == 3
    assert hook.hits == 4


@WAYS
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "its handler does the same"])
def test_fault_11_an_interrupt_between_iterations(
    make: Make, fast: bool, int3: bool, nested: bool
) -> None:
    handler = CODE + 0x100
    routine = CODE + 0x200
    saving = b"\x60" + (move(7, OTHER) + move(1, 3) + call(handler + 11, routine)) * nested
    handling = saving + b"\x61\xcf"  # pusha … popa; iret
    code = move(7, DATA) + move(1, 10) + call(CODE + 10, routine) + HALT
    code = code.ljust(0x100, NOP) + handling.ljust(0x100, NOP) + REP_STOSB + RET
    guest = make(code, fast=fast, int3=int3, rax=0x5A)
    guest.computer.write(IDT + 8 * TIMER, gate(handler, wide=False))

    def interrupt(hit: Hit) -> None:
        if hit.breakpoint.hits in (1, 4) and hit.registers.rdi < OTHER:
            kind = int(xa.TrapType.EXTERNAL_INTERRUPT)
            guest.host.hvm_inject_trap(guest.domid, 0, TIMER, kind, ONES, 0, 0)

    hook = guest.breakpoints.insert(routine, guest.note)
    each = guest.breakpoints.insert(routine, interrupt, each_iteration=True)
    handled = guest.breakpoints.insert(handler, guest.note)
    assert guest.go().halted
    assert guest.read(DATA, 11) == b"\x5a" * 10 + b"\0"
    assert guest.read(OTHER, 4) == (b"\x5a" * 3 * nested).ljust(4, b"\0")
    assert handled.hits >= 1
    assert hook.hits == 1 + handled.hits * nested
    assert each.hits >= 10 + 3 * handled.hits * nested


@pytest.mark.parametrize("ring", [0, 3])
def test_fault_11_another_vcpu_goes_on(make: Make, ring: int) -> None:
    """Threads move between iterations; what has other page tables in user mode is another."""
    guest = make(REP_STOSB + HALT)
    hook = guest.breakpoints.insert(CODE, guest.note)
    ss = (0xC93 | ring << 5) << 20
    at = {"cs": CODE_32 << 20, "ss": ss, "rip": CODE, "rsp": STACK, "cr3": 0x1000}

    def hit(vcpu: int, count: int, **registers: int) -> int:
        state = at | {"rcx": count, "rdi": DATA + 10 - count} | registers
        fields = {"software_breakpoint.gfn": CODE >> 12, "software_breakpoint.insn_length": 1}
        guest.breakpoints(told(guest, xa.Reason.SOFTWARE_BREAKPOINT, fields, state, vcpu))
        return hook.hits

    def stepped(vcpu: int, count: int, **registers: int) -> None:
        state = at | {"rcx": count, "rdi": DATA + 10 - count} | registers
        view = guest.breakpoints._session.views.step
        guest.breakpoints(told(guest, xa.Reason.SINGLESTEP, {}, state, vcpu, view))

    assert hit(0, 10) == 1
    stepped(0, 9, rip=HANDLERS, rsp=STACK - 0x1000)  # interrupted
    assert hit(0, 10) == 2  # another thread begins, on another vCPU
    stepped(0, 9)
    assert hit(1, 9, rsp=STACK - 64) == 3  # somebody else's stack
    stepped(1, 8, rsp=STACK - 64)
    assert hit(1, 9, cr3=0x2000) == (4 if ring else 3)
    assert hit(1, 9) == (4 if ring else 3)


@WAYS
def test_a_violation_in_somebody_else_s_view_is_not_answered(
    make: Make, fast: bool, int3: bool
) -> None:
    """Of a page with a breakpoint: its owner answers, here by moving the vCPU to ``hooks``."""
    guest = make(NOP * 2 + HALT, fast=fast, int3=int3)
    guest.breakpoints.insert(CODE + 1, guest.note)
    own = guest.altp2m.create_view()
    own.set_access(CODE >> 12, xa.Access.R)
    guest.altp2m.switch_to_view(own)
    answers: list[xa.Response | None] = []

    def answer(event: xa.Event) -> xa.Response:
        answers.append(guest.breakpoints(event))
        return answers[-1] or xa.Response.resume(guest.breakpoints.hooks)

    guest.host.steps_at_once = 200
    guest.monitor.run(answer, timeout=0.01)
    assert answers[0] is None
    assert guest.seen == [CODE + 1]
    assert guest.halted


# A breakpoint where no instruction begins.


@WAYS
def test_fault_04_a_breakpoint_behind_a_prefix(
    make: Make, fast: bool, int3: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A NOP with a prefix: the int3 has it, too, and is nobody's breakpoint."""
    guest = make(INC_EAX + b"\x66\x90" + b"\xe2\xfb" + HALT, fast=fast, int3=int3, rax=0, rcx=3)
    inside = guest.breakpoints.insert(CODE + 2, guest.note)
    guest.breakpoints.insert(CODE, guest.note)
    assert guest.go().halted
    assert guest.register("rax") == 3
    assert guest.seen == [CODE] * 3
    if int3:
        [message] = caplog.messages
        assert message.startswith(f"the breakpoint at {CODE + 2:#x} is inside an instruction")
        inside.remove()
        assert not guest.breakpoints._session.guarded.pages[CODE >> 12].inside


@STEPS
def test_fault_04_prefixes_and_int3_in_two_pages(make: Make, fast: bool) -> None:
    """The guest's own: its handler gets it; the breakpoint's page is read by its page tables."""
    jump = b"\xe9" + (NEXT - 1 - CODE - 5).to_bytes(4, "little")
    guest = make(jump.ljust(PAGE_SIZE - 1, NOP) + b"\x66" + b"\xcc" + HALT, fast=fast)
    guest.breakpoints.insert(NEXT + 1, guest.note)
    guest.go()
    assert guest.computer.vector == BP
    assert guest.seen == []


PROGRAM = INC_EAX + move(1, 0x41414141) + b"\x83\xf8\x03" + b"\x72\xf5" + HALT
"""inc %eax; mov $…, %ecx; cmp $3, %eax; jb to its start."""


def symbols(*found: tuple[str, int, int], slide: int = 0) -> Symbols:
    """By hand: names, addresses, sizes."""
    listed = [(at, 1, Symbol(name, at, size)) for name, at, size in found]
    return Symbols(listed, "by hand").slid(slide)


def program(
    code: bytes, *found: tuple[str, int, int], data: tuple[str, int, int] | None = None
) -> Image:
    """An image of code, with symbols by hand: the guest is compared with it."""
    image = Image(elf({CODE: code}))
    listed = [Symbol(*one) for one in found]
    if data is not None:
        listed.append(Symbol(*data, is_data=True))
    Symbols.__init__(image, [(one.address, 1, one) for one in listed], "by hand")
    return image


@WAYS
@pytest.mark.parametrize("inside", [2, 3, 5, 7])
def test_fault_04_a_place_inside_an_instruction_is_refused(
    make: Make, fast: bool, int3: bool, inside: int
) -> None:
    """By the code from the function's beginning on; the guest is left as it is."""
    pytest.importorskip("capstone")
    guest = make(PROGRAM, fast=fast, int3=int3, rax=0)
    known = program(PROGRAM, ("loop", CODE, len(PROGRAM)))
    with pytest.raises(xa.InvalidArgumentError, match=r"inside the instruction at loop\+0x[16]"):
        guest.breakpoints.insert(f"loop+{inside:#x}", guest.note, symbols=known)
    guest.breakpoints.insert("loop+0x6", guest.note, symbols=known)
    assert guest.go().halted
    assert guest.register("rcx") == 0x41414141
    assert guest.seen == [CODE + 6] * 3


def test_fault_04_what_cannot_be_known_is_warned_of(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = make(PROGRAM + b"\x0f\x0b\x0f\xff" * 40, rax=0)
    code = PROGRAM + b"\x0f\x0b\x0f\xff" * 40
    known = program(code, ("loop", CODE, len(PROGRAM)), ("other", CODE + len(PROGRAM), 0))
    monkeypatch.setattr(
        "xenaltp2m.tools.breakpoints.operand_size._disassembler", lambda width: None
    )
    with pytest.warns(xa.PlacementWarning, match="needs the package capstone"):
        guest.breakpoints.insert("loop+0x1", guest.note, symbols=known)
    with pytest.warns(xa.PlacementWarning):
        guest.breakpoints.insert("other+0x44", guest.note, symbols=known)
    assert len(guest.breakpoints) == 2


def test_fault_04_data_is_refused(make: Make) -> None:
    """A symbol of type OBJECT, from its first byte to its last; and what the image has not."""
    guest = make(PROGRAM + bytes(8), rax=0)
    data = ("table", CODE + len(PROGRAM), 8)
    known = program(PROGRAM + bytes(8), ("loop", CODE, len(PROGRAM)), data=data)
    for place in ("table", "table+0x7"):
        with pytest.raises(xa.InvalidArgumentError, match="is data"):
            guest.breakpoints.insert(place, guest.note, symbols=known)
    other = program(INC_ECX + PROGRAM[1:], ("loop", CODE, len(PROGRAM)))
    with pytest.raises(xa.SymbolError, match="does not match the guest"):
        guest.breakpoints.insert("loop", guest.note, symbols=other)
    guest.breakpoints.insert("loop", guest.note, symbols=other, trust=True)
    with pytest.raises(xa.InvalidArgumentError, match="is data"):
        Trace(guest.dom, "table", symbols=known)
    assert guest.go().halted
    assert guest.seen == [CODE] * 3


@WAYS
def test_fault_04_a_byte_of_two_instructions_is_a_limit(make: Make, fast: bool, int3: bool) -> None:
    """Nothing is written in between: docs/breakpoints.md, "What a guest can detect"."""
    there = CODE + 0x100
    code = call(CODE, there + 1) + call(CODE + 5, there) + HALT
    guest = make(code.ljust(0x100, NOP) + bytes([MOV_EAX]) + FUNCTION, fast=fast, int3=int3, rax=0)
    guest.breakpoints.insert(there + 1, guest.note)
    assert guest.go().halted
    assert guest.register("rax") == (OPERAND & -0x100 | 0xCC if int3 else OPERAND)
    assert guest.seen == [there + 1]


# What is given where it is none, and what is more convenient.


async def asynchronous(hit: Hit) -> None: ...


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda one: one.insert("hit", print), "no symbols are given"),
        (lambda one: one.insert(None, print), "an address is a number"),
        (lambda one: one.insert(1.5, print), "an address is a number"),
        (lambda one: one.insert(CODE, None), "a callback must be callable"),
        (lambda one: one.insert(CODE, 7), "a callback must be callable"),
        (lambda one: one.insert(CODE, asynchronous), "is async"),
        (lambda one: one.insert_va(None, CODE, asynchronous), "is async"),
    ],
)
def test_fault_27_bad_arguments_of_breakpoints(
    make: Make, call: Callable[[Any], object], match: str
) -> None:
    guest = make(HALT)
    with pytest.raises(xa.InvalidArgumentError, match=match):
        call(guest.breakpoints)
    assert len(guest.breakpoints) == 0
    assert guest.go().halted


def test_fault_28_breakpoints_by_name_and_by_symbol(make: Make) -> None:
    guest = make(INC_EAX + INC_ECX + HALT, rax=0)
    known = symbols(("first", CODE - 0x100, 1), ("second", CODE - 0xFF, 1), slide=0x100)
    guest.breakpoints.insert("first", guest.note, symbols=known, trust=True)
    guest.breakpoints.insert(known.symbol("second"), guest.note, symbols=known, trust=True)
    guest.breakpoints.insert(Symbol("end", CODE + 2, 0), guest.note)
    with pytest.raises(xa.SymbolError, match="third"):
        guest.breakpoints.insert("third", guest.note, symbols=known)
    assert guest.go().halted
    assert guest.seen == [CODE, CODE + 1, CODE + 2]


def test_fault_28_breakpoints_by_name_where_paging_is_on(make: Make) -> None:
    apart = OTHER + 8 * PAGE_SIZE
    guest = make(call(CODE, NEXT) + HALT, {apart: INC_EAX + RET}, rax=0)
    guest.computer.go_long()
    guest.computer.set(cs_arbytes=CODE_32)
    guest.computer.map(NEXT, apart | PRESENT | WRITABLE)
    guest.computer.map(OTHER, 0)
    known = symbols(("there", NEXT, 2), ("gone", OTHER, 2))
    hook = guest.breakpoints.insert("there", guest.note, symbols=known, trust=True)
    assert hook.address == apart
    with pytest.raises(xa.NotMappedError):
        guest.breakpoints.insert("gone", guest.note, symbols=known)
    assert guest.go().halted
    assert guest.seen == [NEXT]


def test_fault_28_arguments_of_a_hit(make: Make) -> None:
    """System V ABI, i386 and AMD64: the first is at 4(%esp), or in rdi; the seventh at 8(%rsp)."""
    guest = make(b"\x6a\x22\x6a\x11" + call(CODE + 4, CODE + 0x100) + HALT.ljust(0xF7, NOP) + RET)
    found: list[int] = []

    def note(hit: Hit) -> None:
        found.extend((hit.argument(0), hit.argument(1)))
        with pytest.raises(xa.InvalidArgumentError):
            hit.argument(-1)
        hit.stop()

    guest.breakpoints.insert(CODE + 0x100, note)
    guest.host.steps_at_once = 200
    guest.monitor.run(guest.breakpoints)  # with no end but the callback's
    assert found == [0x11, 0x22]
    hook = guest.breakpoints.insert(CODE, guest.note)
    guest.computer.go_long()
    guest.dom.memory.write(STACK, struct.pack("<QQ", 0xBAD, 7))
    names = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
    passed = dict(zip(names, range(1, 7), strict=True))
    paging = {name: guest.register(name) for name in ("cr0", "cr3", "cr4")}
    registers = {"rip": CODE, "rsp": STACK, "msr_efer": EFER_LMA, "cs": CODE_64 << 20}
    event = told_of_int3(guest, CODE >> 12, **registers, **paging, **passed)
    assert [Hit(hook, event, {}).argument(number) for number in range(7)] == [*range(1, 8)]


def test_fault_28_names_of_registers_are_typed() -> None:
    """The others are type errors: ``type: ignore`` in these tests would be unused without."""
    assert set(get_type_hints(RegisterValues)) == SETTABLE_REGISTERS
    assert set(get_type_hints(VcpuRegisterValues)) == set(HVM_CPU.fields)


# Their limits: "What a guest can detect" and "Missed breakpoints" in docs/breakpoints.md.


@STEPS
def test_a_limit_the_guest_can_measure_a_hit(make: Make, fast: bool) -> None:
    took = []
    for hooked in (False, True):
        guest = make(b"\x0f\x31\x89\xc3" + NOP * 4 + b"\x0f\x31\x29\xd8" + HALT, fast=fast)
        if hooked:
            guest.breakpoints.insert(CODE + 5, guest.note)
        assert guest.go().halted
        took.append(guest.register("rax"))
    assert took[0] < took[1]


def test_a_limit_shadows_are_above_all_other_gfns(make: Make) -> None:
    """``XENMEM_maximum_gpfn`` tells the guest the same."""
    guest = make(HALT)
    before = guest.host.domain_maximum_gpfn(guest.domid)
    guest.breakpoints.insert(CODE, guest.note)
    assert guest.host.domain_maximum_gpfn(guest.domid) == before + 16


@STEPS
def test_a_limit_code_that_no_vcpu_writes_is_executed_once_the_guest_writes(
    make: Make, fast: bool
) -> None:
    """As a device does: another INC is read at once, and executed after a write to the page."""
    there = CODE + 0x100
    first = NOP + call(CODE + 1, there)
    code = first + call(CODE + 6, there) + store_byte(CODE + 0x200, 0)
    code += call(CODE + len(code), there) + HALT
    guest = make(code.ljust(0x100, NOP) + INC_EAX + RET, fast=fast, rax=0, rcx=0)

    def write(hit: Hit) -> None:
        guest.dom.memory.write(there, INC_ECX)

    guest.breakpoints.insert(CODE + len(first), write)
    assert guest.go().halted
    assert guest.read(there, 1) == INC_ECX
    assert (guest.register("rax"), guest.register("rcx")) == (2, 1)
