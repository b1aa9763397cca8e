# SPDX-License-Identifier: LGPL-2.1-or-later
"""The event loop of a monitor: take requests from the ring, yield events, wait for more."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator, Iterator

from xenaltp2m.abi.ring import MASK, REQ_PROD, RSP_PROD, SLOT_MASK, SLOTS
from xenaltp2m.abi.vm_event import HEAD, RESPONSE_HEAD
from xenaltp2m.errors import BusyError, RingError, XenError, add_failure
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.monitor.answering import (
    CLASSES,
    DONE,
    PAUSED,
    SINGLESTEP,
    VCPU_MASK,
    Answering,
    Handler,
)
from xenaltp2m.handles.monitor.connection import RingConnection
from xenaltp2m.handles.signals import guard
from xenaltp2m.values.events import Answerer, DomainEnded, Event

_LIVENESS_SECONDS = 0.5
"""Idle interval between liveness checks: Xen does not signal a domain's death."""
_TURN_SECONDS = 0.001
"""How long ``async for`` yields events before other tasks get their turn."""
_FLUSH_EACH = 3
"""Mask of a request's index: a flush every 4 requests while the ring does not run empty."""
_U = slice(24, 56)
_NOT_YET = DomainEnded(None)
_unpack, _pack_into = HEAD.unpack_from, RESPONSE_HEAD.pack_into


class EventLoop:
    """Iterates over a ring's events.

    Attributes:
        iterating: Whether an iteration runs.
    """

    def __init__(
        self,
        context: DomainContext,
        connection: RingConnection,
        answering: Answering,
        owner: Answerer,
    ) -> None:
        self._context, self._connection, self._answering = context, connection, answering
        self._owner, self._version = owner, connection.version
        self._clock, self._domid = context.backend.clock, int(context.domid)
        self.iterating = False

    def __repr__(self) -> str:
        return repr(self._owner)

    # Four ways to iterate.

    def events(self, timeout: float | None, seconds: float | None) -> Generator[Event, None, None]:
        """See :meth:`Monitor.events`."""
        connection = self._connection
        with self._iteration():
            until = self._end_of(seconds)
            while connection.attached and (event := self._next(timeout, until)) is not None:
                yield event
                self._answering.settle()
                if type(event) is DomainEnded:
                    return

    def run(self, handler: Handler, timeout: float | None, seconds: float | None) -> None:
        """See :meth:`Monitor.run`."""
        connection, answering = self._connection, self._answering
        with self._iteration():
            until = self._end_of(seconds)
            while connection.attached and (event := self._next(timeout, until)) is not None:
                response = handler(event)
                if not connection.attached:
                    return  # the handler has closed the monitor, which answered the event
                if type(event) is DomainEnded:
                    return
                if response is not None:
                    answering.answer(event, response)
                else:
                    answering.settle()
                if not (answering.let_through or connection.stopping):
                    self._serve(handler, timeout, until)

    def _serve(self, handler: Handler, timeout: float | None, until: float | None) -> None:  # noqa: C901, PLR0912, PLR0915 - see below
        """Run the fast path of :meth:`run`; return for every case that it does not cover.

        It is one function, because calls and lookups are most of an event's cost in Python.
        """
        connection, answering, owner = self._connection, self._answering, self._owner
        ring, indices, slots = connection.ring, connection.ring.indices, connection.ring.slots
        poll, pending = connection.poll, connection.pending
        unmask, notify = connection.unmask, connection.notify
        plan_of, last, version = answering.plans.get, answering.last, self._version
        late = answering.late.vcpus
        wait = _LIVENESS_SECONDS if timeout is None else min(timeout, _LIVENESS_SECONDS)
        signalled = connection.signalled
        taken, answered, outstanding, stepping = ring.state
        notified = connection.notified
        # Not "while not outstanding": CPython 3.11 counts warm-up at unconditional jumps only.
        while True:
            if outstanding:
                return
            if indices[REQ_PROD] == taken:
                if answered != notified:
                    # The slots are filled: Xen may read them from now on (vm_event_get_response).
                    indices[RSP_PROD] = answered
                    if notify() < 0:
                        return
                    connection.notified = notified = answered
                if until is not None:
                    wait = min(wait, until - self._clock.monotonic())
                    if wait <= 0:
                        return
                ready = poll(wait)
                if ready == signalled:
                    pending()
                    unmask()
                elif not connection.heed(ready) or connection.stopping:
                    return
                if not 0 < (indices[REQ_PROD] - taken) & MASK <= SLOTS:
                    return
            elif answered != notified and not taken & _FLUSH_EACH:
                connection.flush()  # the ring is busy: vCPUs may be waiting for a free slot
                notified = connection.notified
                if self._is_over(until):
                    return
            raw = slots[taken & SLOT_MASK].tobytes()
            head = _unpack(raw)
            said, asked, reason, vcpu, _ = head
            if said != version:
                return
            if late and vcpu in late:
                return  # this vCPU may ignore its next response: the slow path defers it
            event = CLASSES[reason]()
            request = (taken, raw)
            event.request, event.head, event.monitor = request, head, owner
            taken = (taken + 1) & MASK
            # Marked as taken before the handler runs: if that raises, _end() answers the request.
            ring.state = in_hand = (taken, answered, (request,), stepping)
            response = handler(event)
            plan = plan_of(id(response))
            if (
                plan is None
                or not plan.plain
                or plan.through.closed
                or plan.back_to.closed
                or asked & plan.needs != plan.needs
                or ring.state is not in_hand  # the handler has replied, or closed the monitor
                or (late and vcpu in late)  # the handler has removed a page
            ):
                if not connection.attached:
                    return  # the handler has closed the monitor, which answered the event
                if response is not None:
                    answering.answer(event, response)
                else:
                    answering.settle()
                if answering.let_through:
                    return
                taken, answered, outstanding, stepping = ring.state
                continue
            row = stepping and stepping >> (vcpu & VCPU_MASK) & 1
            flags, steps = plan.rows[DONE if reason == SINGLESTEP else row]
            _pack_into(
                slots[answered & SLOT_MASK], 0,
                version, flags | asked & PAUSED, reason, vcpu, plan.view, plan.union or raw[_U],
            )  # fmt: skip
            if steps or stepping:
                bit = 1 << (vcpu & VCPU_MASK)
                stepping = stepping | bit if steps else stepping & ~bit
            answered = (answered + 1) & MASK
            ring.state = (taken, answered, (), stepping)
            last[vcpu] = plan.response

    async def each(self) -> AsyncGenerator[Event, None]:
        """See :meth:`Monitor.__aiter__`."""
        import asyncio  # late, because it imports ssl and few programs need it

        connection = self._connection
        loop, clock = asyncio.get_running_loop(), self._clock
        ready = asyncio.Event()
        with self._iteration():
            descriptor = connection.poller.fileno()
            loop.add_reader(descriptor, ready.set)

            def leave() -> None:
                loop.remove_reader(descriptor)
                ready.set()

            connection.leave_loop = leave
            try:
                turn_ends = clock.monotonic() + _TURN_SECONDS
                while connection.attached:
                    ready.clear()
                    event = self._next(0)
                    if event is None:
                        if connection.stopping:
                            return
                        try:
                            await asyncio.wait_for(ready.wait(), _LIVENESS_SECONDS)
                        except TimeoutError:
                            event = self._ended() if connection.attached else None
                        turn_ends = clock.monotonic() + _TURN_SECONDS
                    if event is not None:
                        yield event
                        self._answering.settle()
                        if type(event) is DomainEnded:
                            return
                    if connection.attached and clock.monotonic() >= turn_ends:
                        connection.flush()  # other tasks may run long
                        await asyncio.sleep(0)
                        turn_ends = clock.monotonic() + _TURN_SECONDS
            finally:
                connection.end_loop()

    # Shared by all of them.

    @contextlib.contextmanager
    def _iteration(self) -> Iterator[None]:
        """Allow one iteration at a time, and answer every yielded event, however it ends.

        The handler's exception is raised even if answering fails, too.
        """
        if self.iterating:
            raise BusyError(f"{self!r} is being iterated already", domid=self._domid)
        try:
            self.iterating = True
            yield
            self._end()
        except BaseException as error:  # also Ctrl-C within that _end()
            try:
                self._end()
            except XenError as failure:
                add_failure(error, failure)
            raise

    def _end(self) -> None:
        """Answer all yielded events, and notify Xen of the responses."""
        self.iterating = False
        connection = self._connection
        try:
            if connection.attached:
                self._answering.settle()
        finally:
            with guard.holding_back(), connection.stop_held_back():
                if connection.attached:
                    for request in connection.ring.outstanding:
                        self._answering.resume(request)  # an exception has prevented its response
                    connection.end_stop()
                    connection.flush()

    def _end_of(self, seconds: float | None) -> float | None:
        """Return when an iteration of that many seconds ends, by the backend's clock."""
        return None if seconds is None else self._clock.monotonic() + seconds

    def _is_over(self, until: float | None) -> bool:
        stopping = self._connection.stopping
        return stopping or (until is not None and self._clock.monotonic() >= until)

    def _next(self, timeout: float | None, until: float | None = None) -> Event | None:
        """Return the next event; None after a stop, a timeout, or the end of the given time."""
        connection, answering = self._connection, self._answering
        while True:
            request = None if self._is_over(until) else connection.ring.take()
            if request is None:
                ended = self._await_more(timeout, until)
                if ended is _NOT_YET:
                    continue
                return ended
            if not request[0] & _FLUSH_EACH:
                connection.flush()  # the ring is busy: vCPUs may be waiting for a free slot
            event = answering.event(request)
            if event.version != self._version:
                raise RingError(
                    f"a request of interface version {event.version} where Xen said "
                    f"{self._version}",
                    domid=self._domid,
                    vcpu=event.vcpu,
                )
            if answering.let_through and answering.ends_let_through(event):
                continue
            if event.head[3] in answering.late.vcpus and answering.redeliver(event):
                continue
            return event

    def _await_more(self, timeout: float | None, until: float | None) -> DomainEnded | None:
        """Notify Xen of the responses, then wait for a request.

        Returns:
            ``_NOT_YET`` if the ring has a request; else the last event of the iteration, or None.
        """
        connection = self._connection
        connection.flush()
        begun = looked = self._clock.monotonic()
        while not self._is_over(until):
            wait = _LIVENESS_SECONDS
            if timeout is not None:
                wait = max(min(wait, begun + timeout - self._clock.monotonic()), 0)
            if until is not None:
                wait = max(min(wait, until - self._clock.monotonic()), 0)
            if connection.heed(connection.poll(wait)) and connection.ring.unread:
                return _NOT_YET
            now = self._clock.monotonic()
            if timeout is not None and now >= begun + timeout:
                return self._ended() if timeout else None
            if now >= looked + _LIVENESS_SECONDS and not connection.stopping:
                looked = now
                if (ended := self._ended()) is not None:
                    return ended
        return None

    def _ended(self) -> DomainEnded | None:
        """Return an event if the domain has ended, or None if it has not."""
        info = self._context.find()
        if info is None or info.dying:
            return DomainEnded(None)
        return DomainEnded(info.shutdown_reason) if info.shutdown else None
