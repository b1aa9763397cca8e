# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ctrl-C at each line of whole sessions: whatever it interrupts, nothing is left in the guest.

``make interrupts`` has it come at every line; ``make test`` at some, chosen at random.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import TypeAlias

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import Cpuid, Instruction, MockBackend
from xenaltp2m.handles.journal import find
from xenaltp2m.handles.memory import MappedPages
from xenaltp2m.handles.signals import guard
from xenaltp2m.testing import footprint, left_behind
from xenaltp2m.tools.breakpoints.hooks import Hit, WatchpointHit
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.migration import import_views, imported_views, take_out_views
from xenaltp2m.tools.rescue import rescue
from xenaltp2m.tools.state.capture import capture, restore
from xenaltp2m.tools.symbols import Symbol, Symbols
from xenaltp2m.tools.tracing import Trace

from .hooked import RET, call
from .interrupts import Lines
from .machinecode import CODE, DATA, HALT, OTHER, Computer

PACKAGE = os.path.dirname(xa.__file__) + os.sep  # noqa: PTH120 - a frame's file begins so
SOME = int(os.environ.get("XENALTP2M_EACH_LINE", "10"))
"""At how many lines of each session; 0 stands for every line."""

Session: TypeAlias = Callable[[MockBackend, Path], None]
Host: TypeAlias = Callable[[], MockBackend]


def idle() -> MockBackend:
    """A guest that does nothing."""
    host = MockBackend((4, 17), memory_pages=1 << 12)
    host.add_domain(vcpus=2, memory_kib=2048, max_kib=4096)
    host.domain_unpause(1)
    return host


def newest() -> MockBackend:
    """The same on the newest Xen, with #VE."""
    host = MockBackend((4, 22), memory_pages=1 << 12, has_virtualisation_exceptions=True)
    host.add_domain(vcpus=2, memory_kib=2048, max_kib=4096, view_count=70)
    host.domain_unpause(1)
    return host


def busy() -> MockBackend:
    """A guest that calls a function for ever, which writes to memory."""
    code = call(CODE, OTHER) + b"\xeb\xf9"  # JMP to it
    function = b"\xff\x05" + DATA.to_bytes(4, "little") + RET  # INC of a dword
    host = MockBackend((4, 17), memory_pages=1 << 12)
    Computer(code + HALT, {OTHER: function}, host=host)
    host.steps_at_once = 100
    return host


def scripted() -> MockBackend:
    """A guest that asks for something, and tries other things, for ever."""
    host = idle()
    host.load(1, [Instruction(0x1000, 2, (), Cpuid())], loop=True)
    host.load(1, [Instruction(0x2000, 3, [("w", DATA)])], vcpu=1, loop=True)
    host.steps_at_once = 4
    return host


def killed() -> MockBackend:
    """A guest whose agent was killed."""
    host = scripted()
    host.altp2m_set_domain_state(1, True)
    host.altp2m_create_view(1, 7)
    host.altp2m_switch_to_view(1, 1)
    _, page = host.monitor_enable(1)
    host.monitor_unmap_ring(page)
    return host


SESSIONS: dict[str, tuple[Session, Host]] = {}


def session(*hosts: Host) -> Callable[[Session], Session]:
    def add(function: Session) -> Session:
        for host in hosts:
            SESSIONS[f"{function.__name__}, {host.__name__}"] = function, host
        return function

    return add


@session(idle, newest)
def handles(host: MockBackend, journals: Path) -> None:
    with xa.connect(host, journal=journals) as xen, xen.domain(1) as dom:
        dom.pause()
        with dom.altp2m() as altp2m:
            view, other = altp2m.create_view(label="one"), altp2m.create_view(xa.Access.RX)
            pages = dom.add_pages(3)
            dom.memory.write_page(pages[0], b"x" * xa.PAGE_SIZE)
            view.set_access(range(0x10, 0x40), xa.Access.RX)
            view.set_access(0x11, xa.Access.N)
            view.remap(0x20, pages[0], access=xa.Access.X)
            view.remap(0x21, pages[1])
            view.revert(0x21)
            view.set_suppress_ve([0x30, 0x31, 0x33], False)
            view.set_visibility(False)
            view.set_visibility(True)
            if host.release.version >= (4, 22):
                altp2m.enable_notify(0, 0x50)
            altp2m.switch_to_view(view)
            dom.unpause()
            with dom.paused():
                dom.memory.read(0x10FF0, 0x100)
            other.close()
            host.altp2m_set_domain_state(1, False)
            altp2m.verify()
            dom.remove_pages(dom.add_pages())
            dom.vcpu(0).registers()
        dom.pause()


@session(scripted)
def monitor(host: MockBackend, journals: Path) -> None:
    with (
        xa.connect(host, journal=journals) as xen,
        xen.domain(1) as dom,
        dom.altp2m() as altp2m,
        dom.monitor(xa.MemAccess, access_required=True) as monitor,
    ):
        view = altp2m.create_view()
        view.set_access(DATA >> 12, xa.Access.R)
        altp2m.switch_to_view(view)
        monitor.enable(xa.Cpuid)
        for number, event in enumerate(monitor.events(timeout=0)):
            if isinstance(event, xa.MemAccess):
                event.reply(xa.Response.singlestep(view=0))
            if number == 6:
                break
        monitor.disable(xa.Cpuid)
        left = iter(range(4))

        def answer(event: xa.Event) -> xa.Response | None:
            if next(left, None) is None:
                monitor.stop()
            return None

        monitor.run(answer, timeout=0)


@session(busy)
def breakpoints(host: MockBackend, journals: Path) -> None:
    with (
        xa.connect(host, journal=journals) as xen,
        xen.domain(1) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        Breakpoints(altp2m, monitor) as breakpoints,
        MappedPages(dom.context) as mapped,
    ):

        def hit(one: Hit) -> None:
            mapped.page(OTHER >> 12)
            if one.breakpoint.hits == 3:
                monitor.stop()

        breakpoints.insert(OTHER, hit)
        extra = breakpoints.insert(CODE + 5, lambda _: None)
        patch = breakpoints.patch(OTHER, b"\xff\x05" + (OTHER + 0x80).to_bytes(4, "little"))
        monitor.run(breakpoints, timeout=0)
        extra.remove()
        patch.remove()
        dom.memory.write(OTHER + 0x100, b"x")
        breakpoints.verify()


@session(busy)
def watches(host: MockBackend, journals: Path) -> None:
    with (
        xa.connect(host, journal=journals) as xen,
        xen.domain(1) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        Breakpoints(altp2m, monitor, fast=False) as breakpoints,
    ):

        def touched(touch: WatchpointHit) -> None:
            if touch.watchpoint.hits == 3:
                monitor.stop()

        watch = breakpoints.watch(DATA, 4, after=touched)
        breakpoints.watch(DATA + 0x1FFC, 8, touched, reads=True)
        monitor.run(breakpoints, timeout=0)
        watch.remove()


@session(busy)
def traces(host: MockBackend, journals: Path) -> None:
    symbols = Symbols([(OTHER, 1, Symbol("function", OTHER, 7))], "by hand")
    with (
        xa.connect(host, journal=journals) as xen,
        xen.domain(1) as dom,
        Trace(dom, "function", symbols=symbols, arguments=1, returns=True, trust=True) as trace,
    ):
        for number, _ in enumerate(trace.calls(timeout=0)):
            if number == 3:
                break


@session(idle)
def states(host: MockBackend, journals: Path) -> None:
    with xa.connect(host, journal=journals) as xen, xen.domain(1) as dom:
        with dom.altp2m() as altp2m:
            view = altp2m.create_view(label="one")
            view.set_access(range(0x10, 0x20), xa.Access.RX)
            view.remap(0x12, dom.add_pages()[0], access=xa.Access.X)
            altp2m.switch_to_view(view)
            state = capture(altp2m, contents=True)
        with dom.altp2m() as altp2m:
            restore(altp2m, state)
            altp2m.verify()
        with dom.altp2m() as altp2m:
            altp2m.create_view().set_access(3, xa.Access.R)


@session(scripted)
def migration(host: MockBackend, journals: Path) -> None:
    with (
        xa.connect(host, journal=journals) as xen,
        xen.domain(1) as dom,
        dom.altp2m() as altp2m,
        dom.monitor(xa.Cpuid) as monitor,
    ):
        view = altp2m.create_view(label="one")
        view.set_access(range(0x10, 0x20), xa.Access.RX)
        view.remap(0x12, dom.add_pages()[0], access=xa.Access.X)
        with Breakpoints(altp2m, monitor) as breakpoints, MappedPages(dom.context) as mapped:
            breakpoints.insert(0x40000, lambda _: None)
            mapped.page(3)
            with xa.Migration(dom):
                host.migrate(int(dom.domid))


@session(killed)
def rescued(host: MockBackend, journals: Path) -> None:
    with xa.connect(host, journal=journals) as xen:
        rescue(xen, 1)


@session(idle)
def imports(host: MockBackend, journals: Path) -> None:
    with xa.connect(host, journal=journals) as xen:
        with xen.domain(1) as dom, dom.altp2m() as altp2m:
            view = altp2m.create_view(label="one")
            view.set_access(range(0x10, 0x20), xa.Access.RX)
            view.remap(0x12, dom.add_pages()[0], access=xa.Access.X)
            state = xa.capture(altp2m, contents=True)
        import_views(xen, 1, state)
        imported_views(xen, 1)
        take_out_views(xen, 1)


# What comes of it.


def guest(host: MockBackend) -> dict[str, object]:
    """All that a session must leave as it was, the guest's domid apart."""
    [(domid, domain)] = host.machine.domains.items()
    found = {
        what.replace(f"domain {domid}", "the guest"): now for what, now in footprint(host).items()
    }
    found["events that are heard"] = bool(domain.listened)
    return found


class Outcome:
    """A session, with SIGINT at some lines of it."""

    def __init__(
        self, session: Session, make: Host, journals: Path, *at: int, strict: bool = True
    ) -> None:
        host = make()
        # A host outlives its caller: else there would be nothing left to look at.
        host.close = lambda: None  # type: ignore[method-assign]
        clean = guest(make() if make is not killed else scripted())
        pages = {host.domain(1).pages - ring for ring in (0, 1, 2)}
        """Xen takes a ring's page from the guest for good."""
        before = guest(host)
        self.interrupted = False
        self.lines = Lines(*at, inside=(PACKAGE,), outside=f"{PACKAGE}backend/mock/", strict=strict)
        hook, sys.unraisablehook = sys.unraisablehook, self._ignored
        try:
            with self.lines:
                session(host, journals)
        except KeyboardInterrupt:
            self.interrupted = True
        except xa.XenError as error:  # of closing, beside which a signal came
            self.interrupted = isinstance(error.__context__, KeyboardInterrupt)
            if not self.interrupted:
                raise
        finally:
            sys.unraisablehook = hook
        [domain] = host.machine.domains.values()
        kept = any(b'"kept":true' in file.read_bytes() for file in journals.glob("*.journal"))
        self.left = [] if kept else left_behind(clean, guest(host))
        if self.left and make is killed and left_behind(before, guest(host)) == []:
            self.left = []  # it was not rescued
        if not kept:
            if domain.pages not in pages:
                self.left.append(f"{domain.pages} pages, of {pages}")
            found = find(journals, domain.domid, domain.uuid)
            self.left += [f"a journal: {one.record}" for one in found if one.record]
        for file in journals.glob("*"):
            file.unlink()
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            self.left.append("the handler of SIGINT")
        if guard._depth or (strict and guard._handlers):
            self.left.append("signals held back")

    def _ignored(self, about: sys.UnraisableHookArgs) -> None:
        """Where a generator is let go of, Python tells nobody what its end raises."""
        self.interrupted |= about.exc_type is KeyboardInterrupt


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Handles whose end was skipped warn: their domain has closed them.

    Nothing is logged, for what is kept of that holds a view, and with it a connection.
    """
    caplog.set_level(logging.CRITICAL + 1, "xenaltp2m")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()
    signal.signal(signal.SIGINT, before)


def chosen(name: str, executed: list[tuple[CodeType, int]]) -> list[int]:
    """Choose executed lines, by number from 1: each of the source before any comes twice."""
    every = list(range(1, len(executed) + 1))
    if not SOME:
        return every
    random.Random(name).shuffle(every)
    first: dict[tuple[CodeType, int], int] = {}
    for number in every:
        first.setdefault(executed[number - 1], number)
    again = [number for number in every if first[executed[number - 1]] != number]
    return sorted([*first.values(), *again][:SOME])


@pytest.mark.timeout(300 if 0 < SOME <= 10 else 0)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", SESSIONS)
def test_fault_06_nothing_is_left_whatever_line_is_interrupted(name: str, tmp_path: Path) -> None:
    session, make = SESSIONS[name]
    Outcome(session, make, tmp_path)  # imports are done
    executed = Outcome(session, make, tmp_path).lines.executed
    found = []
    for line in chosen(name, executed):
        outcome = Outcome(session, make, tmp_path, line)
        assert outcome.interrupted, (line, outcome.lines.places)
        if outcome.left:
            found.append((outcome.lines.places, outcome.left))
    assert not found, f"{len(found)} of {len(executed)} lines"


@pytest.mark.timeout(300 if 0 < SOME <= 10 else 0)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", SESSIONS)
def test_fault_06_nothing_is_left_whatever_a_second_signal_interrupts(
    name: str, tmp_path: Path
) -> None:
    session, make = SESSIONS[name]
    Outcome(session, make, tmp_path)
    executed = Outcome(session, make, tmp_path).lines.executed
    chance = random.Random(name)
    found = []
    for line in chosen(name, executed):
        second = line + chance.choice([1, 2, 3, 5, 8, 13, 21, 34, 55])
        outcome = Outcome(session, make, tmp_path, line, second, strict=False)
        with contextlib.suppress(KeyboardInterrupt), guard.holding_back():
            pass
        if outcome.left:
            found.append((outcome.lines.places, outcome.left))
    assert not found, f"{len(found)} of {len(executed)} pairs"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_fault_06_nothing_is_left_where_handles_are_opened_again(tmp_path: Path) -> None:
    """At each line of what opens them in the domain that was carried, strictly and not."""
    session, make = SESSIONS["migration, scripted"]
    Outcome(session, make, tmp_path)
    executed = Outcome(session, make, tmp_path).lines.executed
    again = [number for number, (code, _) in enumerate(executed, 1) if code.co_name == "reattach"]
    assert len(again) > 10
    for number in again:
        for strict in (True, False):
            outcome = Outcome(session, make, tmp_path, number, strict=strict)
            assert outcome.interrupted, outcome.lines.places
            assert outcome.left == [], outcome.lines.places
