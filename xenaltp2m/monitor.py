# SPDX-License-Identifier: LGPL-2.1-or-later
"""A monitor: hear what a guest does, and answer, so that it never waits in vain.

The way of an event: the request's bytes are copied out of the ring, wrapped in an
:class:`~xenaltp2m.events.Event`, handed to whoever iterates, and answered once by a
:class:`~xenaltp2m.events.Response`, or by the event's default when the next one is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from dataclasses import replace
from errno import EMFILE, ENODEV
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from xenaltp2m.abi.ring import MASK, REQ_PROD, RSP_PROD, SLOT_MASK, SLOTS, Request, Ring
from xenaltp2m.abi.vm_event import (
    HEAD,
    RESPONSE_HEAD,
    Flag,
    Reason,
    layout,
    patch_registers,
)
from xenaltp2m.abi.x86 import BP, DB, NO_ERROR_CODE
from xenaltp2m.answers import DENIABLE, FITTING, Plan, misfit
from xenaltp2m.errors import (
    AlreadyError,
    BusyError,
    ClosedError,
    InvalidArgumentError,
    RingError,
    UnsupportedError,
    XenError,
    add_failure,
    from_errno,
)
from xenaltp2m.events import (
    EVENTS,
    SINGLESTEP_ON,
    DebugException,
    DomainEnded,
    Event,
    MemAccess,
    SoftwareBreakpoint,
    Subscription,
    UnknownEvent,
    WriteCtrlreg,
)
from xenaltp2m.handle import Handle, UndoList, check_callback
from xenaltp2m.responses import RESUME, Action, Response, view_number
from xenaltp2m.signals import guard, uninterruptible
from xenaltp2m.types import SINGLE_STEP_OFF, VcpuInfo

if TYPE_CHECKING:
    from xenaltp2m.altp2m import Altp2m
    from xenaltp2m.backend import Backend
    from xenaltp2m.domain import Domain
    from xenaltp2m.types import ViewId
    from xenaltp2m.view import View

_LOG = logging.getLogger(__name__)
_LIVENESS_SECONDS = 0.5
"""Idle interval between liveness checks: Xen does not signal a domain's death."""
_TURN_SECONDS = 0.001
"""How long ``async for`` hands out events before other tasks get their turn."""
_FLUSH_EACH = 3
"""Mask of a request's index: how many responses are kept back for one notification."""
_SETTLE_SECONDS = 0.2
_SETTLE_SECONDS_OF_WRITES = 2.0
"""The same, where a register would not be written that the guest has been told is."""
_SETTLE_STEP = 0.001
_DISABLE_TRIES = 100
_U = slice(24, 56)
# As plain numbers, for enums are slow.
_PAUSED = int(Flag.VCPU_PAUSED)
_DONE = 2
_VCPU_MASK = 0x1FFF
"""Xen has no more vCPUs than this in any domain; a damaged request may say anything."""
_SINGLESTEP = int(Reason.SINGLESTEP)

_MOST_PLANS = 64
_unpack, _pack_into = HEAD.unpack_from, RESPONSE_HEAD.pack_into
_STEPS = frozenset({Action.SINGLESTEP, Action.FAST_SINGLESTEP, Action.LET_THROUGH})
_REPEATED = frozenset(
    {
        Reason.MEM_ACCESS, Reason.SOFTWARE_BREAKPOINT, Reason.CPUID, Reason.DESCRIPTOR_ACCESS,
        Reason.EMUL_UNIMPLEMENTED,
    }
)  # fmt: skip
"""Of these the vCPU comes again when it is merely resumed."""
_NOT_YET = DomainEnded(None)
Handler: TypeAlias = Callable[[Event], Response | None]


class _Kept(NamedTuple):
    """A response that waits for its event to come again."""

    response: Response
    reason: int
    rip: int


class _Classes(dict[int, type[Event]]):
    """The class of each reason, also of those nobody knows."""

    def __missing__(self, reason: int) -> type[Event]:
        return UnknownEvent


_CLASSES = _Classes(EVENTS)


class Monitor(Handle):
    """A domain's monitor. Made by :meth:`xenaltp2m.domain.Domain.monitor`.

    While one is open in the main thread, SIGTERM and SIGHUP raise :class:`SystemExit` where they
    would kill the process: a killed agent leaves its guest frozen. Handlers of one's own stay.

    Closing it answers what is unanswered, waits until the vCPUs have taken their answers, ends
    single-stepping, turns off what it turned on, and gives the ring back. If it heard of accesses
    or breakpoints, the vCPUs leave the view they were moved to first: nobody would hear them.

    Thread-safety: :meth:`stop` may be called from anywhere, all else from one thread at a time.

    Attributes:
        domain: The domain.
        version: Xen's vm_event interface version.
        access_required: Whether the domain crashes rather than violate a view unheard.
    """

    def __init__(
        self, domain: Domain, subscriptions: tuple[Subscription, ...], access_required: bool
    ) -> None:
        self.domain = domain
        self.access_required = access_required
        self._backend = domain.xen.backend
        self._clock = self._backend.clock
        self._release = domain.xen.release
        self.version = self._known_version()
        self._answerers: list[Handler] = []
        self._children: list[Handle] = []
        """What needs its events to be answered, and is closed before it."""
        self._stop_lock = threading.RLock()  # a signal handler may stop() within a stop()
        self._set_up(subscriptions)

    @uninterruptible
    def _set_up(self, subscriptions: tuple[Subscription, ...]) -> None:
        domain = self.domain
        self._domid = int(domain.domid)
        self._vcpus = domain.info().max_vcpu_id + 1
        super().__init__()
        self._enabled: dict[tuple[object, ...], Subscription] = {}
        self._has_stepped = False
        self._last: dict[int, Response] = {}
        """What each vCPU was last answered with."""
        self._plans: dict[int, Plan] = {}
        self._notified = 0
        """How many responses Xen was made to look at, modulo 2^32."""
        self._let_through: dict[int, Subscription] = {}
        self._delayed: dict[int, _Kept | None] = {}
        """vCPUs whose next resume may do nothing that an answer asks for (``expect_delays``)."""
        self._iterating = False
        self._stopping = False
        self._switches_views = self._keeps_views_going = False
        self._gates_writes = False
        """Whether register writes wait for the answer, until the ring is given back."""
        self._damaged = self._enabled_in_xen = False
        self._attached = False
        """Whether the ring and the descriptors may be used: a close that failed has none."""
        self._wakeup = -1
        self._leave_loop: Callable[[], object] | None = None
        self._own = UndoList()
        """What is this process's: its end of the ring and of the event channel, its descriptors."""
        self._undo.push("", self._let_go)
        guard.enter()  # first: a process killed from here on would leave a ring behind
        try:
            self._open_files()
            self._open()
            for wanted in subscriptions:
                self.enable(wanted)
            if self.access_required:
                self._require_access()
        except BaseException as error:
            self._attached = False
            try:
                self._roll_back(self._undo, error, heir=domain._undo)
            finally:
                super().abandon()
                guard.leave()
            raise
        _LOG.info("%r: attached, vm_event version %d", self, self.version)

    def __repr__(self) -> str:
        return f"<Monitor of domain {self._domid}>"

    # Opening.

    def _known_version(self) -> int:
        version = self._backend.vm_event_get_version()
        try:
            layout(version)
        except LookupError as error:
            raise UnsupportedError(str(error), op="vm_event_get_version") from None
        return version

    def _open_files(self) -> None:
        """Open what stop() writes to, and what waits for that and for the event channel."""
        try:
            self._wakeup = self._own.do(
                "",
                partial(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
                lambda _: self._close_wakeup(),
            )
            self._poller = self._own.do("", select.epoll, select.epoll.close)
        except OSError as error:
            raise from_errno("monitor_wait", error.errno or EMFILE, domid=self._domid) from error
        self._poller.register(self._wakeup, select.EPOLLIN)
        self._poll = self._clock.polling(self._poller)

    def _close_wakeup(self) -> None:
        with self._stop_lock:  # its number may be another file's at once
            wakeup, self._wakeup = self._wakeup, -1
            os.close(wakeup)

    def _detach(self) -> None:
        """Let nobody use the ring and the descriptors any more, before they are given back."""
        self._attached = False
        self._end_loop()

    def _check_open(self) -> None:
        super()._check_open()
        if not self._attached:
            raise ClosedError(
                f"{self!r} was closed in part and has no ring: call close() again",
                domid=self._domid,
            )

    def _open(self) -> None:
        """Enable it and set its ring up while the domain stands still.

        A guest that is restricted already may put a request at once, which setting up would lose.
        """
        backend, domid = self._backend, self._domid
        with self.domain.paused():
            try:
                # libxc pauses the domain meanwhile (xc_vm_event_enable, 4.14 to 4.22), too.
                journal = self.domain._journal
                pauses = journal.record.pauses
                with journal.about_to(monitor=True, pauses=pauses + 1):
                    remote, page = backend.monitor_enable(domid)
                journal.undone(pauses=pauses)
            except BusyError as error:
                killed = f"if its agent was killed: xenaltp2m rescue {domid}"
                error.hint = (*_other_agents(), killed, *error.hint)
                raise
            self._enabled_in_xen = True
            self._undo.push(f"monitor of domain {domid}", self._give_back)
            self._own.push(f"ring of domain {domid}", partial(backend.monitor_unmap_ring, page))
            self._ring = Ring(page, layout(self.version).size)
            self._own.push("", self._ring.release)
            self._ring.clear()
            self._channel = backend.evtchn_open()
            self._own.push(
                f"event channel of domain {domid}", partial(backend.evtchn_close, self._channel)
            )
            self._port = backend.evtchn_bind_interdomain(self._channel, domid, remote)
            calls = backend.evtchn_calls(self._channel, self._port)
            self._pending, self._unmask, self._notify = calls
            self._poller.register(backend.evtchn_fd(self._channel), select.EPOLLIN)
            self._undo.drop()
            self._undo.push(f"monitor of domain {domid}", self._disable)
            self._attached = True

    def expect_delays(self) -> None:
        """Be told that a page was taken from one of the domain's p2m tables.

        The next resume of each vCPU then does nothing but tell device models: registers, emulation
        and exceptions come with the one after (``Release.removal_delays_answers``). Until a vCPU
        has been resumed, such an answer is not given to it but kept until its event comes again,
        or done by other means.
        """
        if self._release.removal_delays_answers:
            for vcpu in range(self._vcpus):
                self._delayed.setdefault(vcpu, None)

    def forget_views(self) -> None:
        """Be told that views have other numbers now."""
        self._plans.clear()

    def _in_time(self, event: Event, response: Response) -> Response:
        """Return what to answer where the vCPU's next resume may do nothing: see expect_delays."""
        vcpu = int(event.vcpu)
        kept = self._delayed.pop(vcpu)
        late = response.registers or response.action in (Action.EMULATE, Action.REINJECT)
        if kept is not None or not late or not event.paused:
            return response
        if event.reason in _REPEATED:
            self._check_fits(event, response)
            self._delayed[vcpu] = _Kept(response, int(event.reason), event.registers.rip)
            return RESUME
        if response.registers:
            self.domain.vcpu(vcpu).set_registers(**response.registers)
        return replace(response, registers={})

    def _comes_again(self, event: Event) -> bool:
        """Answer an event that has come again with what was kept for it."""
        kept = self._delayed.get(int(event.vcpu))
        if kept is None:
            return False
        if (kept.reason, kept.rip) != (event._head[2], event.registers.rip):
            del self._delayed[int(event.vcpu)]
            return False
        self._answer(event, kept.response)
        return True

    def _require_access(self) -> None:
        required = partial(self._backend.domain_set_access_required, self._domid)
        journal = self.domain._journal
        journal.write(access_required=True)
        self._undo.push("", partial(journal.undone, access_required=False), needs_rest=True)
        self._undo.push(f"access_required of domain {self._domid}", partial(required, False))
        required(True)

    @uninterruptible
    def enable(self, which: Subscription | type[Event]) -> None:
        """Hear of something more.

        Args:
            which: A kind of event, or what its ``on`` returned.

        Raises:
            InvalidArgumentError: It is no such thing, or does not go with what is heard already.
            AlreadyError: It is on already.
            UnsupportedError: The CPU, this Xen or its library cannot tell of it.
        """
        self._check_open()
        wanted = subscription(which)
        if wanted.key in self._enabled:
            raise AlreadyError(f"{self!r} hears of {_words(wanted)} already", domid=self._domid)
        self._check_gate(wanted)
        if wanted.deniable:
            self._backend.monitor_control_registers(self._domid)
            self._gates_writes = True
        if wanted.switch is not None:
            if wanted.key != SINGLESTEP_ON.key:  # which goes with the ring, when steps are over
                self._undo.push(
                    f"{_words(wanted)} of domain {self._domid}", partial(self._turn_off, wanted)
                )
            try:
                self._turn(wanted, True)
            except AlreadyError:
                # Nobody else can be listening: somebody has left it on, with his own options.
                _LOG.info("%r: %s was left on, and is switched anew", self, _words(wanted))
                self._turn(wanted, False)
                self._turn(wanted, True)
        self._enabled[wanted.key] = wanted
        self._keeps_views_going |= wanted.event in (MemAccess, SoftwareBreakpoint)

    @uninterruptible
    def disable(self, which: Subscription | type[Event]) -> None:
        """Hear no more of something that was enabled through this handle.

        Raises:
            InvalidArgumentError: It was not.
        """
        super()._check_open()  # without a ring, too: a child may be closed once more
        unwanted = subscription(which)
        if unwanted.key not in self._enabled:
            raise InvalidArgumentError(f"{self!r} does not hear of {_words(unwanted)}")
        self._turn_off(self._enabled[unwanted.key])

    def _check_gate(self, wanted: Subscription) -> None:
        """Refuse deniable writes beside some whose vCPU does not wait.

        Xen puts those off, too, but until it happens to schedule the vCPU anew: meanwhile the
        guest goes on without them (``hvm_set_cr3``, ``hvm_do_resume``).
        """
        if wanted.deniable or self._gates_writes:
            for each in (wanted, *self._enabled.values()):
                index, sync = (each.options.get(name) for name in ("index", "sync"))
                if each.event is WriteCtrlreg and index in DENIABLE and not sync:
                    raise InvalidArgumentError(
                        f"a monitor with deniable register writes cannot hear of {_words(each)} "
                        "with sync=False: the guest would go on before the register is written",
                        domid=self._domid,
                    )

    def _turn(self, subscription: Subscription, on: bool) -> None:
        assert subscription.switch is not None
        word = "disable" if subscription.switch == "monitor_inguest_pagefault" else "enable"
        switch = getattr(self._backend, subscription.switch)
        switch(self._domid, **{word: on, **subscription.options})

    def _turn_off(self, subscription: Subscription) -> None:
        if subscription.key not in self._enabled:
            return
        if subscription.switch is not None:
            with contextlib.suppress(AlreadyError):
                self._turn(subscription, False)
        del self._enabled[subscription.key]

    @property
    def subscriptions(self) -> tuple[Subscription, ...]:
        """What it hears of, whoever enabled it, by the switch."""
        return tuple(sorted(self._enabled.values(), key=lambda one: str(one.key)))

    def answer_by_default(self, handler: Handler) -> None:
        """Have a handler asked what to answer where nobody has answered.

        The latest is asked first; where all return None, the event's default response is taken.
        What one raises is raised where the monitor is listened to, once the vCPU was resumed.

        Raises:
            InvalidArgumentError: It is no function, or an async one.
        """
        self._check_open()
        check_callback(handler)
        self._answerers.append(handler)

    def _close_first(self, handle: Handle) -> None:
        """Have something closed before this monitor is: what needs its events to be answered."""
        self._check_open()
        self._children = [child for child in self._children if not child.closed] + [handle]

    # Listening.

    def fileno(self) -> int:
        """Return a file descriptor that is readable when there is something to do.

        For event loops of one's own: when it is, call ``next(monitor.events(timeout=0), None)``
        until that is None.
        """
        self._check_open()
        return self._poller.fileno()

    def stop(self) -> None:
        """End the iteration that runs, or the next one; from any thread or signal handler."""
        with self._stop_lock:
            if self._attached:
                self._stopping = True
                os.eventfd_write(self._wakeup, 1)

    def events(
        self, timeout: float | None = None, *, seconds: float | None = None
    ) -> Generator[Event, None, None]:
        """Yield what happens, each event after the one before it was answered.

        What is not answered by :meth:`Event.reply` gets the event's default response when the next
        event is asked for. A :class:`DomainEnded` is the last.

        Args:
            timeout: How many seconds nothing may happen before the iteration ends; None waits
                for ever.
            seconds: How many seconds the iteration takes in all, however much happens.

        Raises:
            InvalidArgumentError: A time is not a number, or negative.
            BusyError: Somebody iterates already.
            RingError: The ring holds something that is not an event. Its vCPU is answered.
        """
        _check_seconds(timeout=timeout, seconds=seconds)
        return self._events(timeout, seconds)

    def _events(self, timeout: float | None, seconds: float | None) -> Generator[Event, None, None]:
        with self._iteration():
            until = self._end_of(seconds)
            while self._attached and (event := self._next(timeout, until)) is not None:
                yield event
                self._settle()
                if type(event) is DomainEnded:
                    return

    def run(
        self, handler: Handler, timeout: float | None = None, *, seconds: float | None = None
    ) -> None:
        """Call a handler for each event and answer with what it returns.

        What it raises is raised here, after the vCPU got the event's default response.

        Args:
            handler: Gets an event, returns its response; None is the default one, unless it has
                replied already. Responses that are made once and returned often are cheap.
            timeout: As for :meth:`events`.
            seconds: As for :meth:`events`; a handler that is running is waited for.

        Raises:
            InvalidArgumentError: The handler cannot be called, or is async; a time is not a number,
                or negative; or the handler has returned what is no response, or one that does not
                fit its event, which has got its default response then.
        """
        check_callback(handler)
        _check_seconds(timeout=timeout, seconds=seconds)
        with self._iteration():
            until = self._end_of(seconds)
            while self._attached and (event := self._next(timeout, until)) is not None:
                response = handler(event)
                if not self._attached:
                    return  # the handler has closed it: the event was answered then
                if type(event) is DomainEnded:
                    return
                if response is not None:
                    self._answer(event, response)
                else:
                    self._settle()
                if not (self._let_through or self._stopping):
                    self._serve(handler, timeout, until)

    def _end_of(self, seconds: float | None) -> float | None:
        """Return when an iteration of so many seconds ends, by the backend's clock."""
        return None if seconds is None else self._clock.monotonic() + seconds

    def _is_over(self, until: float | None) -> bool:
        return self._stopping or (until is not None and self._clock.monotonic() >= until)

    def _serve(self, handler: Handler, timeout: float | None, until: float | None) -> None:
        """Do what :meth:`run` does, as long as nothing is out of the ordinary.

        All of it is in one function: calls and lookups are most of what an event costs in Python.
        """
        ring, indices, slots = self._ring, self._ring.indices, self._ring.slots
        poll, pending, unmask, notify = self._poll, self._pending, self._unmask, self._notify
        plan_of, last, version = self._plans.get, self._last, self.version
        delayed = self._delayed
        wait = _LIVENESS_SECONDS if timeout is None else min(timeout, _LIVENESS_SECONDS)
        signalled = [(self._backend.evtchn_fd(self._channel), select.EPOLLIN)]
        taken, answered, outstanding, stepping = ring.state
        notified = self._notified
        # Not "while not outstanding": CPython 3.11 warms up at unconditional jumps only.
        while True:
            if outstanding:
                return
            if indices[REQ_PROD] == taken:
                if answered != notified:
                    indices[RSP_PROD] = answered
                    if notify() < 0:
                        return
                    self._notified = notified = answered
                if until is not None:
                    wait = min(wait, until - self._clock.monotonic())
                    if wait <= 0:
                        return
                ready = poll(wait)
                if ready == signalled:
                    pending()
                    unmask()
                elif not self._heed(ready) or self._stopping:
                    return
                if not 0 < (indices[REQ_PROD] - taken) & MASK <= SLOTS:
                    return
            elif answered != notified and not taken & _FLUSH_EACH:
                self._flush()  # many are waiting: vCPUs may be, for room
                notified = self._notified
                if self._is_over(until):
                    return
            raw = slots[taken & SLOT_MASK].tobytes()
            head = _unpack(raw)
            said, asked, reason, vcpu, _ = head
            if said != version:
                return
            if delayed and vcpu in delayed:
                return  # only this vCPU's answer needs more than a plan
            event = _CLASSES[reason]()
            request = (taken, raw)
            event._request, event._head, event._monitor = request, head, self
            taken = (taken + 1) & MASK
            # Taken before the handler sees it: whatever it raises, _end() answers the request.
            ring.state = in_hand = (taken, answered, (request,), stepping)
            response = handler(event)
            plan = plan_of(id(response))
            if (
                plan is None
                or not plan.plain
                or plan.through._closed
                or plan.back_to._closed
                or asked & plan.needs != plan.needs
                or ring.state is not in_hand  # the handler has replied, or closed the monitor
                or (delayed and vcpu in delayed)  # the handler has had a page removed
            ):
                if not self._attached:
                    return  # the handler has closed it: the event was answered then
                if response is not None:
                    self._answer(event, response)
                else:
                    self._settle()
                if self._let_through:
                    return
                taken, answered, outstanding, stepping = ring.state
                continue
            row = stepping and stepping >> (vcpu & _VCPU_MASK) & 1
            flags, steps = plan.rows[_DONE if reason == _SINGLESTEP else row]
            _pack_into(
                slots[answered & SLOT_MASK], 0,
                version, flags | asked & _PAUSED, reason, vcpu, plan.view, plan.union or raw[_U],
            )  # fmt: skip
            if steps or stepping:
                bit = 1 << (vcpu & _VCPU_MASK)
                stepping = stepping | bit if steps else stepping & ~bit
            answered = (answered + 1) & MASK
            ring.state = (taken, answered, (), stepping)
            last[vcpu] = plan.response

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        """As :meth:`events`, for ``async for``.

        Other tasks of the loop get their turn at least every millisecond, between two events.
        """
        import asyncio  # not before: it loads ssl, and most programs have no use for it

        loop, clock = asyncio.get_running_loop(), self._clock
        ready = asyncio.Event()
        with self._iteration():
            descriptor = self._poller.fileno()
            loop.add_reader(descriptor, ready.set)

            def leave() -> None:
                loop.remove_reader(descriptor)
                ready.set()

            self._leave_loop = leave
            try:
                turn_ends = clock.monotonic() + _TURN_SECONDS
                while self._attached:
                    ready.clear()
                    event = self._next(0)
                    if event is None:
                        if self._stopping:
                            return
                        try:
                            await asyncio.wait_for(ready.wait(), _LIVENESS_SECONDS)
                        except TimeoutError:
                            event = self._ended() if self._attached else None
                        turn_ends = clock.monotonic() + _TURN_SECONDS
                    if event is not None:
                        yield event
                        self._settle()
                        if type(event) is DomainEnded:
                            return
                    if self._attached and clock.monotonic() >= turn_ends:
                        self._flush()  # the turn of others may be long
                        await asyncio.sleep(0)
                        turn_ends = clock.monotonic() + _TURN_SECONDS
            finally:
                self._end_loop()

    def _end_loop(self) -> None:
        """Take the poller out of the event loop, before its number becomes another file's.

        A generator that was left by ``break`` ends only after its monitor was closed.
        """
        leave, self._leave_loop = self._leave_loop, None
        if leave is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                leave()

    @contextlib.contextmanager
    def _iteration(self) -> Iterator[None]:
        """Iterate, one at a time; whatever ends it, no event that was handed out stays unanswered.

        What the handler raised comes out of it, even if answering fails, too.
        """
        self._check_open()
        if self._iterating:
            raise BusyError(f"{self!r} is being iterated already", domid=self._domid)
        try:
            self._iterating = True
            yield
            self._end()
        except BaseException as error:  # also Ctrl-C within that _end()
            try:
                self._end()
            except XenError as failure:
                add_failure(error, failure)
            raise

    def _end(self) -> None:
        """Answer what was handed out, and show Xen the answers."""
        self._iterating = False
        try:
            if self._attached:
                self._settle()
        finally:
            with guard.holding_back(), self._stop_lock:
                if self._attached:
                    for request in self._ring.outstanding:
                        self._resume(request)  # an exception has kept its response from it
                    if self._stopping:
                        self._stopping = False
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(self._wakeup)
                    self._flush()

    def _event(self, request: Request) -> Event:
        """Wrap a request."""
        head = _unpack(request[1])
        event = _CLASSES[head[2]]()
        event._request, event._head, event._monitor = request, head, self
        return event

    def _next(self, timeout: float | None, until: float | None = None) -> Event | None:
        """Return the next event; None after a stop, or where nothing happens for long enough."""
        while True:
            request = None if self._is_over(until) else self._ring.take()
            if request is None:
                ended = self._await_more(timeout, until)
                if ended is _NOT_YET:
                    continue
                return ended
            if not request[0] & _FLUSH_EACH:
                self._flush()  # many are waiting: vCPUs may be, for room
            event = self._event(request)
            if event.version != self.version:
                raise RingError(
                    f"a request of interface version {event.version} where Xen said {self.version}",
                    domid=self._domid,
                    vcpu=event.vcpu,
                )
            if self._let_through and self._ends_let_through(event):
                continue
            if event._head[3] in self._delayed and self._comes_again(event):
                continue
            return event

    def _ends_let_through(self, event: Event) -> bool:
        """Turn what was let through on again once its vCPU has stepped over it."""
        _, _, reason, vcpu, _ = event._head
        if reason != _SINGLESTEP or vcpu not in self._let_through:
            return False
        self._turn(self._let_through.pop(vcpu), True)
        self._answer(event, RESUME)
        return True

    def _await_more(self, timeout: float | None, until: float | None) -> DomainEnded | None:
        """Show Xen the responses, then wait until there may be a request.

        Returns:
            ``_NOT_YET`` where the ring should be looked at again, else what iterating ends with.
        """
        self._flush()
        begun = looked = self._clock.monotonic()
        while not self._is_over(until):
            wait = _LIVENESS_SECONDS
            if timeout is not None:
                wait = max(min(wait, begun + timeout - self._clock.monotonic()), 0)
            if until is not None:
                wait = max(min(wait, until - self._clock.monotonic()), 0)
            if self._heed(self._poll(wait)) and self._ring.unread:
                return _NOT_YET
            now = self._clock.monotonic()
            if timeout is not None and now >= begun + timeout:
                return self._ended() if timeout else None
            if now >= looked + _LIVENESS_SECONDS and not self._stopping:
                looked = now
                if (ended := self._ended()) is not None:
                    return ended
        return None

    def _heed(self, ready: list[tuple[int, int]]) -> bool:
        """Take what the poller has found, but for a stop; tell whether the ring was signalled."""
        signalled = False
        for descriptor, _ in ready:
            if descriptor != self._wakeup:
                self._pending()
                self._unmask()
                signalled = True
        return signalled

    def _ended(self) -> DomainEnded | None:
        """Look whether the domain is still there."""
        info = self.domain._find()
        if info is None or info.dying:
            return DomainEnded(None)
        return DomainEnded(info.shutdown_reason) if info.shutdown else None

    # Answering.

    def reply(self, event: Event, response: Response) -> None:
        """Answer an event; see :meth:`Event.reply`."""
        self._check_open()
        self._answer(event, response)

    def _settle(self) -> None:
        """Give everything that is unanswered its default response.

        What an answerer raises is raised once everything is answered.
        """
        failure: BaseException | None = None
        for request in self._ring.outstanding:
            try:
                self._answer_by_default(request)
            except BaseException as error:  # noqa: BLE001 - raised below
                failure = failure or error
        if failure is not None:
            raise failure

    def _answer_by_default(self, request: Request) -> None:
        """Answer a request as its answerers say, or by its event's default response.

        If one of them fails, the vCPU is merely resumed: what it did comes again, or was done.
        """
        event = self._event(request)
        try:
            if event.version != self.version:
                return
            for answerer in reversed(self._answerers):
                response = answerer(event)
                if not self._is_unanswered(request):
                    return
                if response is not None:
                    self._answer(event, response)
                    return
            try:
                self._answer(event, event.default_response)
            except XenError as error:
                _LOG.warning("%r is resumed, for its default response fails: %s", event, error)
        finally:
            if self._is_unanswered(request):
                self._resume(request)

    def _is_unanswered(self, request: Request) -> bool:
        return any(one is request for one in self._ring.outstanding)

    def flush(self) -> None:
        """Let Xen take the answers given so far: it has when this returns."""
        self._check_open()
        self._flush()

    def _resume(self, request: Request) -> None:
        """Let a vCPU go on and ask for nothing else."""
        head = _unpack(request[1])
        self._ring.answer(request, head, head[1] & _PAUSED)
        self._last[head[3]] = RESUME

    def _flush(self) -> None:
        """Let Xen take the responses: it has when this returns."""
        shown = self._ring.publish()
        if shown != self._notified:
            if self._notify() < 0:
                self._backend.evtchn_notify(self._channel, self._port)  # which says what is wrong
            self._notified = shown

    def _answer(self, event: Event, response: Response) -> None:
        """Write a response into the ring."""
        if not isinstance(response, Response):
            raise InvalidArgumentError(
                f"an event is answered by a Response, not {response!r}; a handler may return None"
            )
        if event._head[3] in self._delayed:
            response = self._in_time(event, response)
        plan = self._plans.get(id(response)) or self._plan(event, response)
        head = event._head
        _, asked, reason, vcpu, _ = head
        if asked & plan.needs != plan.needs or plan.through._closed or plan.back_to._closed:
            self._check_fits(event, response)
        request = event._request
        stepping = self._ring.state[3]
        flags, steps = plan.rows[
            _DONE if reason == _SINGLESTEP else stepping >> (vcpu & _VCPU_MASK) & 1
        ]
        flags |= asked & _PAUSED
        bit = 1 << (vcpu & _VCPU_MASK)
        stepping = stepping | bit if steps else stepping & ~bit
        union = plan.union or request[1][_U]
        data = plan.data
        if response.registers:
            data = patch_registers(self.version, request[1], response.registers)
        self._ring.answer(request, head, flags, plan.view, union, data, stepping)
        self._last[vcpu] = response

    def _plan(self, event: Event, response: Response) -> Plan:
        """Check a response and work out what is the same whichever event it answers."""
        self._check_open()
        if event._monitor is None:
            raise InvalidArgumentError(f"{event!r} did not come from a monitor")
        self._check_fits(event, response)
        action = response.action
        if action in _STEPS:
            self._has_stepped = True
            if action is not Action.FAST_SINGLESTEP or not self._release.fast_singlestep_alone:
                self._hear_singlesteps()
        if action is Action.LET_THROUGH:
            self._lift(event)
        elif action is Action.REINJECT:
            self._inject(event)
        plan = Plan(response)
        if action not in FITTING:  # those must be checked, or do something, each time
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[id(response)] = plan
        return plan

    def _hear_singlesteps(self) -> None:
        """Turn single-step events on: without them a step never ends (``hvm_monitor_debug``)."""
        if SINGLESTEP_ON.key not in self._enabled:
            self.enable(SINGLESTEP_ON)

    def _lift(self, event: Event) -> None:
        for subscription in self._enabled.values():
            if subscription.event is type(event):
                with contextlib.suppress(AlreadyError):
                    self._turn(subscription, False)
                self._let_through[event.vcpu] = subscription
                return
        raise InvalidArgumentError(f"{self!r} has not turned on what sent {event!r}")

    def _check_fits(self, event: Event, response: Response) -> None:
        """Refuse a response that Xen would take for another, or for none."""
        action = response.action
        moves = response.view is not None or response.back_to is not None
        problem = None
        if not event.paused:
            if response != RESUME:
                problem = "the vCPU did not wait: it can only be resumed"
        elif moves and event.view is None:
            problem = "altp2m is off: there are no views"
        elif action in FITTING:
            problem = misfit(event, response, self._gates_writes)
        if problem is not None:
            raise InvalidArgumentError(
                f"{action.value} cannot answer {event!r}: {problem}", domid=self._domid
            )
        for view in (response.view, response.back_to):
            if view is not None:
                self._check_view(view)

    def _check_view(self, view: View | ViewId) -> None:
        """Refuse a view that is gone, and tell altp2m's handle that vCPUs leave where it put them.

        Xen ignores a switch to a view that does not exist, and a fast single-step back to a number
        beyond its limit (``hvm_fast_singlestep``).
        """
        if isinstance(view, int):
            if view >= self._release.most_views:
                raise InvalidArgumentError(f"there is no view {view}", domid=self._domid)
        elif view._closed or view._domid != self._domid:
            raise InvalidArgumentError(
                f"{view!r} is not an open view of domain {self._domid}", domid=self._domid
            )
        if not self._switches_views and (altp2m := self._altp2m) is not None:
            altp2m._moved = True
            self._switches_views = True

    def _inject(self, event: Event) -> None:
        assert isinstance(event, SoftwareBreakpoint | DebugException)
        vector = BP if isinstance(event, SoftwareBreakpoint) else DB
        vcpu, kind = int(event.vcpu), int(event.type)
        # Busy: another one is still to be delivered, for hvm_do_resume put it off while a device
        # model forgot a page, or another agent injected it. The instruction comes again after it.
        with contextlib.suppress(BusyError):
            self._backend.hvm_inject_trap(
                self._domid, vcpu, vector, kind, NO_ERROR_CODE, event.insn_length, 0
            )

    @property
    def _altp2m(self) -> Altp2m | None:
        return self.domain._anybody_s_altp2m()

    # Closing.

    def _take_back(self) -> None:
        doing = f"closing {self!r}"
        undo, own = UndoList(), UndoList()
        what = f"monitor of domain {self._domid}"
        own.push(what, lambda: self._undo.unwind(doing), needs_rest=True)
        own.push(f"vCPUs of domain {self._domid} in views", self._leave_views)
        undo.push("", lambda: own.unwind(doing))
        for child in self._children:
            undo.push("", child.close)
        undo.unwind(doing)

    @uninterruptible
    def _lay_down(self) -> None:
        """Give all back, to be set up again by :meth:`_take_up`; what it answers is laid down."""
        heard = self.subscriptions
        self._leave_views()
        self._undo.unwind(f"laying down {self!r}")
        self._heard = heard
        guard.leave()
        super().abandon()

    @uninterruptible
    def _take_up(self) -> None:
        self._set_up(self._heard)
        self.domain._monitor = self

    @uninterruptible
    def abandon(self) -> None:
        """Close without undoing anything but what is this process's own: the domain is gone."""
        if self.closed:
            return
        self._detach()
        with contextlib.suppress(XenError):
            self._own.unwind(f"abandoning {self!r}")
        guard.leave()
        super().abandon()

    def _disable(self) -> None:
        """Answer everything, let the answers take effect, and give the ring back.

        A response's effect on registers waits in memory that disabling frees
        (``vm_event_cleanup_domain``) until its vCPU runs: so they must run in between.
        """
        if not self._enabled_in_xen:
            return
        self._leave_views()
        self._answer_all()
        self._await_vcpus()
        for attempt in range(_DISABLE_TRIES):
            last = attempt == _DISABLE_TRIES - 1
            try:
                with self.domain.paused():
                    late = self._answer_all()  # vCPUs that had waited for room
                    if last or not (late and self._gates_writes):
                        for vcpu in sorted(self._last) if self._has_stepped else ():
                            self._backend.domain_debug_control(self._domid, SINGLE_STEP_OFF, vcpu)
                        self._give_back()
                        return
                self._await_vcpus()
            except BusyError as error:
                if last:
                    raise
                _LOG.debug("%r: to be disabled again: %s", self, error.message)
            self._clock.sleep(_SETTLE_STEP)  # vCPUs that wait for room must run to find some

    def _give_back(self) -> None:
        try:
            self._backend.monitor_disable(self._domid)
        except InvalidArgumentError:
            if has_ring(self._backend, self._domid):
                raise  # else somebody has disabled it
        self._enabled_in_xen = False
        self.domain._journal.undone(monitor=False)
        _LOG.info("%r: detached", self)

    def _let_go(self) -> None:
        """Let go of the ring and the event channel, unless they are needed to try again."""
        if self._enabled_in_xen:
            raise BusyError(f"{self!r} is still enabled", domid=self._domid)
        self._detach()
        self._own.unwind(f"closing {self!r}")

    def _leave_views(self) -> None:
        """Have the vCPUs leave views in which nobody would hear them."""
        if self._switches_views or self._keeps_views_going:
            altp2m = self._altp2m
            if altp2m is not None:
                altp2m._switch_back()

    def _answer_all(self) -> bool:
        """Let every vCPU go on; tell whether one has waited for an answer.

        Where the ring does not tell who waits, each is answered for; one that does not wait
        ignores it (``vm_event_resume``).
        """
        waited = False
        try:
            self._flush()  # again, where a notification has failed
            for _ in range(_DISABLE_TRIES):  # a switch that stays on must not keep it for ever
                if not (self._ring.unread or self._ring.outstanding):
                    break
                waited = True
                while self._ring.take() is not None:
                    pass
                for request in self._ring.outstanding:
                    self._resume(request)
                self._flush()
        except RingError as error:
            if not self._damaged:
                _LOG.warning("%r: each vCPU is resumed, for %s", self, error.message)
                for vcpu in range(self._vcpus):
                    self._ring.force(self.version, vcpu, _PAUSED)
                    self._flush()
            self._damaged = True
        return waited

    def _await_vcpus(self) -> None:
        """Wait, not for long, until the vCPUs that were answered have run."""
        info = self.domain._find()
        if info is None or info.paused or info.shutdown or info.dying:
            return
        seconds = _SETTLE_SECONDS_OF_WRITES if self._gates_writes else _SETTLE_SECONDS
        end = self._clock.monotonic() + seconds
        waiting: dict[int, VcpuInfo | None] = dict.fromkeys(self._last)
        while waiting:
            for vcpu, before in list(waiting.items()):
                now = self._backend.vcpu_getinfo(self._domid, vcpu)
                ran = before is not None and now.cpu_time > before.cpu_time
                if now.blocked or (ran and self._returned(vcpu)):
                    del waiting[vcpu]
                elif before is None:
                    waiting[vcpu] = now
            if not waiting:
                return
            if self._clock.monotonic() > end:
                _LOG.info("%r: vCPUs %s have not run since their answers", self, sorted(waiting))
                return
            self._clock.sleep(_SETTLE_STEP)

    def _returned(self, vcpu: int) -> bool:
        """Tell whether a vCPU's fast single-step has ended."""
        response = self._last[vcpu]
        if response.back_to is None:
            return True
        back_to = view_number(response.back_to)
        try:
            return self._backend.altp2m_get_vcpu_p2m_idx(self._domid, vcpu) == back_to
        except XenError:
            return True  # altp2m is off by now

    def _orphaned(self) -> bool:
        return self.domain._orphaned()


def has_ring(backend: Backend, domid: int) -> bool:
    """Tell whether a ring is enabled: resuming says so, and does what is asked for in it."""
    try:
        backend.monitor_resume(domid)
    except XenError as error:
        return error.errno != ENODEV
    return True


def _check_seconds(**times: float | None) -> None:
    """Refuse times that are none."""
    for name, value in times.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise InvalidArgumentError(
                f"{name} is a number of seconds, 0 or more, or None: not {value!r}"
            )


def subscription(wanted: Subscription | type[Event]) -> Subscription:
    """Return the subscription to a kind of event.

    Raises:
        InvalidArgumentError: It is none, or the kind wants options.
    """
    if isinstance(wanted, Subscription):
        return wanted
    if isinstance(wanted, type) and issubclass(wanted, Event):
        return wanted.on()
    raise InvalidArgumentError(f"{wanted!r} is neither a kind of event nor what its on() returns")


def _words(subscription: Subscription) -> str:
    name = subscription.switch or str(getattr(subscription.event, "__name__", ""))
    which = [str(value) for value in subscription.key[1:]]
    return " ".join([name.removeprefix("monitor_"), *which])


def _other_agents() -> Iterator[str]:
    """Name the processes that may hold a monitor: those with an event channel open."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            files = [str(link.readlink()) for link in (directory / "fd").iterdir()]
            name = (directory / "comm").read_text().strip()
        except OSError:
            continue
        if "/dev/xen/evtchn" in files and not name.startswith(("xenstored", "xenconsoled", "qemu")):
            who = (
                "this process"
                if int(directory.name) == os.getpid()
                else f"process {directory.name}"
            )
            yield f"{who} ({name}) has an event channel open and may be the agent"
