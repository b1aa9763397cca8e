# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a real guest does, as a monitor hears of it, and what each answer does to the guest.

Where a test's docstring says something of Xen, docs/events.md or docs/semantics.md repeats it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import xenaltp2m as xa
from xenaltp2m.abi.ring import Ring
from xenaltp2m.abi.vm_event import HEAD, Flag, layout
from xenaltp2m.values.events import EmulateEachRep, InguestPagefault
from xenaltp2m.values.responses import REINJECT

from .machine import EventsGuest, storm, wait_until, watch
from .mailbox import BP, DB, UD, GuestFault

both = pytest.mark.parametrize("events", [1, 4], indirect=True)
four = pytest.mark.parametrize("events", [4], indirect=True)

R, W, X = xa.AccessFlag.R, xa.AccessFlag.W, xa.AccessFlag.X
LINEAR = xa.AccessFlag.GLA_VALID | xa.AccessFlag.FAULT_WITH_GLA
CR0, CR3, CR4, XCR0 = xa.ControlRegister
AM, DE = 1 << 18, 1 << 3
"""Bits of CR0 and CR4 that mean nothing to the guest."""
SYSENTER_CS, LSTAR = 0x174, 0xC0000082
DEBUG_PORT = 0xE9
CPUID_EXIT, VMCALL_EXIT = 10, 18
VMCALL_BYTES = 3
AT = 0x24
RX, RWX = 5, 7


@contextmanager
def restricted(
    guest: EventsGuest, symbol: str, access: xa.Access, *more: xa.Subscription | type[xa.Event]
) -> Iterator[tuple[xa.Monitor, xa.View]]:
    """A monitor, and all vCPUs in a view that restricts one page."""
    with guest.dom.altp2m() as altp2m, guest.dom.monitor(xa.MemAccess, *more) as monitor:
        view = altp2m.create_view()
        view.set_access(guest.gfn(symbol), access)
        altp2m.switch_to_view(view)
        yield monitor, view


def rips(events: list[xa.Event]) -> list[int]:
    return [event.registers.rip for event in events]


# Reasons.


@both
@pytest.mark.parametrize(
    ("command", "access", "flags", "instruction"),
    [
        ("read", xa.Access.N, R, 7),
        ("read", xa.Access.X, R, 7),
        ("write", xa.Access.N, R | W, 9),
        ("write", xa.Access.RX, R | W, 9),
    ],
)
def test_an_access_to_data_is_heard_where_it_happens(
    events: EventsGuest, command: str, access: xa.Access, flags: xa.AccessFlag, instruction: int
) -> None:
    """A write counts as a read, too. By default the access then happens."""
    last = events.vcpus - 1
    events.put_word("scratch", 0x1234, AT)
    with restricted(events, "scratch", access) as (monitor, view):
        address = events.address("scratch") + AT
        [event] = watch(events, monitor, command, address, 0x5678, vcpu=last)
        assert events.dom.vcpu(last).view == view.id
    assert isinstance(event, xa.MemAccess)
    assert event.flags == Flag.VCPU_PAUSED | Flag.ALTERNATE_P2M
    assert (event.vcpu, event.view, event.gfn, event.offset, event.gla) == (
        last, view.id, events.gfn("scratch"), AT, address,
    )  # fmt: skip
    assert event.access_flags == flags | LINEAR
    assert event.registers.rip == events.address(f"command_{command}") + instruction
    assert events.boxes[last].answer() == (0x1234 if command == "read" else 0x5678)
    assert events.word("scratch", AT) == events.boxes[last].answer()


def test_each_instruction_fetched_is_heard(events: EventsGuest) -> None:
    before = events.word("counter")
    with restricted(events, "target", xa.Access.RW) as (monitor, _):
        seen = watch(events, monitor, "call", "target")
    target = events.address("target")
    assert rips(seen) == [target, target + 6]  # incl counter; ret
    for event in seen:
        assert isinstance(event, xa.MemAccess)
        assert (event.access_flags, event.gla) == (X | LINEAR, event.registers.rip)
        assert event.offset == event.gla % xa.PAGE_SIZE
    assert events.word("counter") == before + 1


def test_what_reads_and_writes_is_one_event(events: EventsGuest) -> None:
    before = events.word("counter")
    with restricted(events, "counter", xa.Access.N) as (monitor, _):
        [event] = watch(events, monitor, "call", "target")
    assert isinstance(event, xa.MemAccess)
    assert event.access_flags == R | W | LINEAR
    assert events.word("counter") == before + 1


def test_what_the_view_allows_is_not_heard(events: EventsGuest) -> None:
    with restricted(events, "scratch", xa.Access.R) as (monitor, _):
        assert watch(events, monitor, "read", "scratch") == []
    with restricted(events, "target", xa.Access.X) as (monitor, _):
        assert watch(events, monitor, "call", "target") == []


def test_host_restrictions_are_heard_without_altp2m(events: EventsGuest) -> None:
    """By default Xen's emulator then does what was to be done."""
    gfn = events.gfn("scratch")
    with events.dom.monitor(xa.MemAccess) as monitor:
        try:
            events.backend.set_mem_access(events.domid, RX, gfn, 1)
            seen = watch(events, monitor, "write", "scratch", 0x99)
        finally:
            events.backend.set_mem_access(events.domid, RWX, gfn, 1)
    [event] = seen
    assert isinstance(event, xa.MemAccess)
    assert (event.view, event.gfn, event.flags) == (None, gfn, Flag.VCPU_PAUSED)
    assert events.word("scratch") == 0x99


@both
@pytest.mark.parametrize(
    ("command", "register", "bits"), [("cr0", CR0, AM), ("cr3", CR3, 0x5000), ("cr4", CR4, DE)]
)
def test_a_write_of_a_control_register_is_heard(
    events: EventsGuest, command: str, register: xa.ControlRegister, bits: int
) -> None:
    last = events.vcpus - 1
    was = events.boxes[last].command(command, bits) ^ bits
    events.boxes[last].command(command, bits)
    with events.dom.monitor(xa.WriteCtrlreg.on(register)) as monitor:
        seen = watch(events, monitor, command, bits, vcpu=last)
        assert events.boxes[last].answer() == was ^ bits
        seen += watch(events, monitor, command, bits, vcpu=last)
        assert events.boxes[last].answer() == was
    values = []
    for event in seen:
        assert isinstance(event, xa.WriteCtrlreg)
        assert (event.index, event.vcpu, event.view) == (register, last, None)
        assert event.registers.rip == events.address(f"command_{command}") + 9
        values.append((event.old_value, event.new_value))
    assert values == [(was, was ^ bits), (was ^ bits, was)]


def test_a_write_of_xcr0_is_heard(events: EventsGuest) -> None:
    with events.dom.monitor(xa.WriteCtrlreg.on(XCR0)) as monitor:
        seen = watch(events, monitor, "xcr0", 3) + watch(events, monitor, "xcr0", 1)
    values = [(event.index, event.new_value) for event in seen]  # type: ignore[attr-defined]
    assert values == [(XCR0, 3), (XCR0, 1)]
    assert seen[1].old_value == 3  # type: ignore[attr-defined]
    assert events.box.results()[0] == 1


def test_writes_that_change_nothing_are_never_heard(events: EventsGuest) -> None:
    """Of a control register: Xen drops them for changing no bit that counts, whatever
    only_changes is. Of an MSR they are."""
    for register, command in ((CR0, "cr0"), (CR3, "cr3"), (CR4, "cr4")):
        wanted = xa.WriteCtrlreg.on(register, only_changes=False)
        with events.dom.monitor(wanted) as monitor:
            assert watch(events, monitor, command, 0) == []
    with events.dom.monitor(xa.MovToMsr.on(LSTAR, only_changes=False)) as monitor:
        [event] = watch(events, monitor, "wrmsr", LSTAR, 0)
    assert isinstance(event, xa.MovToMsr)
    assert event.old_value == event.new_value == 0


def test_ignored_bits_are_not_heard(events: EventsGuest) -> None:
    with events.dom.monitor(xa.WriteCtrlreg.on(CR0, ignored_bits=AM)) as monitor:
        assert watch(events, monitor, "cr0", AM) == []
        assert events.box.answer() & AM
        assert watch(events, monitor, "cr0", AM) == []


@both
@pytest.mark.parametrize(("msr", "value"), [(SYSENTER_CS, 0x1234), (LSTAR, 0x1_2345_6789)])
def test_a_write_of_an_msr_is_heard(events: EventsGuest, msr: int, value: int) -> None:
    last = events.vcpus - 1
    with events.dom.monitor(xa.MovToMsr.on(msr)) as monitor:
        seen = watch(events, monitor, "wrmsr", msr, value, vcpu=last)
        low, high, *_ = events.boxes[last].results()
        again = watch(events, monitor, "wrmsr", msr, value, vcpu=last)
        seen += watch(events, monitor, "wrmsr", msr, 0, vcpu=last)
    assert low | high << 32 == value
    assert again == []
    assert [(event.msr, event.old_value, event.new_value) for event in seen] == [  # type: ignore[attr-defined]
        (msr, 0, value),
        (msr, value, 0),
    ]
    assert rips(seen) == [events.address("command_wrmsr") + 14] * 2


@both
def test_a_guest_can_ask_for_an_event(events: EventsGuest) -> None:
    for vcpu in range(events.vcpus):
        with events.dom.monitor(xa.GuestRequest) as monitor:
            [event] = watch(events, monitor, "guest_request", vcpu=vcpu)
        assert isinstance(event, xa.GuestRequest)
        assert (event.vcpu, event.paused) == (vcpu, True)
        assert event.registers.rip == events.address("command_guest_request") + 18
        assert events.boxes[vcpu].answer() == 0


def test_what_does_not_wait_is_heard_all_the_same(events: EventsGuest) -> None:
    with events.dom.monitor(xa.GuestRequest.on(sync=False)) as monitor:
        for _ in range(5):
            [event] = watch(events, monitor, "guest_request")
            assert isinstance(event, xa.GuestRequest)
            assert not event.paused
            assert events.box.answer() == 0


def test_more_events_than_the_ring_holds_wait_for_room(events: EventsGuest) -> None:
    """Twenty requests that do not wait, with nobody reading: the vCPU is held, none is lost."""
    with storm(events, "command_guest_request"):
        with events.dom.monitor(xa.GuestRequest.on(sync=False)) as monitor:
            wait_until(lambda: monitor._connection.ring.unread == 8)
            rounds = events.box.rounds()
            seen = 0
            for event in monitor.events():
                seen += isinstance(event, xa.GuestRequest)
                if seen == 20:
                    break
        wait_until(lambda: events.box.rounds() > rounds + 12)


@both
def test_a_breakpoint_s_default_is_the_guest_s_own_handler(events: EventsGuest) -> None:
    last = events.vcpus - 1
    box = events.boxes[last]
    box.command("call", "breakpoint")
    before = box.exceptions(BP)
    with events.dom.monitor(xa.SoftwareBreakpoint) as monitor:
        [event] = watch(events, monitor, "call", "breakpoint", vcpu=last)
    assert isinstance(event, xa.SoftwareBreakpoint)
    assert (event.vcpu, event.gfn, event.insn_length) == (last, events.gfn("breakpoint"), 1)
    assert event.type is xa.TrapType.SOFTWARE_EXCEPTION
    assert event.registers.rip == events.address("breakpoint")
    assert box.exceptions(BP) == before + 1
    assert box.last_eip() == events.address("breakpoint") + 1
    assert box.answer() == 11


def test_a_breakpoint_whose_delivery_faults_is_told_again(events: EventsGuest) -> None:
    """In a new view the pages of the guest's handler are not there yet: the CPU comes upon the
    int3 again, and Xen tells of it again; the handler gets it once."""
    before = events.box.exceptions(BP)
    with events.dom.altp2m(), events.dom.monitor(xa.SoftwareBreakpoint) as monitor:
        first = watch(events, monitor, "call", "breakpoint")
        second = watch(events, monitor, "call", "breakpoint")
    assert rips(first) == [events.address("breakpoint")] * len(first)
    assert (len(first) > 1, len(second)) == (True, 1)
    assert events.box.exceptions(BP) == before + 2


@pytest.mark.parametrize("sync", [True, False])
def test_debug_exceptions_are_heard(events: EventsGuest, sync: bool) -> None:
    """pending_dbg is 0 even where DR6 shows a step."""
    events.box.command("icebp")
    before = events.box.exceptions(DB)
    with events.dom.monitor(xa.DebugException.on(sync=sync)) as monitor:
        [icebp] = watch(events, monitor, "icebp")
        assert events.box.last_eip() == events.address("command_icebp") + 1
        steps = watch(events, monitor, "step", 3)
    assert isinstance(icebp, xa.DebugException)
    assert icebp.type is xa.TrapType.PRIVILEGED_SOFTWARE_EXCEPTION
    assert (icebp.insn_length, icebp.paused) == (1, sync)
    assert icebp.registers.rip == events.address("command_icebp")
    for step in steps:
        assert isinstance(step, xa.DebugException)
        assert step.type is xa.TrapType.HARDWARE_EXCEPTION
        assert (step.insn_length, step.paused, step.pending_dbg) == (0, sync, 0)
    start = events.address("command_step")
    assert rips(steps) == [start + 0x27, start + 0x2C, start + 0x2F]
    assert events.box.exceptions(DB) == before + 4
    assert events.box.last_dr6() & 1 << 14


def test_a_debug_exception_can_be_kept_from_the_guest(events: EventsGuest) -> None:
    before = events.box.exceptions(DB)

    def skip(event: xa.Event) -> xa.Response:
        assert isinstance(event, xa.DebugException)
        return xa.Response.resume().with_registers(rip=event.registers.rip + event.insn_length)

    with events.dom.monitor(xa.DebugException) as monitor:
        assert len(watch(events, monitor, "icebp", answer=skip)) == 1
    assert events.box.exceptions(DB) == before


def test_cpuid_is_heard_with_its_results(events: EventsGuest) -> None:
    events.box.command("cpuid", 0x40000000, 7)
    truth = events.box.results()
    with events.dom.monitor(xa.Cpuid) as monitor:
        [event] = watch(events, monitor, "cpuid", 0x40000000, 7)
    assert isinstance(event, xa.Cpuid)
    assert (event.leaf, event.subleaf, event.insn_length) == (0x40000000, 7, 2)
    named = event.registers
    assert (named.rax, named.rbx, named.rcx, named.rdx) == events.box.results() == truth
    assert named.rip == events.address("command_cpuid") + 32


@both
def test_cpuid_can_be_answered_otherwise(events: EventsGuest) -> None:
    last = events.vcpus - 1

    def lie(event: xa.Event) -> xa.Response:
        after = event.registers.rip + 2
        return xa.Response.resume().with_registers(rax=1, rbx=2, rcx=3, rdx=4, rip=after)

    with events.dom.monitor(xa.Cpuid) as monitor:
        assert len(watch(events, monitor, "cpuid", answer=lie, vcpu=last)) == 1
    assert events.boxes[last].results() == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("command", "descriptor", "is_write"),
    [
        ("sgdt", xa.Descriptor.GDTR, False),
        ("sidt", xa.Descriptor.IDTR, False),
        ("lgdt", xa.Descriptor.GDTR, True),
        ("lidt", xa.Descriptor.IDTR, True),
        ("sldt", xa.Descriptor.LDTR, False),
        ("str", xa.Descriptor.TR, False),
        ("lldt", xa.Descriptor.LDTR, True),
        ("ltr", xa.Descriptor.TR, True),
    ],
)
def test_uses_of_descriptor_tables_are_heard_and_done(
    events: EventsGuest, command: str, descriptor: xa.Descriptor, is_write: bool
) -> None:
    if command == "str":
        events.box.command("ltr")
    truth = events.box.command(command)
    with events.dom.monitor(xa.DescriptorAccess) as monitor:
        event, *rest = watch(events, monitor, command)
    assert isinstance(event, xa.DescriptorAccess)
    assert (event.descriptor, event.is_write) == (descriptor, is_write)
    assert len(rest) == (command == "ltr")  # which reads it back
    assert events.box.answer() == truth


def test_an_interrupt_is_heard_before_it_is_delivered(events: EventsGuest) -> None:
    """What a response or the toolstack has injected is; what the guest's APIC delivers is not."""
    events.box.command("call", "breakpoint")
    before = events.box.exceptions(BP)
    asked = REINJECT.with_next_interrupt()

    def answer(event: xa.Event) -> xa.Response | None:
        return asked if isinstance(event, xa.SoftwareBreakpoint) else None

    with events.dom.monitor(xa.SoftwareBreakpoint) as monitor:
        seen = watch(events, monitor, "call", "breakpoint", answer=answer)
    assert [type(event) for event in seen] == [xa.SoftwareBreakpoint, xa.Interrupt]
    assert seen[1].vector == BP  # type: ignore[attr-defined]
    assert seen[1].type is xa.TrapType.SOFTWARE_EXCEPTION  # type: ignore[attr-defined]
    assert events.box.exceptions(BP) == before + 1


def test_the_apic_s_interrupts_are_not_heard(events: EventsGuest) -> None:
    """Only what was injected when the vCPU goes on is; the wish stays, beyond its monitor."""
    events.box.command("call", "breakpoint")
    count = events.box.interrupts()
    asked = xa.Response.resume().with_next_interrupt()
    with events.dom.monitor(xa.GuestRequest) as monitor:
        assert len(watch(events, monitor, "guest_request", answer=lambda _: asked)) == 1
        assert watch(events, monitor, "interrupt") == []
    assert events.box.interrupts() == count + 1
    with events.dom.monitor(xa.SoftwareBreakpoint) as monitor:
        seen = watch(events, monitor, "call", "breakpoint")
    assert [type(event) for event in seen] == [xa.SoftwareBreakpoint, xa.Interrupt]


def test_what_the_emulator_cannot_do_is_heard(events: EventsGuest) -> None:
    events.put_word("scratch", 0, 512)

    def emulate(event: xa.Event) -> xa.Response | None:
        return xa.Response.emulate() if isinstance(event, xa.MemAccess) else None

    events.box.command("xcr0", 1)
    with restricted(events, "scratch", xa.Access.RX, xa.EmulUnimplemented) as (monitor, view):
        seen = watch(events, monitor, "xsave", "scratch", answer=emulate)
        assert events.dom.vcpu(0).view == view.id
    assert [type(event) for event in seen] == [xa.MemAccess, xa.EmulUnimplemented]
    assert seen[0].registers.rip == seen[1].registers.rip == events.address("command_xsave") + 19
    assert events.word("scratch", 512) & 1  # XSTATE_BV: the CPU has done it in view 0


def test_unheard_it_is_an_undefined_instruction(events: EventsGuest) -> None:
    with restricted(events, "scratch", xa.Access.RX) as (monitor, _):
        watch(events, monitor, "xsave", "scratch", answer=lambda _: xa.Response.emulate())
        with pytest.raises(GuestFault) as fault:
            events.box.answer()
    assert fault.value.vector == UD


def since(guest: EventsGuest, minor: int) -> bool:
    return guest.backend.release.minor >= minor


def skip_before(guest: EventsGuest, minor: int) -> None:
    if not since(guest, minor):
        pytest.skip(f"came with Xen 4.{minor}")


def test_exits_are_heard_from_4_17(events: EventsGuest) -> None:
    if not since(events, 17):
        with pytest.raises(xa.UnsupportedError):
            events.dom.monitor(xa.VmExit)
        return
    with events.dom.monitor(xa.VmExit) as monitor:
        seen = watch(events, monitor, "cpuid")
    exits = {event.exit_reason for event in seen if isinstance(event, xa.VmExit)}
    assert {CPUID_EXIT} < exits
    assert not any(event.paused for event in seen)
    [cpuid] = [event for event in seen if event.exit_reason == CPUID_EXIT]  # type: ignore[attr-defined]
    assert cpuid.registers.rip == events.address("command_cpuid") + 32


def test_exits_that_wait_are_let_through(events: EventsGuest) -> None:
    skip_before(events, 17)
    events.box.command("cpuid", 0x40000000)
    truth = events.box.results()
    with events.dom.monitor(xa.VmExit.on(sync=True)) as monitor:
        seen = watch(events, monitor, "cpuid", 0x40000000)
    assert all(event.paused for event in seen)
    assert CPUID_EXIT in {event.exit_reason for event in seen if isinstance(event, xa.VmExit)}
    assert events.box.results() == truth


def test_port_io_is_heard_from_4_18_and_happens(events: EventsGuest) -> None:
    if not since(events, 18):
        with pytest.raises(xa.UnsupportedError):
            events.dom.monitor(xa.Io)
        return
    text = f"port-io-{events.box.heartbeat()}"
    with events.dom.monitor(xa.Io) as monitor:
        for character in f"{text}\n":
            [event] = watch(events, monitor, "out", DEBUG_PORT, ord(character))
            assert isinstance(event, xa.Io)
            assert (event.port, event.bytes, event.is_in, event.is_string) == (
                DEBUG_PORT, 1, False, False,
            )  # fmt: skip
            assert event.registers.rip == events.address("command_out") + 9
        [event] = watch(events, monitor, "in", DEBUG_PORT)
        assert isinstance(event, xa.Io)
        assert event.is_in
        assert events.box.answer() == DEBUG_PORT  # what Xen answers a read there with
    log = subprocess.run(["xl", "dmesg"], check=True, capture_output=True, text=True).stdout
    assert f"{text}\n" in log


def test_port_io_can_be_answered_in_xen_s_place(events: EventsGuest) -> None:
    skip_before(events, 18)

    def answer(event: xa.Event) -> xa.Response:
        return xa.Response.resume().with_registers(rax=0x5A, rip=event.registers.rip + 1)

    with events.dom.monitor(xa.Io) as monitor:
        assert len(watch(events, monitor, "in", 0x70, answer=answer)) == 1
    assert events.box.answer() == 0x5A


def test_switches_that_send_nothing_are_on_as_long_as_the_monitor(events: EventsGuest) -> None:
    for wanted in (InguestPagefault, EmulateEachRep):
        with events.dom.monitor(wanted) as monitor:
            assert watch(events, monitor, "read", "scratch") == []
            with pytest.raises(xa.AlreadyError):
                monitor.enable(wanted)


# Responses.


@both
def test_a_vcpu_resumes_in_another_view(events: EventsGuest) -> None:
    last = events.vcpus - 1
    with restricted(events, "scratch", xa.Access.N) as (monitor, view):
        out = xa.Response.resume(0)
        seen = watch(events, monitor, "read", "scratch", vcpu=last, answer=lambda _: out)
        seen += watch(events, monitor, "read", "scratch", vcpu=last, answer=lambda _: out)
        views = [vcpu.view for vcpu in events.dom.vcpus()]
    assert len(seen) == 1
    assert views == [view.id] * last + [0]


def test_views_show_different_pages(events: EventsGuest) -> None:
    """The answer decides which page the read that waits gets to see."""
    with events.dom.altp2m() as altp2m, events.dom.monitor(xa.MemAccess) as monitor:
        [shadow] = events.dom.add_pages()
        events.put_word("scratch", 0x11)
        events.dom.memory.write(shadow << 12, (0x22).to_bytes(4, "little"))
        watched, other = altp2m.create_view(), altp2m.create_view()
        watched.set_access(events.gfn("scratch"), xa.Access.N)
        other.remap(events.gfn("scratch"), shadow, access=xa.Access.RW)
        altp2m.switch_to_view(watched)
        watch(events, monitor, "read", "scratch", answer=lambda _: xa.Response.resume(other))
        assert events.box.answer() == 0x22
        altp2m.switch_to_view(watched)
        step = xa.Response.fast_singlestep(through=other, back_to=watched)
        watch(events, monitor, "read", "scratch", answer=lambda _: step)
        assert events.box.answer() == 0x22
        watch(events, monitor, "read", "scratch")
        assert events.box.answer() == 0x11


def emulating(
    guest: EventsGuest, response: xa.Response, command: str, value: int = 0, vcpu: int = 0
) -> int:
    """Answer one access to scratch; return what the guest has got."""
    with restricted(guest, "scratch", xa.Access.N) as (monitor, view):
        seen = watch(
            guest, monitor, command, "scratch", value, vcpu=vcpu, answer=lambda _: response
        )
        assert [type(event) for event in seen] == [xa.MemAccess]
        assert guest.dom.vcpu(vcpu).view == view.id
    return guest.boxes[vcpu].answer()


@both
def test_an_emulated_access_happens_in_the_host_s_pages(events: EventsGuest) -> None:
    events.put_word("scratch", 0x1111)
    last = events.vcpus - 1
    assert emulating(events, xa.Response.emulate(), "read", vcpu=last) == 0x1111
    emulating(events, xa.Response.emulate(), "write", 0x2222, vcpu=last)
    assert events.word("scratch") == 0x2222


def test_an_emulated_write_can_be_lost(events: EventsGuest) -> None:
    events.put_word("scratch", 0x1111)
    assert emulating(events, xa.Response.emulate(write=False), "write", 0x2222) == 0x2222
    assert events.word("scratch") == 0x1111


def test_an_emulated_read_can_be_given_other_data(events: EventsGuest) -> None:
    events.put_word("scratch", 0x1111)
    data = (0x12345678).to_bytes(4, "little")
    assert emulating(events, xa.Response.emulate(read_data=data), "read") == 0x12345678
    assert events.word("scratch") == 0x1111


def test_data_for_a_read_that_is_too_short_is_filled_with_zeros(events: EventsGuest) -> None:
    events.put_word("scratch", 0x11111111)
    assert emulating(events, xa.Response.emulate(read_data=b"\x22"), "read") == 0x22


@both
@pytest.mark.parametrize(
    ("instruction", "answer"),
    [(b"\x90", 11), (bytes.fromhex("c7c02a000000"), 42)],  # nop; mov $42, %eax of 6 bytes
)
def test_at_a_breakpoint_the_instruction_behind_it_is_emulated(
    events: EventsGuest, instruction: bytes, answer: int
) -> None:
    last = events.vcpus - 1
    before = events.boxes[last].exceptions(BP)
    response = xa.Response.emulate(instruction=instruction)
    with events.dom.monitor(xa.SoftwareBreakpoint) as monitor:
        seen = watch(events, monitor, "call", "breakpoint", vcpu=last, answer=lambda _: response)
    assert len(seen) == 1
    assert events.boxes[last].answer() == answer
    assert events.boxes[last].exceptions(BP) == before


# A page was taken out of a p2m table while an event waits: Xen leaves what the answer asks for to
# a later resume (from 4.15), by which time it would do harm.


@contextmanager
def reverting(events: EventsGuest) -> Iterator[tuple[xa.View, Callable[[], None]]]:
    """A view all vCPUs are in, and what takes a remap back in it."""
    with events.dom.altp2m() as altp2m:
        [shadow] = events.dom.add_pages()
        view = altp2m.create_view()
        elsewhere = events.gfn("descriptors") + 8
        view.remap(elsewhere, shadow)
        altp2m.switch_to_view(view)
        yield view, lambda: view.revert(elsewhere)


@both
def test_an_emulation_after_a_revert_is_not_late(events: EventsGuest) -> None:
    events.put_word("scratch", 0x1111)
    data = (0x12345678).to_bytes(4, "little")
    last = events.vcpus - 1
    with reverting(events) as (view, revert), events.dom.monitor(xa.MemAccess) as monitor:
        view.set_access(events.gfn("scratch"), xa.Access.N)

        def answer(event: xa.Event) -> xa.Response:
            if view.remaps:
                revert()
            return xa.Response.emulate(read_data=data)

        seen = watch(events, monitor, "read", "scratch", vcpu=last, answer=answer)
        assert [type(event) for event in seen] == [xa.MemAccess]
        assert events.boxes[last].answer() == 0x12345678


@both
def test_registers_after_a_revert_are_not_late(events: EventsGuest) -> None:
    """Of an instruction that comes again, and of one that has been executed."""
    last = events.vcpus - 1
    for kind, command in ((xa.Cpuid, "cpuid"), (xa.GuestRequest, "guest_request")):
        with reverting(events) as (view, revert), events.dom.monitor(kind) as monitor:

            def answer(
                event: xa.Event, view: xa.View = view, revert: Callable[[], None] = revert
            ) -> xa.Response:
                if view.remaps:
                    revert()
                length = 2 if isinstance(event, xa.Cpuid) else 3
                after = event.registers.rip + length
                return xa.Response.resume().with_registers(
                    rax=0x51, rbx=0x52, rcx=0x53, rdx=0x54, rip=after
                )

            seen = watch(events, monitor, command, vcpu=last, answer=answer)
            assert [type(event) for event in seen] == [kind]
        if command == "cpuid":
            assert events.boxes[last].results() == (0x51, 0x52, 0x53, 0x54)
        else:
            assert events.boxes[last].answer() == 0x51


def test_an_exception_given_back_after_a_revert_is_not_late(events: EventsGuest) -> None:
    with reverting(events) as (view, revert):
        events.box.command("call", "breakpoint")  # so that what its handler uses is in the view
        before = events.box.exceptions(BP)
        with events.dom.monitor(xa.SoftwareBreakpoint) as monitor:

            def answer(event: xa.Event) -> xa.Response:
                if view.remaps:
                    revert()
                return xa.Response.reinject()

            seen = watch(events, monitor, "call", "breakpoint", answer=answer)
            assert [type(event) for event in seen] == [xa.SoftwareBreakpoint]
            assert events.box.answer() == 11
    assert events.box.exceptions(BP) == before + 1


@both
def test_a_single_step_is_one_event(events: EventsGuest) -> None:
    """Of the vCPU that was told to step, and of no other."""
    last = events.vcpus - 1
    with restricted(events, "stepped", xa.Access.RW) as (monitor, view):

        def answer(event: xa.Event) -> xa.Response:
            if isinstance(event, xa.MemAccess):
                return xa.Response.singlestep(0)
            return xa.Response.resume(view)

        seen = watch(events, monitor, "call", "stepped", vcpu=last, answer=answer)
        assert events.boxes[last].answer() == 8
        assert watch(events, monitor, "ping", vcpu=last) == []
    assert [type(event) for event in seen] == [xa.MemAccess, xa.Singlestep] * 10
    assert {event.vcpu for event in seen} == {last}
    assert [event.view for event in seen] == [view.id, 0] * 10
    stepped = events.address("stepped")
    offsets = [0, 2, *range(3, 11)]
    assert rips(seen[::2]) == [stepped + offset for offset in offsets]
    assert rips(seen[1:-1:2]) == [stepped + offset for offset in offsets[1:]]
    for event in seen[1:-1:2]:
        assert isinstance(event, xa.Singlestep)
        assert event.gfn == events.gfn("stepped")


@four
def test_single_steps_go_on_as_long_as_asked_for(events: EventsGuest) -> None:
    """While the other vCPUs run at full speed."""
    stepped = events.address("stepped")
    with restricted(events, "stepped", xa.Access.RW) as (monitor, view):

        def answer(event: xa.Event) -> xa.Response:
            if event.registers.rip >> 12 == stepped >> 12:
                return xa.Response.singlestep(0)
            return xa.Response.resume(view)

        with storm(events, "constant"):
            seen = watch(events, monitor, "call", "stepped", vcpu=2, answer=answer)
            assert events.boxes[2].answer() == 8
            rounds = [box.rounds() for box in events.boxes]
            wait_until(
                lambda: all(b.rounds() > r for b, r in zip(events.boxes, rounds, strict=True))
            )
    assert [type(event) for event in seen] == [xa.MemAccess] + [xa.Singlestep] * 10
    assert {event.vcpu for event in seen} == {2}
    assert rips(seen[:-1]) == [stepped + offset for offset in (0, 2, *range(3, 11))]


@both
def test_a_fast_single_step_ends_in_the_view_it_should(events: EventsGuest) -> None:
    """With no second event, in every release."""
    last = events.vcpus - 1
    with restricted(events, "stepped", xa.Access.RW) as (monitor, view):
        step = xa.Response.fast_singlestep(back_to=view)
        seen = watch(events, monitor, "call", "stepped", vcpu=last, answer=lambda _: step)
        assert [vcpu.view for vcpu in events.dom.vcpus()] == [view.id] * events.vcpus
    assert [type(event) for event in seen] == [xa.MemAccess] * 10
    assert [event.view for event in seen] == [view.id] * 10
    assert events.boxes[last].answer() == 8


def test_a_fast_single_step_can_end_elsewhere(events: EventsGuest) -> None:
    with events.dom.altp2m() as altp2m, events.dom.monitor(xa.MemAccess) as monitor:
        first, second = altp2m.create_view(), altp2m.create_view()
        first.set_access(events.gfn("stepped"), xa.Access.RW)
        altp2m.switch_to_view(first)
        leave = xa.Response.fast_singlestep(through=0, back_to=second)
        seen = watch(events, monitor, "call", "stepped", answer=lambda _: leave)
        assert len(seen) == 1
        assert events.dom.vcpu(0).view == second.id


def test_the_guest_sees_the_registers_it_is_given(events: EventsGuest) -> None:
    """A response's registers replace all of the vCPU's, rip among them: a hypercall would be made
    again unless rip is put behind it."""

    def once(event: xa.Event) -> xa.Response:
        after = event.registers.rip + VMCALL_BYTES
        return xa.Response.resume().with_registers(rip=after, rax=0x77)

    with events.dom.monitor(xa.GuestRequest) as monitor:
        assert len(watch(events, monitor, "guest_request", answer=once)) == 1
        assert events.box.answer() == 0x77
        left = [2, 1]

        def again(event: xa.Event) -> xa.Response | None:
            if not left:
                return None
            return xa.Response.resume().with_registers(rsi=left.pop())

        assert len(watch(events, monitor, "guest_request", answer=again)) == 3


def test_registers_and_a_view_go_together(events: EventsGuest) -> None:
    with restricted(events, "constant", xa.Access.RW) as (monitor, view):
        ret = events.address("constant") + 5

        def skip(_: xa.Event) -> xa.Response:
            return xa.Response.fast_singlestep(back_to=view).with_registers(rip=ret, rax=9)

        assert len(watch(events, monitor, "call", "constant", answer=skip)) == 1
        assert events.dom.vcpu(0).view == view.id
    assert events.box.answer() == 9


@contextmanager
def denying(guest: EventsGuest, switch: Callable[[bool], None]) -> Iterator[Callable[[], int]]:
    """An agent in bytes, whose every answer has the flag DENY; yields what answers, and counts."""
    backend, domid = guest.backend, guest.domid
    size = layout(backend.vm_event_get_version()).size
    _, page = backend.monitor_enable(domid)
    ring = Ring(page, size)
    ring.clear()

    def deny() -> int:
        count = 0
        while (request := ring.take()) is not None:
            head = HEAD.unpack_from(request[1])
            ring.answer(request, head, Flag.VCPU_PAUSED | Flag.DENY, union=request[1][24:56])
            ring.publish()
            backend.monitor_resume(domid)
            count += 1
        return count

    try:
        switch(True)
        yield deny
        switch(False)
    finally:
        ring.release()
        backend.monitor_disable(domid)
        backend.monitor_unmap_ring(page)


@pytest.mark.parametrize(
    ("command", "register", "argument", "value"),
    [
        ("cr0", CR0, AM, 0),
        ("cr3", CR3, 0x5000, 0),
        ("cr4", CR4, DE, 0),
        ("wrmsr", SYSENTER_CS, SYSENTER_CS, 0x1234),
        ("wrmsr", LSTAR, LSTAR, 0x1234),
    ],
)
def test_xen_ignores_a_denial(
    events: EventsGuest, command: str, register: int, argument: int, value: int
) -> None:
    """Writes wait for the answer only after XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS, which
    libxenctrl has no function for: what is denied has happened."""

    def switch(on: bool) -> None:
        if command == "wrmsr":
            events.backend.monitor_mov_to_msr(events.domid, register, on, True)
        else:
            events.backend.monitor_write_ctrlreg(events.domid, register, on, True, 0, True)

    with denying(events, switch) as deny:
        counts = []
        values = []
        for new in (value, 0):
            events.box.command(command, argument, new, wait=False)
            count = 0
            while events.box.busy():
                count += deny()
            counts.append(count)
            values.append(events.box.answer())
    assert counts == [1, 1]
    assert values[0] != values[1]
    assert (values[0] ^ values[1]) == (value or argument)


@both
@pytest.mark.parametrize(
    ("command", "wanted", "argument", "value"),
    [
        ("cr0", xa.WriteCtrlreg.on(CR0, deniable=True), AM, 0),
        ("cr3", xa.WriteCtrlreg.on(CR3, deniable=True), 0x5000, 0),
        ("cr4", xa.WriteCtrlreg.on(CR4, deniable=True), DE, 0),
        ("wrmsr", xa.MovToMsr.on(SYSENTER_CS, deniable=True), SYSENTER_CS, 0x1234),
        ("wrmsr", xa.MovToMsr.on(LSTAR, deniable=True), LSTAR, 0x1_2345_6789),
    ],
)
def test_a_denied_write_does_not_happen(
    events: EventsGuest, command: str, wanted: xa.Subscription, argument: int, value: int
) -> None:
    last = events.vcpus - 1
    box = events.boxes[last]
    if command == "wrmsr":
        was = box.command("rdmsr", argument)
    else:
        was = box.command(command, argument) ^ argument
        box.command(command, argument)
    deny = xa.Response.deny()
    with events.dom.monitor(wanted) as monitor:
        for _ in range(2):
            seen = watch(
                events, monitor, command, argument, value, vcpu=last, answer=lambda _: deny
            )
            assert len(seen) == 1
            assert box.answer() == was
        assert len(watch(events, monitor, command, argument, value, vcpu=last)) == 1
        assert box.answer() != was  # what is not denied happens
    box.command(command, argument)
    assert box.answer() == was


def test_a_write_that_waits_for_its_answer_at_the_end_happens(events: EventsGuest) -> None:
    """Closing the monitor must not lose it."""
    deny = xa.Response.deny()
    was = events.box.command("rdmsr", LSTAR)
    with events.dom.monitor(xa.MovToMsr.on(LSTAR, deniable=True)) as monitor:
        watch(events, monitor, "wrmsr", LSTAR, 0x77, answer=lambda _: deny)
        assert events.box.answer() == was
        events.box.command("wrmsr", LSTAR, 0x88, wait=False)
        wait_until(lambda: monitor._connection.ring.unread == 1)
    assert events.box.answer() == 0x88
    assert events.box.command("wrmsr", LSTAR, 0) == 0


# vCPUs.


@both
def test_a_value_that_xen_refuses_leaves_the_guest_as_it_was(events: EventsGuest) -> None:
    """Xen takes every vCPU down before it looks at the values."""
    vcpu = events.dom.vcpu(events.vcpus - 1)
    with pytest.raises(xa.InvalidArgumentError):
        vcpu.set_registers(cr0=1 << 40)
    assert all(vcpu.info().online for vcpu in events.dom.vcpus())
    assert events.beats()


@both
def test_registers_can_be_read_and_set_while_the_guest_stands_still(events: EventsGuest) -> None:
    with events.dom.paused():
        before = [vcpu.registers().as_dict() for vcpu in events.dom.vcpus()]
        vcpu = events.dom.vcpu(events.vcpus - 1)
        odd = before[-1]["rsi"] ^ 0x5555
        vcpu.set_registers(rsi=odd)
        after = [vcpu.registers().as_dict() for vcpu in events.dom.vcpus()]
        changed = [
            (number, name)
            for number, (old, new) in enumerate(zip(before, after, strict=True))
            for name in old
            if old[name] != new[name] and name != "tsc"
        ]
        assert changed == [(events.vcpus - 1, "rsi")]
        vcpu.set_registers(rsi=before[-1]["rsi"])
    assert not events.dom.info().paused
    assert all(vcpu.info().online for vcpu in events.dom.vcpus())
    assert events.beats()


@both
def test_a_waiting_vcpu_s_registers_can_be_set(events: EventsGuest) -> None:
    """An event has happened when it waits: rip is behind the hypercall."""
    last = events.vcpus - 1
    vcpu = events.dom.vcpu(last)

    def answer(event: xa.Event) -> None:
        assert vcpu.registers().rip == event.registers.rip + VMCALL_BYTES
        vcpu.set_registers(rax=0x66)

    with events.dom.monitor(xa.GuestRequest) as monitor:
        watch(events, monitor, "guest_request", vcpu=last, answer=answer)
    assert events.boxes[last].answer() == 0x66
    assert events.beats()


def test_an_event_tells_the_registers_the_vcpu_has(events: EventsGuest) -> None:
    found: list[dict[str, int]] = []

    def answer(event: xa.Event) -> None:
        found.append(events.dom.vcpu(0).registers().as_dict())

    with restricted(events, "scratch", xa.Access.N) as (monitor, _):
        [event] = watch(events, monitor, "read", "scratch", answer=answer)
    told = event.registers.as_dict()
    names = ["rax", "rbx", "rcx", "rdx", "rsp", "rbp", "rsi", "rdi", "rip", "rflags", "cr0", "cr3"]
    assert {name: told[name] for name in names} == {name: found[0][name] for name in names}


def test_pauses_are_counted(events: EventsGuest) -> None:
    """One pause of somebody else is left, whatever an agent does meanwhile."""
    events.backend.domain_pause(events.domid)
    try:
        with restricted(events, "scratch", xa.Access.N):
            assert events.dom.info().paused
        with events.dom.paused(), events.dom.monitor(xa.GuestRequest):
            pass
        assert events.dom.info().paused
    finally:
        events.backend.domain_unpause(events.domid)
    assert not events.dom.info().paused
    assert events.beats()
