# SPDX-License-Identifier: LGPL-2.1-or-later
"""However an agent ends, and at whatever moment: its guest goes on, as if it had never been."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise

import pytest

import xenaltp2m as xa

from .machine import PATIENCE, EventsGuest, Process, storm, wait_until, watch
from .mailbox import BP

both = pytest.mark.parametrize("events", [1, 4], indirect=True)

CYCLES = int(os.environ.get("XENALTP2M_CYCLES", "20"))
"""How many agents are stopped abruptly; on both guests together."""
SEED = int(os.environ.get("XENALTP2M_SEED", "4"))
SOME = 40
REBOOT, CRASH = 1, 3
"""``SHUTDOWN_*``."""


class Enough(Exception):
    """What a handler raises."""


def watched(altp2m: xa.Altp2m, guest: EventsGuest) -> xa.View:
    """All vCPUs in a view where each instruction of target() is heard."""
    view = altp2m.create_view()
    view.set_access(guest.gfn("target"), xa.Access.RW)
    altp2m.switch_to_view(view)
    return view


def as_it_was(guest: EventsGuest) -> None:
    """The guest runs, nobody listens, nothing is left."""
    rounds = [box.rounds() for box in guest.boxes]
    wait_until(lambda: all(b.rounds() > r + 2 for b, r in zip(guest.boxes, rounds, strict=True)))
    assert guest.beats()
    assert not guest.dom.altp2m_active
    assert not guest.dom.info().paused
    guest.dom.monitor().close()


def attached(
    dom: xa.Domain,
    guest: EventsGuest,
    altp2m_first: bool,
    handler: Callable[[xa.Event], xa.Response | None],
) -> None:
    """Listen for ever, with the two handles nested one way or the other."""
    if altp2m_first:
        with dom.altp2m() as altp2m, dom.monitor(xa.MemAccess) as monitor:
            watched(altp2m, guest)
            monitor.run(handler, PATIENCE)
    else:
        with dom.monitor(xa.MemAccess) as monitor, dom.altp2m() as altp2m:
            watched(altp2m, guest)
            monitor.run(handler, PATIENCE)


Answer = Callable[[xa.Event, xa.View], xa.Response | None]
ANSWERS: dict[str, Answer] = {
    "default": lambda event, view: None,
    "fast": lambda event, view: xa.Response.fast_singlestep(back_to=view),
    "toggle": lambda event, view: (
        xa.Response.singlestep(0) if isinstance(event, xa.MemAccess) else xa.Response.resume(view)
    ),
    "steps for ever": lambda event, view: xa.Response.singlestep(0),
    "emulate": lambda event, view: (
        xa.Response.emulate() if isinstance(event, xa.MemAccess) else None
    ),
}


@both
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_closing_amid_a_storm(events: EventsGuest, answer: Answer) -> None:
    with storm(events):
        with events.dom.altp2m() as altp2m, events.dom.monitor(xa.MemAccess) as monitor:
            view = watched(altp2m, events)
            seen = set()
            for count, event in enumerate(monitor.events(PATIENCE)):
                seen.add(int(event.vcpu))
                response = answer(event, view)
                if response is not None:
                    event.reply(response)
                if count >= SOME and len(seen) == events.vcpus:
                    break
            else:
                pytest.fail(f"no more events after {count + 1}")
        as_it_was(events)


@both
@pytest.mark.parametrize("altp2m_first", [True, False])
def test_a_handler_that_raises_amid_a_storm(events: EventsGuest, altp2m_first: bool) -> None:
    count = 0

    def handler(event: xa.Event) -> None:
        nonlocal count
        count += 1
        if count == SOME:
            raise Enough

    with storm(events):
        with pytest.raises(Enough):
            attached(events.dom, events, altp2m_first, handler)
        as_it_was(events)


@both
@pytest.mark.parametrize("answered", [True, False], ids=["fast loop", "by default"])
def test_fault_01_no_event_comes_again_after_a_handler_has_raised(
    events: EventsGuest, answered: bool
) -> None:
    """The function has two instructions: no vCPU tells of the same one twice in a row."""
    rips: dict[int, list[int]] = {vcpu: [] for vcpu in range(events.vcpus)}
    with storm(events):
        with events.dom.altp2m() as altp2m, events.dom.monitor(xa.MemAccess) as monitor:
            view = watched(altp2m, events)
            step = xa.Response.fast_singlestep(back_to=view) if answered else None
            for nth in range(1, 41):
                left = nth

                def handler(event: xa.Event) -> xa.Response | None:
                    nonlocal left
                    rips[event.vcpu].append(event.registers.rip)
                    left -= 1
                    if not left:
                        raise Enough
                    return step

                with pytest.raises(Enough):
                    monitor.run(handler, PATIENCE)
        as_it_was(events)
    assert sum(map(len, rips.values())) == 40 * 41 // 2
    for of_vcpu in rips.values():
        assert all(one != following for one, following in pairwise(of_vcpu))


@both
@pytest.mark.parametrize("first", ["default", "fast", "steps for ever"])
def test_no_step_is_left_for_the_next_agent(events: EventsGuest, first: str) -> None:
    """A fast single-step that is not over would be taken for its own by the next."""
    with storm(events):
        for answer in (ANSWERS[first], ANSWERS["toggle"]):
            counts = dict.fromkeys(range(events.vcpus), 0)
            with events.dom.altp2m() as altp2m, events.dom.monitor(xa.MemAccess) as monitor:
                view = watched(altp2m, events)
                for event in monitor.events(PATIENCE):
                    counts[int(event.vcpu)] += 1
                    response = answer(event, view)
                    if response is not None:
                        event.reply(response)
                    if min(counts.values()) >= 5:
                        break
                else:
                    pytest.fail(f"no more events after {counts}")
        as_it_was(events)


def test_vcpus_leave_a_view_with_breakpoints_that_nobody_hears(events: EventsGuest) -> None:
    before = events.box.exceptions(BP)
    with events.dom.altp2m() as altp2m:
        with events.dom.monitor(xa.SoftwareBreakpoint) as monitor:
            [shadow] = events.dom.add_pages()
            gfn = events.gfn("constant")
            code = bytearray(events.dom.memory.read_page(gfn))
            first, code[0] = code[:5], 0xCC
            events.dom.memory.write_page(shadow, code)
            view = altp2m.create_view()
            view.remap(gfn, shadow, access=xa.Access.X)
            altp2m.switch_to_view(view)
            truth = xa.Response.emulate(instruction=bytes(first))
            seen = watch(events, monitor, "call", "constant", answer=lambda _: truth)
            assert [type(event) for event in seen] == [xa.SoftwareBreakpoint]
            assert events.box.answer() == 1
        assert events.dom.vcpu(0).view == 0
        assert events.box.command("call", "constant") == 1
    assert events.box.exceptions(BP) == before


@both
def test_the_domain_s_handle_alone_is_closed(events: EventsGuest) -> None:
    with storm(events):
        with events.xen.domain(events.name) as dom:
            altp2m, monitor = dom.altp2m(), dom.monitor(xa.MemAccess)
            watched(altp2m, events)
            for count, _ in enumerate(monitor.events(PATIENCE)):
                if count == SOME:
                    break
        assert monitor.closed
        as_it_was(events)


@both
def test_an_agent_can_pause_and_go_on(events: EventsGuest) -> None:
    """Between two loops vCPUs wait; what they did is heard by the second."""
    with storm(events):
        with events.dom.altp2m() as altp2m, events.dom.monitor(xa.MemAccess) as monitor:
            view = watched(altp2m, events)
            for _ in range(4):
                for count, event in enumerate(monitor.events(PATIENCE)):
                    assert event.view == view.id
                    if count == SOME // 4:
                        break
        as_it_was(events)


@both
def test_stop_from_another_thread(events: EventsGuest) -> None:
    with storm(events):
        with events.dom.altp2m() as altp2m, events.dom.monitor(xa.MemAccess) as monitor:
            watched(altp2m, events)
            seen: list[xa.Event] = []
            threading.Timer(0.05, monitor.stop).start()
            monitor.run(seen.append, PATIENCE)
            assert len(seen) > 1
        as_it_was(events)


def test_stop_from_a_signal_handler(events: EventsGuest) -> None:
    with storm(events):
        with events.dom.altp2m() as altp2m, events.dom.monitor(xa.MemAccess) as monitor:
            watched(altp2m, events)
            before = signal.signal(signal.SIGALRM, lambda *_: monitor.stop())
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            try:
                seen = list(monitor.events(PATIENCE))
            finally:
                signal.signal(signal.SIGALRM, before)
            assert len(seen) > 1
        as_it_was(events)


def test_a_stop_ends_waiting_for_what_never_comes(events: EventsGuest) -> None:
    with events.dom.monitor(xa.GuestRequest) as monitor:
        threading.Timer(0.05, monitor.stop).start()
        assert list(monitor.events(PATIENCE)) == []


def test_two_monitors_on_two_domains_in_one_process(
    events: EventsGuest, another: EventsGuest
) -> None:
    with storm(events), storm(another):
        with ExitStack() as stack:
            monitors = []
            for guest in (events, another):
                altp2m = stack.enter_context(guest.dom.altp2m())
                monitors.append(stack.enter_context(guest.dom.monitor(xa.MemAccess)))
                watched(altp2m, guest)
            seen: dict[int, set[int]] = {0: set(), 1: set()}
            for _ in range(SOME):
                for which, monitor in enumerate(monitors):
                    event = next(monitor.events(PATIENCE))
                    seen[which].add(int(event.vcpu))
        assert seen == {0: {0}, 1: {0, 1, 2, 3}}
        as_it_was(events)
        as_it_was(another)


def test_asyncio_agents_go_side_by_side(events: EventsGuest, another: EventsGuest) -> None:
    async def agent(guest: EventsGuest) -> set[int]:
        seen: set[int] = set()
        with guest.dom.altp2m() as altp2m, guest.dom.monitor(xa.MemAccess) as monitor:
            view = watched(altp2m, guest)
            step = xa.Response.fast_singlestep(back_to=view)
            count = 0
            async for event in monitor:
                seen.add(int(event.vcpu))
                event.reply(step)
                count += 1
                if count > SOME and len(seen) == guest.vcpus:
                    break
        return seen

    async def agents() -> tuple[set[int], set[int]]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        clock = asyncio.create_task(tick())
        found = await asyncio.gather(agent(events), agent(another))
        clock.cancel()
        assert ticks
        return found[0], found[1]

    with storm(events), storm(another):
        assert asyncio.run(agents()) == ({0}, {0, 1, 2, 3})
        as_it_was(events)
        as_it_was(another)


@pytest.mark.parametrize("events", [4], indirect=True)
def test_registers_given_right_before_the_end_are_not_lost(events: EventsGuest) -> None:
    """Xen keeps them until the vCPU runs, in memory that disabling a monitor frees; here it has
    to wait for its turn, for the others never rest."""
    with storm(events, "constant"):
        for number in range(12):
            box = events.boxes[number % events.vcpus]
            with events.dom.monitor(xa.GuestRequest) as monitor:
                box.command("guest_request", wait=False)
                for event in monitor.events(PATIENCE):
                    rip = event.registers.rip + 3
                    event.reply(xa.Response.resume().with_registers(rip=rip, rax=0x100 + number))
                    break
            assert box.answer() == 0x100 + number


def test_an_event_held_is_answered_by_the_close(events: EventsGuest) -> None:
    with events.dom.monitor(xa.GuestRequest) as monitor:
        events.box.command("guest_request", wait=False)
        wait_until(lambda: monitor._connection.ring.unread == 1)
    assert events.box.answer() == 0


def test_access_is_not_required_after_the_monitor_that_required_it(events: EventsGuest) -> None:
    with events.dom.altp2m() as altp2m:
        with events.dom.monitor(xa.MemAccess, access_required=True):
            view = watched(altp2m, events)
        altp2m.switch_to_view(view)
        events.box.command("call", "target")  # unheard, it lifts the restriction
        assert view.access(events.gfn("target")) == xa.Access.RWX


# The domain ends.


def listed() -> list[str]:
    """The domains that xl knows, zombies among them."""
    found = subprocess.run(["xl", "list"], check=True, capture_output=True, text=True).stdout
    return [line.split()[1] for line in found.splitlines()[1:]]


@pytest.mark.parametrize("pending", [True, False])
def test_a_domain_that_is_destroyed(mortal: EventsGuest, pending: bool) -> None:
    """While an event waits for its answer, or nothing does: the loop ends, no zombie stays."""
    seen: list[xa.Event] = []
    with mortal.dom, mortal.dom.altp2m() as altp2m, mortal.dom.monitor(xa.MemAccess) as monitor:
        watched(altp2m, mortal)
        if pending:
            mortal.box.command("call", "target", wait=False)
        else:
            threading.Timer(0.05, destroy, [mortal.domid]).start()
        for event in monitor.events(PATIENCE):
            seen.append(event)
            if isinstance(event, xa.MemAccess):
                destroy(mortal.domid)
    ended = seen[-1]
    assert isinstance(ended, xa.DomainEnded)
    assert ended.shutdown_reason is None
    assert len(seen) == 1 + pending
    assert str(mortal.domid) not in listed()


def destroy(domid: int) -> None:
    subprocess.run(["xl", "destroy", str(domid)], check=True)


def test_a_domain_destroyed_in_mid_storm_by_another_process(mortal: EventsGuest) -> None:
    mortal.box.storm("target")
    with mortal.dom, mortal.dom.altp2m() as altp2m, mortal.dom.monitor(xa.MemAccess) as monitor:
        watched(altp2m, mortal)
        with subprocess.Popen(["xl", "destroy", str(mortal.domid)]):
            seen = list(monitor.events(PATIENCE))
    assert isinstance(seen[-1], xa.DomainEnded)
    assert str(mortal.domid) not in listed()


def test_a_guest_that_shuts_itself_down(mortal: EventsGuest) -> None:
    """A triple fault is a reboot."""
    mortal.dom.memory.write(mortal.address("idt_pointer"), bytes(2))
    mortal.box.command("lidt")
    with mortal.dom.altp2m(), mortal.dom.monitor(xa.MemAccess) as monitor:
        mortal.box.command("int3", wait=False)
        [event] = monitor.events(PATIENCE)
        assert isinstance(event, xa.DomainEnded)
        assert event.shutdown_reason == REBOOT
    mortal.dom.monitor().close()


def test_required_access_that_nobody_hears_of_kills_the_guest(mortal: EventsGuest) -> None:
    with mortal.dom.altp2m() as altp2m:
        monitor = mortal.dom.monitor(xa.MemAccess, access_required=True)
        view = watched(altp2m, mortal)
        assert len(watch(mortal, monitor, "call", "target")) == 2
        mortal.backend.monitor_disable(mortal.domid)  # as if the agent had gone
        mortal.box.command("call", "target", wait=False)
        [event] = monitor.events(PATIENCE)
        assert isinstance(event, xa.DomainEnded)
        assert event.shutdown_reason == CRASH
        assert view.access(mortal.gfn("target")) == xa.Access.RW
        monitor.close()


# Agents as processes.


def agent_until_told(dom: xa.Domain, say: Callable[[], None]) -> None:
    with dom.monitor(xa.GuestRequest) as monitor:
        say()
        for _ in monitor.events(PATIENCE):
            pass


def test_a_second_agent_is_told_who_the_first_is(events: EventsGuest) -> None:
    process = Process(events.name, agent_until_told)
    try:
        assert process.ready
        with pytest.raises(xa.BusyError) as busy:
            events.dom.monitor(xa.MemAccess)
        assert f"process {process.pid}" in str(busy.value)
    finally:
        assert process.wait(signal.SIGTERM) == 128 + signal.SIGTERM
    events.dom.monitor(xa.MemAccess).close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_monitor_is_opened_leaves_no_ring(
    events: EventsGuest, number: signal.Signals
) -> None:
    def agent(dom: xa.Domain, say: Callable[[], None]) -> None:
        enable = dom.xen.backend.monitor_enable

        def signalled(domid: int) -> tuple[int, memoryview]:
            found = enable(domid)
            os.kill(os.getpid(), number)
            return found

        dom.xen.backend.monitor_enable = signalled  # type: ignore[method-assign]
        agent_until_told(dom, say)

    process = Process(events.name, agent)
    assert process.wait() == 128 + number
    events.dom.monitor().close()


class Cycle:
    """An agent that is stopped abruptly."""

    def __init__(self, guest: EventsGuest, randomly: random.Random) -> None:
        self.guest = guest
        self.random = randomly
        self.gfn = guest.gfn("target")
        self.answer = randomly.choice(list(ANSWERS.values()))
        self.altp2m_first = randomly.random() < 0.5

    def agent(self, dom: xa.Domain, say: Callable[[], None]) -> None:
        """Answer for ever; from ``say`` on it may be stopped."""
        with ExitStack() as stack:
            if self.altp2m_first:
                altp2m = stack.enter_context(dom.altp2m())
                monitor = stack.enter_context(dom.monitor(xa.MemAccess))
                say()
            else:
                monitor = stack.enter_context(dom.monitor(xa.MemAccess))
                say()
                altp2m = stack.enter_context(dom.altp2m())
            view = watched(altp2m, self.guest)
            monitor.run(lambda event: self.answer(event, view), PATIENCE)

    def raises(self) -> None:
        """Stop by an exception of the handler, in this process."""
        left = self.random.randrange(200)

        def raising(event: xa.Event, view: xa.View) -> xa.Response | None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Enough
            return answer(event, view)

        answer, self.answer = self.answer, raising
        with pytest.raises(Enough):
            self.agent(self.guest.dom, lambda: None)

    def is_signalled(self, number: signal.Signals) -> None:
        """Stop by a signal, in a process of its own."""
        process = Process(self.guest.name, self.agent)
        assert process.ready
        threading.Event().wait(self.random.random() * 0.1)
        assert process.wait(number) == 128 + number


@both
def test_agents_stopped_at_any_moment_leave_the_guest_running(events: EventsGuest) -> None:
    """Attach, storm, abrupt stop, detach, XENALTP2M_CYCLES times; one in four with 4 vCPUs."""
    randomly = random.Random(SEED + events.vcpus)
    with storm(events):
        for number in range(CYCLES // 4 * (3 if events.vcpus == 1 else 1)):
            cycle = Cycle(events, randomly)
            if number % 3 == 0:
                cycle.raises()
            else:
                cycle.is_signalled(signal.SIGINT if number % 3 == 1 else signal.SIGTERM)
            as_it_was(events)
