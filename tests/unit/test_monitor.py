# SPDX-License-Identifier: LGPL-2.1-or-later
"""The monitor: each request answered once, single-steps as asked for, everything undone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import xenaltp2m as xa
from tests.unit.ringhost import RingHost, domain, finish, started
from xenaltp2m.abi.vm_event import encode_request
from xenaltp2m.backend.clock import Clock
from xenaltp2m.backend.mock import Cpuid, Instruction, MockBackend
from xenaltp2m.handles.base import Handle
from xenaltp2m.values.responses import RESUME

PAUSED, EMULATE, TOGGLE, DENY, VIEW, REGISTERS, FAST = (
    1,
    1 << 2,
    1 << 4,
    1 << 6,
    1 << 7,
    1 << 8,
    1 << 11,
)


@pytest.fixture
def host() -> Iterator[RingHost]:
    host = RingHost()
    yield host
    host.close()


@pytest.fixture
def monitor(host: RingHost) -> Iterator[xa.Monitor]:
    dom, monitor = started(host, xa.MemAccess)
    yield monitor
    monitor.close()
    finish(dom)


def access(vcpu: int = 0, view: int = 1, flags: int = PAUSED | VIEW) -> bytes:
    fields = {"mem_access.gfn": 0x101, "mem_access.flags": 4}
    return bytes(
        encode_request(7, xa.Reason.MEM_ACCESS, vcpu, flags=flags, view=view, fields=fields)
    )


def happened(reason: int, vcpu: int = 0, flags: int = PAUSED | VIEW, **fields: int) -> bytes:
    named = {name.replace("__", "."): value for name, value in fields.items()}
    registers = {"rip": 0x1000, "rax": 0x11}
    return bytes(
        encode_request(7, reason, vcpu, flags=flags, view=1, fields=named, registers=registers)
    )


def answers(host: RingHost) -> list[tuple[int, int, int]]:
    """Each response's vCPU, flags and view."""
    found = []
    for raw in host.responses:
        _, flags, _, vcpu, view = struct.unpack_from("<IIIIH", raw)
        found.append((vcpu, flags, view))
    return found


def test_a_reply_reaches_xen_before_the_next_event_is_waited_for(
    host: RingHost, monitor: xa.Monitor
) -> None:
    host.put(access(vcpu=2))
    [event] = monitor.events(timeout=0)
    assert isinstance(event, xa.MemAccess)
    assert event.gfn == 0x101
    assert answers(host) == [(2, PAUSED | VIEW | FAST, 0)]  # by default: one step in view 0
    assert struct.unpack_from("<H", host.responses[0], 24)[0] == 1  # and back to its own


def test_a_request_is_echoed_for_the_emulator(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access())
    monitor.run(lambda _: xa.Response.emulate(), timeout=0)
    assert answers(host) == [(0, PAUSED | EMULATE, 0)]
    assert host.responses[0][24:56] == access()[24:56]


def test_the_handler_s_exception_comes_after_the_answer(
    host: RingHost, monitor: xa.Monitor
) -> None:
    def handler(event: xa.Event) -> xa.Response:
        raise KeyError(event.vcpu)

    host.put(access(vcpu=1))
    with pytest.raises(KeyError):
        monitor.run(handler)
    assert [vcpu for vcpu, _, _ in answers(host)] == [1]


def test_leaving_the_loop_answers(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access(vcpu=1))
    host.put(access(vcpu=2))
    for _ in monitor.events():
        break
    assert {vcpu for vcpu, _, _ in answers(host)} == {1}
    assert [event.vcpu for event in monitor.events(timeout=0)] == [2]
    assert len(answers(host)) == 2


def test_a_bad_response_can_be_given_again(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access())
    for event in monitor.events(timeout=0):
        with pytest.raises(xa.InvalidArgumentError, match="WriteCtrlreg"):
            event.reply(xa.Response.deny())
        with pytest.raises(xa.InvalidArgumentError, match="not None"):
            event.reply(None)  # type: ignore[arg-type]
        event.reply(xa.Response.resume())
        with pytest.raises(xa.AlreadyError):
            event.reply(xa.Response.resume())
    assert answers(host) == [(0, PAUSED, 0)]


@pytest.mark.parametrize(
    ("reason", "response", "words"),
    [
        (xa.Reason.MEM_ACCESS, xa.Response.deny(), "answers MovToMsr, WriteCtrlreg only"),
        (xa.Reason.MEM_ACCESS, xa.Response.reinject(), "DebugException, SoftwareBreakpoint"),
        (xa.Reason.SINGLESTEP, xa.Response.emulate(), "only"),
        (xa.Reason.MEM_ACCESS, xa.Response.emulate(instruction=b"\x90"), "SoftwareBreakpoint"),
        (xa.Reason.SOFTWARE_BREAKPOINT, xa.Response.emulate(), "give the original instruction"),
        (xa.Reason.MEM_ACCESS, xa.Response.resume(99), "no view 99"),
    ],
)
def test_what_xen_would_not_do_is_refused(
    host: RingHost, monitor: xa.Monitor, reason: int, response: xa.Response, words: str
) -> None:
    host.put(happened(reason))
    for event in monitor.events(timeout=0):
        with pytest.raises(xa.InvalidArgumentError, match=words):
            event.reply(response)
    assert len(host.responses) == 1


def test_an_event_whose_vcpu_did_not_wait_can_only_be_resumed(
    host: RingHost, monitor: xa.Monitor
) -> None:
    host.put(happened(xa.Reason.GUEST_REQUEST, flags=VIEW))
    for event in monitor.events(timeout=0):
        assert not event.paused
        with pytest.raises(xa.InvalidArgumentError, match="did not wait"):
            event.reply(xa.Response.resume(1))
    assert answers(host) == [(0, 0, 0)]  # answered all the same: it frees the slot


def test_without_altp2m_there_are_no_views_to_go_to(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access(flags=PAUSED))
    for event in monitor.events(timeout=0):
        with pytest.raises(xa.InvalidArgumentError, match="altp2m is off"):
            event.reply(xa.Response.fast_singlestep(back_to=1))
        with pytest.raises(xa.InvalidArgumentError, match="altp2m is off"):
            event.reply(xa.Response.resume(1))
    assert answers(host) == [(0, PAUSED | EMULATE, 0)]


def test_a_constant_response_is_checked_against_each_event(
    host: RingHost, monitor: xa.Monitor
) -> None:
    response = xa.Response.fast_singlestep(back_to=1)
    host.put(access())
    monitor.run(lambda _: response, timeout=0)
    host.put(access(flags=PAUSED))
    with pytest.raises(xa.InvalidArgumentError, match="altp2m is off"):
        monitor.run(lambda _: response, timeout=0)
    assert len(host.responses) == 2


# Single-steps: the four rows of Xen's toggle.


def test_one_response_is_one_step(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access())
    monitor.run(lambda _: xa.Response.singlestep(0), timeout=0)
    assert answers(host) == [(0, PAUSED | VIEW | TOGGLE, 0)]  # no, yes: on
    host.put(happened(xa.Reason.SINGLESTEP))
    monitor.run(lambda _: xa.Response.resume(1), timeout=0)
    assert answers(host)[1:] == [(0, PAUSED | VIEW | TOGGLE, 1)]  # yes, no: off
    host.put(access())
    monitor.run(lambda _: xa.Response.resume(), timeout=0)
    assert answers(host)[2:] == [(0, PAUSED, 0)]  # no, no: not touched


def test_steps_can_go_on(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access())
    monitor.run(lambda _: xa.Response.singlestep(), timeout=0)
    for _ in range(2):
        host.put(happened(xa.Reason.SINGLESTEP))
        monitor.run(lambda _: xa.Response.singlestep(), timeout=0)
    assert [flags & TOGGLE for _, flags, _ in answers(host)] == [TOGGLE, 0, 0]  # yes, yes


def test_an_event_within_a_step_leaves_the_step(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access())
    monitor.run(lambda _: xa.Response.singlestep(), timeout=0)
    host.put(access())
    monitor.run(lambda _: xa.Response.resume(0), timeout=0)
    host.put(happened(xa.Reason.SINGLESTEP))
    monitor.run(lambda _: None, timeout=0)
    assert [flags & TOGGLE for _, flags, _ in answers(host)] == [TOGGLE, 0, TOGGLE]


def test_each_vcpu_steps_by_itself(host: RingHost, monitor: xa.Monitor) -> None:
    for vcpu in (0, 1):
        host.put(access(vcpu=vcpu))
    monitor.run(lambda event: xa.Response.singlestep() if event.vcpu else None, timeout=0)
    host.put(access(vcpu=0))
    host.put(happened(xa.Reason.SINGLESTEP, vcpu=1))
    monitor.run(lambda _: xa.Response.resume(), timeout=0)
    toggled = [(vcpu, bool(flags & TOGGLE)) for vcpu, flags, _ in answers(host)]
    assert toggled == [(0, False), (1, True), (0, False), (1, True)]


def test_a_step_nobody_asked_for_is_ended(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(happened(xa.Reason.SINGLESTEP))  # left on by an agent that was killed
    monitor.run(lambda _: None, timeout=0)
    assert answers(host) == [(0, PAUSED | TOGGLE, 0)]


def test_a_fast_step_leaves_the_toggle_alone_and_ends_a_slow_one(
    host: RingHost, monitor: xa.Monitor
) -> None:
    host.put(access())
    monitor.run(lambda _: xa.Response.singlestep(), timeout=0)
    host.put(access())
    monitor.run(lambda _: xa.Response.fast_singlestep(back_to=1), timeout=0)
    host.put(access())
    monitor.run(lambda _: xa.Response.resume(), timeout=0)
    assert [flags & (TOGGLE | FAST) for _, flags, _ in answers(host)] == [TOGGLE, FAST, 0]


def test_stepping_turns_on_what_it_needs(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access())
    monitor.run(lambda _: xa.Response.fast_singlestep(back_to=1), timeout=0)
    assert "monitor_singlestep" not in host.calls  # 4.20 needs no switch (410ef33439)
    host.put(access())
    monitor.run(lambda _: xa.Response.singlestep(), timeout=0)
    assert host.calls.count("monitor_singlestep") == 1


def test_before_4_19_a_fast_step_needs_the_switch_too() -> None:
    host = RingHost(version=6)
    dom, monitor = started(host, xa.MemAccess)
    fields = {"mem_access.gfn": 1}
    host.put(bytes(encode_request(6, 1, 0, flags=PAUSED | VIEW, view=1, fields=fields)))
    monitor.run(lambda _: xa.Response.fast_singlestep(back_to=1), timeout=0)
    assert host.calls.count("monitor_singlestep") == 1
    monitor.close()
    finish(dom)
    host.close()


def test_what_cannot_be_resumed_is_let_through_by_a_step_with_its_switch_off(
    host: RingHost,
) -> None:
    dom, monitor = started(host, xa.Io)
    heard: list[xa.Event] = []
    host.put(happened(xa.Reason.IO_INSTRUCTION))
    host.calls.clear()
    monitor.run(heard.append, timeout=0)
    assert host.calls == ["monitor_singlestep", "monitor_io"]
    assert answers(host) == [(0, PAUSED | TOGGLE, 0)]
    host.put(happened(xa.Reason.SINGLESTEP))
    monitor.run(heard.append, timeout=0)
    assert host.calls == ["monitor_singlestep", "monitor_io", "monitor_io"]
    assert answers(host)[1:] == [(0, PAUSED | TOGGLE, 0)]
    assert [type(event) for event in heard] == [xa.Io]  # the step is the library's own business
    monitor.close()
    finish(dom)


def test_a_breakpoint_nobody_wants_is_the_guest_s(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(happened(xa.Reason.SOFTWARE_BREAKPOINT, software_breakpoint__insn_length=1))
    host.calls.clear()
    monitor.run(lambda _: None, timeout=0)
    assert host.calls == ["hvm_inject_trap"]
    assert answers(host) == [(0, PAUSED, 0)]


def test_registers_are_set_beside_the_event_s_own(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(happened(xa.Reason.CPUID, cpuid__insn_length=2))
    monitor.run(lambda _: None, timeout=0)
    assert answers(host) == [(0, PAUSED | REGISTERS, 0)]
    [response] = host.responses
    assert struct.unpack_from("<Q", response, 56)[0] == 0x11
    assert struct.unpack_from("<Q", response, 56 + 19 * 8)[0] == 0x1002


# Bad rings.


def test_a_request_of_another_version_is_an_error_and_its_vcpu_goes_on(
    host: RingHost, monitor: xa.Monitor
) -> None:
    raw = bytearray(access(vcpu=3))
    raw[0] = 5
    host.put(bytes(raw))
    with pytest.raises(xa.RingError, match="version 5"):
        next(monitor.events(timeout=0))
    assert struct.unpack_from("<IIII", host.responses[0]) == (5, PAUSED, 1, 3)


def test_a_damaged_ring_lets_every_vcpu_go(host: RingHost) -> None:
    dom, monitor = started(host, xa.MemAccess)
    host.put(access(vcpu=2))
    host.damage(0x1234)
    with pytest.raises(xa.RingError, match="damaged"):
        next(monitor.events(timeout=0))
    monitor.close()
    assert [vcpu for vcpu, flags, _ in answers(host) if flags == PAUSED] == [0, 1, 2, 3]
    finish(dom)


def test_half_a_ring_of_answers_is_shown_at_once(host: RingHost, monitor: xa.Monitor) -> None:
    for vcpu in range(8):
        host.put(access(vcpu=vcpu % 4))
    shown = [len(host.responses) for _ in monitor.events(timeout=0)]
    assert max(later - earlier for earlier, later in itertools.pairwise([0, *shown])) <= 4
    assert shown[-1] >= 4
    assert len(host.responses) == 8


# The end.


@pytest.mark.parametrize("reason", [None, 0, 3])
def test_a_domain_s_end_is_the_last_event(host: RingHost, reason: int | None) -> None:
    dom, monitor = started(host, xa.MemAccess)
    host.put(access())
    host.alive = reason is not None
    host.shutdown_reason = reason
    events = list(monitor.events())
    assert [type(event) for event in events] == [xa.MemAccess, xa.DomainEnded]
    ended = events[-1]
    assert isinstance(ended, xa.DomainEnded)
    assert ended.shutdown_reason == reason
    ended.reply(xa.Response.resume())
    monitor.run(lambda event: xa.Response.resume(), timeout=0)
    host.alive = False
    monitor.close()
    assert host.calls[-1] == "monitor_unmap_ring"
    assert "monitor_disable" not in host.calls
    finish(dom)


def test_stopping_ends_the_loop_or_the_next_one(host: RingHost, monitor: xa.Monitor) -> None:
    def stop_in_another_thread() -> None:
        thread = threading.Thread(target=monitor.stop)
        thread.start()
        stack.callback(thread.join)

    with contextlib.ExitStack() as stack:
        monitor.stop()
        assert list(monitor.events()) == []
        stop_in_another_thread()
        assert list(monitor.events()) == []
        host.put(access())
        events = monitor.events()
        next(events)
        stop_in_another_thread()
        assert list(events) == []


def test_a_busy_guest_does_not_keep_a_stop_from_working(
    host: RingHost, monitor: xa.Monitor
) -> None:
    host.on_notify = lambda: host.put(access())
    host.put(access())
    count = itertools.count(1)

    def handler(event: xa.Event) -> None:
        if next(count) == 100:
            monitor.stop()

    monitor.run(handler)
    assert next(count) < 110
    host.on_notify = lambda: None


def test_the_timeout_is_for_each_wait(monitor: xa.Monitor) -> None:
    began = time.monotonic()
    assert list(monitor.events(timeout=0.2)) == []
    assert time.monotonic() - began >= 0.2


def test_one_loop_at_a_time(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access())
    for _ in monitor.events(timeout=0):
        with pytest.raises(xa.BusyError, match="iterated"):
            monitor.run(lambda _: None)


def test_async_for(host: RingHost) -> None:
    dom, monitor = started(host, xa.MemAccess)

    async def agent() -> list[int]:
        loop = asyncio.get_running_loop()
        seen = []
        loop.call_soon(host.put, access(vcpu=1))
        async for event in monitor:
            seen.append(int(event.vcpu))
            if seen == [1]:
                loop.call_soon(host.put, access(vcpu=2))
            else:
                loop.call_soon(monitor.stop)
        return seen

    assert asyncio.run(agent()) == [1, 2]
    assert [vcpu for vcpu, _, _ in answers(host)] == [1, 2]
    monitor.close()
    finish(dom)


def test_an_event_after_the_end_is_not_answered_twice(host: RingHost) -> None:
    dom, monitor = started(host, xa.MemAccess)
    host.put(access())
    [event] = monitor.events(timeout=0)
    with pytest.raises(xa.AlreadyError):
        event.reply(xa.Response.resume())
    monitor.close()
    with pytest.raises(xa.ClosedError):
        event.reply(xa.Response.resume())
    assert len(host.responses) == 1
    finish(dom)


def test_closing_answers_turns_off_and_gives_back_in_this_order(host: RingHost) -> None:
    dom, monitor = started(host, xa.MemAccess, xa.Singlestep, xa.Cpuid)
    host.put(access())
    monitor.run(lambda _: xa.Response.singlestep(), timeout=0)
    host.put(access(vcpu=3))
    host.calls.clear()
    monitor.close()
    assert [vcpu for vcpu, _, _ in answers(host)] == [0, 3]
    assert answers(host)[1] == (3, PAUSED, 0)
    assert host.calls == [
        "monitor_cpuid",  # single-step events go with the ring: a step must be able to end
        "domain_pause",
        "domain_debug_control",  # stepping off, both vCPUs
        "domain_debug_control",
        "monitor_disable",
        "domain_unpause",
        "evtchn_close",
        "monitor_unmap_ring",
    ]
    monitor.close()
    assert len(host.calls) == 8
    finish(dom)


def test_opening_that_fails_leaves_nothing(host: RingHost) -> None:
    class Unable(RingHost):
        def evtchn_bind_interdomain(self, *_: int) -> int:
            raise xa.InvalidArgumentError("no such port")

    unable = Unable()
    dom = domain(unable)
    with pytest.raises(xa.InvalidArgumentError):
        dom.monitor(xa.MemAccess)
    assert {"monitor_disable", "evtchn_close", "monitor_unmap_ring"} <= set(unable.calls)
    finish(dom)
    unable.close()


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_the_process_answers_first(number: signal.Signals) -> None:
    script = """
import sys
from tests.unit.ringhost import finish, started, RingHost
from tests.unit.test_monitor import access
import xenaltp2m as xa
host = RingHost()
dom, monitor = started(host, xa.MemAccess)
with monitor:
    host.put(access(vcpu=2))
    try:
        for event in monitor.events():
            print("waiting", flush=True)
            while True:
                pass
    finally:
        monitor.close()
        print(len(host.responses), host.calls[-1], flush=True)
        finish(dom)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    assert process.stdout.readline() == "1 monitor_unmap_ring\n"
    process.stdout.close()
    assert process.wait() == {signal.SIGINT: -2}.get(number, 128 + number)


def test_signals_wait_while_it_closes(host: RingHost) -> None:
    order = []
    dom, monitor = started(host, xa.MemAccess)
    before = signal.signal(signal.SIGINT, lambda *_: order.append("signal"))

    class Impatient:
        def __call__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            order.append("closing")

    host.on_notify = Impatient()
    host.put(access())
    monitor.close()
    signal.signal(signal.SIGINT, before)
    assert order == ["closing", "signal"]
    finish(dom)


@pytest.mark.usefixtures("foreground")
def test_the_signals_are_left_as_they_were(host: RingHost) -> None:
    before = signal.getsignal(signal.SIGTERM)
    dom, monitor = started(host, xa.MemAccess)
    assert signal.getsignal(signal.SIGTERM) != before
    monitor.close()
    assert signal.getsignal(signal.SIGTERM) == before
    finish(dom)


def test_subscribing_twice_or_to_nothing_is_refused(host: RingHost, monitor: xa.Monitor) -> None:
    monitor.enable(xa.Cpuid)
    with pytest.raises(xa.AlreadyError, match="cpuid"):
        monitor.enable(xa.Cpuid)
    monitor.disable(xa.Cpuid)
    with pytest.raises(xa.InvalidArgumentError, match="cpuid"):
        monitor.disable(xa.Cpuid)
    with pytest.raises(xa.InvalidArgumentError, match="neither"):
        monitor.enable("cpuid")  # type: ignore[arg-type]


def test_a_monitor_is_open_once(host: RingHost) -> None:
    dom, monitor = started(host, xa.MemAccess)
    with pytest.raises(xa.BusyError, match="open already"):
        dom.monitor(xa.Cpuid)
    monitor.close()
    dom.monitor(xa.Cpuid).close()
    finish(dom)


def test_an_interface_version_nobody_knows_is_refused() -> None:
    host = RingHost()
    host.version = 8
    dom = domain(host)
    with pytest.raises(xa.UnsupportedError, match="version 8"):
        dom.monitor(xa.MemAccess)
    assert "monitor_enable" not in host.calls
    finish(dom)
    host.close()


def test_a_vcpu_no_domain_has_costs_nothing(host: RingHost, monitor: xa.Monitor) -> None:
    host.put(access(vcpu=0xFFFFFFFF))
    host.put(access(vcpu=0xFFFFFFFE))
    monitor.run(lambda _: xa.Response.singlestep(), timeout=0)
    assert len(host.responses) == 2
    assert (
        monitor._connection.ring.state[3].bit_length() <= 8192
    )  # not a bit for each vCPU below it


# Each request is answered once, whatever the handler does.


class Trouble(Exception):
    """A handler's own."""


WAYS = ["run", "events", "async for"]
RAISED = [Trouble, KeyboardInterrupt, GeneratorExit, SystemExit]


def numbered(number: int) -> bytes:
    """A request that no other is like."""
    fields = {"mem_access.gfn": number, "mem_access.flags": 4}
    return bytes(
        encode_request(
            7, xa.Reason.MEM_ACCESS, number % 4, flags=PAUSED | VIEW, view=1, fields=fields
        )
    )


def listen(monitor: xa.Monitor, way: str, handler: Callable[[xa.Event], object]) -> None:
    """Have a handler called with each event that there is, in one of the ways to listen."""
    if way == "run":
        monitor.run(handler, timeout=0)  # type: ignore[arg-type]
    elif way == "events":
        with contextlib.closing(monitor.events(timeout=0)) as events:
            for event in events:
                if (response := handler(event)) is not None:
                    event.reply(response)  # type: ignore[arg-type]
    else:

        async def agent() -> None:
            left = monitor.context.backend.produced - monitor.context.backend.consumed  # type: ignore[attr-defined]
            async with contextlib.aclosing(monitor.__aiter__()) as events:
                async for event in events:
                    if (response := handler(event)) is not None:
                        event.reply(response)  # type: ignore[arg-type]
                    left -= 1
                    if left == 0:
                        monitor.stop()

        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(agent())
        finally:
            loop.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("raised", RAISED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("before", ["nothing", "a reply"])
def test_fault_01_the_event_in_hand_is_answered_before_its_exception_is_raised(
    host: RingHost, monitor: xa.Monitor, way: str, raised: type[BaseException], before: str
) -> None:
    """Wherever in a burst, of whatever length; the next loop begins with the event after it."""
    for length in range(1, 9):
        for nth in range(1, length + 1):
            seen: list[int] = []

            def handler(event: xa.Event, nth: int = nth, seen: list[int] = seen) -> xa.Response:
                assert isinstance(event, xa.MemAccess)
                seen.append(int(event.gfn))
                if len(seen) == nth:
                    if before == "a reply":
                        event.reply(xa.Response.resume())
                    raise raised
                return xa.Response.resume()

            host.responses.clear()
            for number in range(length):
                host.put(numbered(number))
            with pytest.raises(raised):
                listen(monitor, way, handler)
            assert seen == list(range(nth))
            assert len(host.responses) == nth, (length, nth)
            assert not monitor._connection.ring.outstanding
            if length > nth:
                listen(monitor, way, handler)
            assert seen == list(range(length)), "no event is handed out twice"
            assert [vcpu for vcpu, _, _ in answers(host)] == [n % 4 for n in range(length)]


def test_fault_01_a_handler_that_raises_at_the_fourth_of_ten_instructions() -> None:
    mock = MockBackend()
    domid = mock.add_domain("guest")
    starts = [0x1000 + 2 * number for number in range(10)]
    mock.load(domid, [Instruction(start, 2, effect=Cpuid()) for start in starts])
    with xa.connect(mock) as xen, xen.domain("guest") as dom, dom.monitor(xa.Cpuid) as monitor:
        seen: list[int] = []

        def handler(event: xa.Event) -> None:
            seen.append(event.registers.rip)
            if len(seen) == 4:
                raise Trouble

        mock.domain_unpause(domid)
        with pytest.raises(Trouble):
            monitor.run(handler, timeout=0)
        assert seen == starts[:4]
        monitor.run(handler, timeout=0)
        assert seen == starts
        assert mock.domain(domid).vcpus[0].event_pauses == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nth", range(1, 5))
@pytest.mark.parametrize("then", ["returns", "replies", "raises"])
def test_fault_01_a_handler_that_closes_the_monitor(
    host: RingHost, way: str, nth: int, then: str
) -> None:
    dom, monitor = started(host, xa.MemAccess)
    seen = []

    def handler(event: xa.Event) -> xa.Response | None:
        seen.append(event)
        if len(seen) < nth:
            return xa.Response.resume()
        monitor.close()
        if then == "raises":
            raise Trouble
        return xa.Response.resume() if then == "replies" and way == "run" else None

    for number in range(4):
        host.put(numbered(number))
    with pytest.raises(Trouble) if then == "raises" else contextlib.nullcontext():
        listen(monitor, way, handler)
    assert len(seen) == nth
    assert sorted(vcpu for vcpu, _, _ in answers(host)) == [0, 1, 2, 3]
    assert monitor.closed
    finish(dom)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nth", [1, 3])
def test_fault_01_a_handler_in_which_the_domain_vanishes(
    host: RingHost, way: str, nth: int
) -> None:
    dom, monitor = started(host, xa.MemAccess)
    seen = []

    def handler(event: xa.Event) -> xa.Response | None:
        seen.append(event)
        if len(seen) == nth:
            host.alive = False
            monitor.close()
        return xa.Response.resume() if way == "run" or len(seen) < nth else None

    for number in range(4):
        host.put(numbered(number))
    listen(monitor, way, handler)
    assert len(seen) == nth
    finish(dom)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nth", [1, 3])
def test_fault_01_what_an_answerer_raises_comes_after_the_answer(
    host: RingHost, monitor: xa.Monitor, way: str, nth: int
) -> None:
    seen = []

    def answerer(event: xa.Event) -> None:
        seen.append(event)
        if len(seen) == nth:
            raise Trouble

    monitor.add_default_handler(answerer)
    for number in range(4):
        host.put(numbered(number))
    with pytest.raises(Trouble):
        listen(monitor, way, lambda _: None)
    assert len(host.responses) == nth
    listen(monitor, way, lambda _: None)
    assert len(seen) == 4
    assert len(host.responses) == 4


@pytest.mark.parametrize("response", [None, xa.Response.resume()], ids=["None", "a response"])
def test_fault_01_an_answerer_that_replies_itself(
    host: RingHost, monitor: xa.Monitor, response: xa.Response | None
) -> None:
    def answerer(event: xa.Event) -> xa.Response | None:
        event.reply(xa.Response.resume())
        return response

    monitor.add_default_handler(answerer)
    host.put(numbered(0))
    host.put(numbered(1))
    monitor.run(lambda _: None, timeout=0)
    assert answers(host) == [(0, PAUSED, 0), (1, PAUSED, 0)]


def test_fault_01_the_handler_s_exception_comes_out_even_if_xen_takes_no_answer(
    host: RingHost, monitor: xa.Monitor
) -> None:
    def refuse() -> None:
        raise xa.BusyError("no notification today")

    def handler(event: xa.Event) -> None:
        host.on_notify = refuse
        raise Trouble

    host.put(numbered(0))
    with pytest.raises(Trouble) as raised:
        monitor.run(handler, timeout=0)
    host.on_notify = lambda: None
    assert raised.value.__notes__ == ["no notification today"]


def test_fault_01_the_end_of_the_domain_needs_no_answer_of_a_handler(
    host: RingHost, monitor: xa.Monitor
) -> None:
    seen: list[xa.Event] = []

    def handler(event: xa.Event) -> xa.Response:
        seen.append(event)
        return xa.Response.resume()

    host.put(numbered(0))
    host.shutdown_reason = 0
    monitor.run(handler)
    assert [type(event) for event in seen] == [xa.MemAccess, xa.DomainEnded]


OURS = "xenaltp2m/handles/monitor/", "xenaltp2m/abi/ring.py"


def interrupted_at(nth: int, run: Callable[[], None]) -> bool:
    """Run something, with Ctrl-C at the nth line of the monitor's; tell whether there is one."""
    lines = itertools.count(1)

    def trace(frame: FrameType, what: str, _: object) -> Any:
        if not any(ours in frame.f_code.co_filename for ours in OURS):
            return None
        if what == "line" and next(lines) == nth:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return next(lines) > nth


@pytest.mark.parametrize("way", WAYS)
def test_fault_01_ctrl_c_at_any_line_of_the_loop(way: str) -> None:
    """No event is handed out twice, none that was handed out waits, and one can listen again."""
    for nth in itertools.count(1):
        host = RingHost()
        dom, monitor = started(host, xa.MemAccess)
        seen: list[int] = []

        def handler(event: xa.Event, seen: list[int] = seen) -> xa.Response | None:
            assert isinstance(event, xa.MemAccess)
            seen.append(int(event.gfn))
            return xa.Response.resume() if event.gfn % 2 else None

        for number in range(6):
            host.put(numbered(number))
        more = interrupted_at(nth, partial(listen, monitor, way, handler))
        taken = (host.produced - monitor._connection.ring.unread) & 0xFFFFFFFF
        assert len(host.responses) == taken >= len(seen), f"line {nth}"
        if monitor._connection.ring.unread:
            listen(monitor, way, handler)
        assert seen == sorted(set(seen)), f"line {nth}"
        assert len(host.responses) == 6
        monitor.close()
        finish(dom)
        host.close()
        if not more:
            break
    assert nth > 100


# Times, and arguments.


def endless(host: RingHost, monitor: xa.Monitor, most: int = 20_000) -> None:
    """Have an event follow each answer, and stop the monitor after so many."""
    left = itertools.count(most, -1)

    def again() -> None:
        if next(left) > 0:
            host.put(access())
        else:
            monitor.stop()

    host.on_notify = again
    host.put(access())


class Ticking(Clock):
    """A clock that goes on by a millisecond when it is looked at."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now


@pytest.mark.parametrize("way", ["run", "run, None returned", "events"])
def test_fault_28_a_loop_of_so_many_seconds_ends_while_events_keep_coming(
    host: RingHost, way: str
) -> None:
    host.clock = Ticking()
    dom, monitor = started(host, xa.MemAccess)
    endless(host, monitor)
    count = itertools.count()
    if way == "events":
        for _ in monitor.events(seconds=0.2):
            next(count)
    else:
        response = None if "None" in way else xa.Response.resume()
        monitor.run(lambda _: (next(count), response)[1], seconds=0.2)
    seen = next(count)
    assert 20 < seen < 1000
    assert len(host.responses) == seen
    monitor.close()
    finish(dom)


def test_fault_28_several_vcpus_do_not_keep_it_from_ending(host: RingHost) -> None:
    """The ring is never empty then, and nothing is waited for."""
    host.clock = Ticking()
    dom, monitor = started(host, xa.MemAccess)
    seen: list[xa.Event] = []

    def handler(event: xa.Event) -> xa.Response:
        seen.append(event)
        host.put(numbered(len(seen)))
        if len(seen) == 20_000:
            monitor.stop()
        return RESUME

    for number in range(4):
        host.put(numbered(number))
    monitor.run(handler, seconds=0.1)
    assert 20 < len(seen) < 1000
    monitor.close()
    finish(dom)


@pytest.mark.parametrize("seconds", [0, 0.05])
def test_fault_28_a_quiet_guest_does_not_make_it_shorter_or_longer(
    monitor: xa.Monitor, seconds: float
) -> None:
    began = time.monotonic()
    monitor.run(lambda _: None, seconds=seconds)
    assert time.monotonic() - began >= seconds
    assert list(monitor.events(seconds=seconds)) == []
    monitor.run(lambda _: None, timeout=0.01, seconds=3600)  # what comes first ends it


@pytest.mark.parametrize("time_", [-1, -0.5, float("nan"), "5", True])
@pytest.mark.parametrize("name", ["timeout", "seconds"])
def test_fault_27_times_that_are_none_are_refused_at_the_call(
    monitor: xa.Monitor, name: str, time_: Any
) -> None:
    for call in (monitor.events, partial(monitor.run, lambda _: None)):
        with pytest.raises(xa.InvalidArgumentError, match=name):
            call(**{name: time_})


async def coroutine(event: xa.Event) -> None:
    del event


class Coroutine:
    async def __call__(self, event: xa.Event) -> None:
        del event


@pytest.mark.parametrize("handler", [None, 5, "handler", coroutine, Coroutine()])
def test_fault_27_a_handler_that_cannot_be_called_is_refused_at_the_call(
    host: RingHost, monitor: xa.Monitor, handler: Any
) -> None:
    host.put(access())
    for call in (monitor.run, monitor.add_default_handler):
        with pytest.raises(xa.InvalidArgumentError, match="callback"):
            call(handler)
    monitor.run(lambda _: None, timeout=0)
    assert len(host.responses) == 1, "the monitor is as it was"


@pytest.mark.parametrize("returned", [True, False, 0, "resume", xa.Response, xa.Action.RESUME])
@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("delayed", [False, True])
def test_fault_27_what_is_no_response_is_raised_once_the_event_was_answered(
    host: RingHost, monitor: xa.Monitor, returned: Any, nth: int, delayed: bool
) -> None:
    count = itertools.count(1)
    for number in range(4):
        host.put(numbered(number))
    if delayed:
        monitor.note_page_removed()
    with pytest.raises(xa.InvalidArgumentError, match="is answered by a Response"):
        monitor.run(lambda _: returned if next(count) == nth else None, timeout=0)
    assert len(host.responses) == nth
    monitor.add_default_handler(lambda _: returned)
    with pytest.raises(xa.InvalidArgumentError, match="is answered by a Response"):
        monitor.run(lambda _: None, timeout=0)
    assert len(host.responses) == nth + 1


# Descriptors: none leaks, and none is used once its number is another file's.


class Child(Handle):
    """Something of the monitor's that cannot be closed at first."""

    refuses = True

    def _take_back(self) -> None:
        if self.refuses:
            raise xa.LeftoverError("not now", left=["something"])


def open_descriptors() -> dict[str, str]:
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[link.name] = str(link.readlink())
    return found


def test_fault_09_a_monitor_that_was_closed_in_part_uses_no_descriptor(host: RingHost) -> None:
    dom, monitor = started(host, xa.MemAccess, xa.Cpuid)
    host.put(access())
    [event] = monitor.events(timeout=0)
    child = Child()
    monitor.close_first(child)
    with pytest.raises(xa.LeftoverError, match="not now"):
        monitor.close()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(8)]
        monitor.stop()
        for use in (
            monitor.fileno,
            monitor.flush,
            lambda: monitor.run(lambda _: None),
            lambda: list(monitor.events()),
            lambda: event.reply(xa.Response.resume()),
            lambda: monitor.enable(xa.MemAccess),
            lambda: listen(monitor, "async for", lambda _: None),
        ):
            with pytest.raises(xa.ClosedError, match="close"):
                use()
        assert [file.seek(0, 2) for file in files] == [0] * 8
        child.refuses = False
        monitor.close()
        assert [os.fstat(file.fileno()).st_size for file in files] == [0] * 8
    assert monitor.closed
    finish(dom)


@pytest.mark.parametrize("nth", [1, 3])
def test_fault_09_a_handler_that_closes_it_in_part(host: RingHost, nth: int) -> None:
    dom, monitor = started(host, xa.MemAccess)
    child = Child()
    monitor.close_first(child)
    count = itertools.count(1)

    def handler(event: xa.Event) -> xa.Response:
        if next(count) == nth:
            with contextlib.suppress(xa.LeftoverError):
                monitor.close()
        return xa.Response.resume()

    for number in range(4):
        host.put(numbered(number))
    monitor.run(handler)
    assert next(count) == nth + 1
    assert len(host.responses) == 4
    child.refuses = False
    monitor.close()
    finish(dom)


@pytest.mark.parametrize("room", [0, 1])
def test_fault_09_a_process_out_of_descriptors_leaks_none(host: RingHost, room: int) -> None:
    """The first is the eventfd, the second the epoll."""
    dom = domain(host)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        highest = -1
        while highest < max(map(int, open_descriptors())):  # no number below it is free then
            highest = stack.enter_context(Path(os.devnull).open()).fileno()
        before = open_descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + room, hard))
        try:
            for _ in range(3):
                with pytest.raises(xa.XenError) as raised:
                    dom.monitor(xa.MemAccess)
                assert raised.value.errno == errno.EMFILE
                assert "ulimit -n" in str(raised.value)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert open_descriptors() == before
    assert "monitor_enable" not in host.calls
    dom.monitor(xa.MemAccess).close()
    finish(dom)


def test_fault_09_stopping_in_another_thread_while_it_closes_writes_to_no_file(
    host: RingHost,
) -> None:
    dom = domain(host)
    current: list[xa.Monitor] = []
    over = threading.Event()

    def stop() -> None:
        while not over.is_set():
            for monitor in current[-1:]:
                monitor.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        for _ in range(200):
            current.append(dom.monitor(xa.MemAccess))
            current[-1].close()
            with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
                assert [os.fstat(file.fileno()).st_size for file in (one, other)] == [0, 0]
    finally:
        over.set()
        thread.join()
    finish(dom)


def test_fault_09_a_stop_as_the_loop_ends_leaves_no_wakeup_behind(
    host: RingHost, monitor: xa.Monitor
) -> None:
    """Else every later wait would end at once, and the loop spin."""
    over = threading.Event()

    def stop() -> None:
        while not over.is_set():
            monitor.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        for _ in range(500):
            monitor.run(lambda _: None, timeout=0)
    finally:
        over.set()
        thread.join()
    monitor.stop()
    monitor.run(lambda _: None)
    assert monitor._connection.poller.poll(0) == []


# asyncio: other tasks get their turn while events keep coming.


def test_fault_08_timers_and_tasks_run_while_events_keep_coming(host: RingHost) -> None:
    dom, monitor = started(host, xa.MemAccess)
    endless(host, monitor)
    turns = 0

    async def others() -> None:
        nonlocal turns
        for _ in range(5):
            await asyncio.sleep(0)
            turns += 1
        asyncio.get_running_loop().call_later(0.01, monitor.stop)

    async def agent() -> int:
        task = asyncio.create_task(others())
        count = 0
        async for event in monitor:
            event.reply(xa.Response.resume())
            count += 1
        await task
        return count

    count = asyncio.run(agent())
    assert turns == 5
    assert 0 < count < 20_000
    monitor.close()
    finish(dom)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("how", ["timeout", "cancel", "Ctrl-C"])
def test_fault_08_it_can_be_ended_while_events_keep_coming(host: RingHost, how: str) -> None:
    dom, monitor = started(host, xa.MemAccess)
    endless(host, monitor)
    count = 0
    begun = asyncio.Event()
    limit: asyncio.Timeout | None = None

    async def listening() -> None:
        nonlocal count
        async for event in monitor:
            event.reply(xa.Response.resume())
            count += 1
            if count == 10:
                begun.set()
                if limit is not None:
                    limit.reschedule(asyncio.get_running_loop().time())
                if how == "Ctrl-C":
                    signal.raise_signal(signal.SIGINT)

    async def agent() -> None:
        nonlocal limit
        if how == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None) as limit:
                    await listening()
        elif how == "cancel":
            task = asyncio.create_task(listening())
            await begun.wait()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        else:
            await listening()

    with pytest.raises(KeyboardInterrupt) if how == "Ctrl-C" else contextlib.nullcontext():
        asyncio.run(agent())
    assert 0 < count < 20_000
    assert host.responses
    assert not monitor._connection.ring.outstanding
    monitor.close()
    finish(dom)


def test_fault_08_two_domains_in_one_task_group_are_served_alike() -> None:
    hosts = [RingHost(), RingHost()]
    opened = [started(host, xa.MemAccess) for host in hosts]
    counts = [0, 0]
    for host, (_, monitor) in zip(hosts, opened, strict=True):
        endless(host, monitor)

    async def listening(which: int) -> None:
        async for event in opened[which][1]:
            event.reply(xa.Response.resume())
            counts[which] += 1
            if min(counts) >= 500:
                for _, monitor in opened:
                    monitor.stop()

    async def agent() -> None:
        async with asyncio.TaskGroup() as tasks:
            for which in range(2):
                tasks.create_task(listening(which))

    asyncio.run(agent())
    for host, (dom, monitor) in zip(hosts, opened, strict=True):
        monitor.close()
        finish(dom)
        host.close()
    assert min(counts) >= 500
    assert max(counts) < 20_000


def test_fault_08_another_task_may_close_the_monitor(host: RingHost) -> None:
    dom, monitor = started(host, xa.MemAccess)
    began = time.monotonic()

    async def agent() -> None:
        asyncio.get_running_loop().call_soon(monitor.close)
        async for _ in monitor:
            raise AssertionError("nothing happens")

    asyncio.run(agent())
    assert monitor.closed
    assert time.monotonic() - began < 30
    finish(dom)


# What it logs.


def test_fault_29_a_monitor_logs_that_it_is_there_and_what_it_could_not_do(
    host: RingHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "xenaltp2m")

    class Unable(RingHost):
        def hvm_inject_trap(self, *_: object) -> None:
            raise xa.XenError("it could not")

    unable = Unable()
    dom, monitor = started(unable, xa.MemAccess)
    unable.put(happened(xa.Reason.SOFTWARE_BREAKPOINT, software_breakpoint__insn_length=1))
    monitor.run(lambda _: None, timeout=0)
    unable.damage(0x1234)
    monitor.close()
    finish(dom)
    unable.close()
    assert [(one.name, one.levelname) for one in caplog.records] == [
        ("xenaltp2m.handles.monitor", "INFO"),
        ("xenaltp2m.handles.monitor", "WARNING"),
        ("xenaltp2m.handles.monitor", "WARNING"),
        ("xenaltp2m.handles.monitor", "INFO"),
    ]
    attached, failed, damaged, detached = caplog.messages
    assert "attached" in attached
    assert "it could not" in failed
    assert "damaged" in damaged
    assert "detached" in detached
