# SPDX-License-Identifier: LGPL-2.1-or-later
"""Register writes that wait for their answers: what is denied does not happen, all else does.

Without ``deniable`` they have happened when they are heard; docs/events.md repeats it.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

import xenaltp2m as xa

from .machine import EventsGuest, storm, wait_until, watch

both = pytest.mark.parametrize("events", [1, 4], indirect=True)

CR0, CR3, CR4, XCR0 = xa.ControlRegister
AM, DE = 1 << 18, 1 << 3
"""Bits of CR0 and CR4 that mean nothing to the guest."""
SYSENTER_CS, LSTAR = 0x174, 0xC0000082


class Write(NamedTuple):
    """A write of a register, and what undoes it."""

    command: str
    register: int
    argument: int
    value: int
    name: str

    def do(self, guest: EventsGuest, vcpu: int = 0) -> int:
        """Have it done; what is then in the register."""
        return guest.boxes[vcpu].command(self.command, self.argument, self.value)

    def undo(self, guest: EventsGuest, vcpu: int = 0) -> int:
        """Have it undone; commands for control registers flip bits."""
        return guest.boxes[vcpu].command(self.command, self.argument, 0)

    def on(self, *, deniable: bool = True) -> xa.Subscription:
        """The subscription to it."""
        if self.command == "wrmsr":
            return xa.MovToMsr.on(self.register, deniable=deniable)
        return xa.WriteCtrlreg.on(xa.ControlRegister(self.register), deniable=deniable)

    def of(self, guest: EventsGuest, vcpu: int) -> int:
        """What is in the register, as Xen has it."""
        value: int = getattr(guest.dom.vcpu(vcpu).registers(), self.name)
        return value

    def settled(self, guest: EventsGuest, vcpu: int = 0) -> int:
        """What is in it once it has been written: a vCPU is started without CR0.ET."""
        self.do(guest, vcpu)
        self.undo(guest, vcpu)
        return self.of(guest, vcpu)


WRITES = [
    Write("cr0", CR0, AM, 0, "cr0"),
    Write("cr3", CR3, 0x5000, 0, "cr3"),
    Write("cr4", CR4, DE, 0, "cr4"),
    Write("wrmsr", SYSENTER_CS, SYSENTER_CS, 0x1234, "sysenter_cs"),
    Write("wrmsr", LSTAR, LSTAR, 0x1234, "msr_lstar"),
]
each = pytest.mark.parametrize("write", WRITES, ids=lambda write: write.name)


@each
@both
def test_what_is_denied_does_not_happen(events: EventsGuest, write: Write) -> None:
    last = events.vcpus - 1
    before = write.settled(events, last)
    with events.dom.monitor(write.on()) as monitor:
        for _ in range(5):
            [event] = watch(
                events, monitor, write.command, write.argument, write.value, vcpu=last,
                answer=lambda _: xa.Response.deny(),
            )  # fmt: skip
            assert isinstance(event, xa.WriteCtrlreg | xa.MovToMsr)
            assert event.old_value == before
            assert event.new_value == (write.value or before ^ write.argument)
            assert events.boxes[last].answer() == before & 0xFFFFFFFF
            assert write.of(events, last) == before
    assert write.of(events, last) == before
    assert events.beats()


@each
@both
@pytest.mark.parametrize("response", [None, xa.Response.resume()], ids=["default", "resume"])
def test_what_is_allowed_happens_after_the_answer(
    events: EventsGuest, write: Write, response: xa.Response | None
) -> None:
    last = events.vcpus - 1
    before = write.settled(events, last)
    during: list[int] = []

    def answer(event: xa.Event) -> xa.Response | None:
        during.append(write.of(events, last))
        return response

    with events.dom.monitor(write.on()) as monitor:
        arguments = write.command, write.argument
        watch(events, monitor, *arguments, write.value, vcpu=last, answer=answer)
        after = write.of(events, last)
        assert after == (write.value or before ^ write.argument)
        assert events.boxes[last].answer() == after & 0xFFFFFFFF
        watch(events, monitor, *arguments, 0, vcpu=last, answer=answer)
        assert write.of(events, last) == before
    assert during == [before, after]


@each
def test_without_the_option_it_has_happened(events: EventsGuest, write: Write) -> None:
    """The event's registers are from just before."""
    before = write.settled(events)
    during: list[int] = []

    def answer(event: xa.Event) -> None:
        during.append(write.of(events, 0))
        if write.name in event.registers:
            assert getattr(event.registers, write.name) == before
        with pytest.raises(xa.InvalidArgumentError, match="deniable=True"):
            event.reply(xa.Response.deny())

    with events.dom.monitor(write.on(deniable=False)) as monitor:
        watch(events, monitor, write.command, write.argument, write.value, answer=answer)
    assert during == [write.value or before ^ write.argument]
    write.undo(events)
    assert write.of(events, 0) == before


@each
@both
@pytest.mark.parametrize("answered", [True, False], ids=["answered", "unanswered"])
def test_a_write_is_not_lost_when_the_monitor_is_closed(
    events: EventsGuest, write: Write, answered: bool
) -> None:
    last = events.vcpus - 1
    before = write.settled(events, last)
    for _ in range(10):
        with events.dom.monitor(write.on()) as monitor:
            events.boxes[last].command(write.command, write.argument, write.value, wait=False)
            for event in monitor.events(timeout=20):
                if answered:
                    event.reply(xa.Response.resume())
                break
        wanted = write.value or before ^ write.argument
        assert events.boxes[last].answer() == wanted & 0xFFFFFFFF
        assert write.of(events, last) == wanted
        write.undo(events, last)
        assert write.of(events, last) == before


@each
@both
def test_a_denial_is_not_lost_when_the_monitor_is_closed(events: EventsGuest, write: Write) -> None:
    last = events.vcpus - 1
    before = write.settled(events, last)
    for _ in range(5):
        with events.dom.monitor(write.on()) as monitor:
            events.boxes[last].command(write.command, write.argument, write.value, wait=False)
            for event in monitor.events(timeout=20):
                event.reply(xa.Response.deny())
                break
        assert events.boxes[last].answer() == before & 0xFFFFFFFF
        assert write.of(events, last) == before


def test_the_gate_is_open_again_when_the_monitor_is_closed(events: EventsGuest) -> None:
    events.dom.monitor(xa.MovToMsr.on(LSTAR, deniable=True)).close()
    write = WRITES[1]
    before = write.settled(events)
    during: list[int] = []
    with events.dom.monitor(write.on(deniable=False)) as monitor:
        watch(
            events, monitor, write.command, write.argument,
            answer=lambda _: during.append(write.of(events, 0)),
        )  # fmt: skip
    assert during == [before ^ write.argument]
    write.undo(events)


def test_one_deniable_subscription_makes_all_deniable(events: EventsGuest) -> None:
    cr3, msr = WRITES[1], WRITES[4]
    before = cr3.of(events, 0), msr.of(events, 0)
    with events.dom.monitor(cr3.on(deniable=False), msr.on()) as monitor:
        for write in (cr3, msr):
            arguments = write.command, write.argument, write.value
            watch(events, monitor, *arguments, answer=lambda _: xa.Response.deny())
    assert (cr3.of(events, 0), msr.of(events, 0)) == before


def test_xcr0_is_written_whatever_is_heard(events: EventsGuest) -> None:
    events.box.command("xcr0", 1)
    with events.dom.monitor(xa.WriteCtrlreg.on(XCR0), WRITES[4].on()) as monitor:
        for value in (3, 1):
            assert len(watch(events, monitor, "xcr0", value)) == 1
            assert events.box.answer() == value


@both
def test_all_vcpus_write_while_monitors_come_and_go(events: EventsGuest) -> None:
    """Each write that a vCPU has made is in the register, whatever the monitor did meanwhile."""
    write = WRITES[1]
    values = [write.of(events, vcpu) for vcpu in range(events.vcpus)]
    bits = [0] * events.vcpus
    for turn in range(20):
        flips = 0x1000 << turn % 4
        with events.dom.monitor(write.on()) as monitor:
            for vcpu, box in enumerate(events.boxes):
                box.command("cr3", flips, wait=False)
                bits[vcpu] ^= flips
            for _ in monitor.events(timeout=20):
                break
        for vcpu, box in enumerate(events.boxes):
            assert box.answer() == values[vcpu] ^ bits[vcpu]
            assert write.of(events, vcpu) == values[vcpu] ^ bits[vcpu]
    for vcpu, box in enumerate(events.boxes):
        box.command("cr3", bits[vcpu])


def test_a_storm_of_other_events_goes_on_beside_it(events: EventsGuest) -> None:
    write = WRITES[1]
    before = write.settled(events)
    with (
        storm(events),
        events.dom.altp2m() as altp2m,
        events.dom.monitor(xa.MemAccess, write.on()) as monitor,
    ):
        view = altp2m.create_view()
        view.set_access(events.gfn("target"), xa.Access.RW)
        altp2m.switch_to_view(view)

        def answer(event: xa.Event) -> xa.Response | None:
            return xa.Response.deny() if isinstance(event, xa.WriteCtrlreg) else None

        seen = watch(events, monitor, write.command, write.argument, answer=answer)
        assert len([event for event in seen if isinstance(event, xa.WriteCtrlreg)]) == 1
        monitor.disable(write.on())
        altp2m.switch_to_view(None)
    wait_until(events.beats)
    assert write.of(events, 0) == before
