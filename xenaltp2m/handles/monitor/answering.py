# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answer each request of a monitor exactly once, by a response that fits its event."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TypeAlias

from xenaltp2m.abi.ring import Request
from xenaltp2m.abi.vm_event import HEAD, Flag, Reason, patch_registers
from xenaltp2m.abi.x86 import BP, DB, NO_ERROR_CODE
from xenaltp2m.errors import BusyError, InvalidArgumentError, XenError
from xenaltp2m.handles.base import Handle
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.monitor.connection import RingConnection
from xenaltp2m.handles.monitor.late_answers import LateAnswers
from xenaltp2m.handles.monitor.response_encoding import (
    FITTING,
    EncodedResponse,
    mismatch_reason,
)
from xenaltp2m.handles.monitor.subscriptions import Subscriptions
from xenaltp2m.types import ViewId
from xenaltp2m.values.events import (
    EVENTS,
    Answerer,
    DebugException,
    Event,
    SoftwareBreakpoint,
    Subscription,
    UnknownEvent,
)
from xenaltp2m.values.responses import RESUME, Action, OpenView, Response

_LOG = logging.getLogger(__package__)
Handler: TypeAlias = Callable[[Event], Response | None]

_U = slice(24, 56)
# Plain numbers, because enums are slow.
PAUSED = int(Flag.VCPU_PAUSED)
SINGLESTEP = int(Reason.SINGLESTEP)
DONE = 2
"""The row of an :class:`EncodedResponse` for a vCPU that has done its step."""
VCPU_MASK = 0x1FFF
"""Bounds the vCPU number of a damaged request: no domain of Xen has more vCPUs."""
_MOST_PLANS = 64
_STEPS = frozenset({Action.SINGLESTEP, Action.FAST_SINGLESTEP, Action.LET_THROUGH})
_unpack = HEAD.unpack_from


class _Classes(dict[int, type[Event]]):
    """The event class of each reason, unknown reasons included."""

    def __missing__(self, reason: int) -> type[Event]:
        return UnknownEvent


CLASSES = _Classes(EVENTS)


class DefaultHandlers:
    """The handlers for events that were not answered; the latest is called first."""

    def __init__(self) -> None:
        self._handlers: list[Handler] = []

    def add(self, handler: Handler) -> None:
        """Add a handler; it replaces closed handles of its class, whose events it answers."""
        kept = [
            one
            for one in self._handlers
            if not (type(one) is type(handler) and isinstance(one, Handle) and one.closed)
        ]
        self._handlers = [*kept, handler]

    def latest_first(self) -> list[Handler]:
        """List the handlers, the latest first."""
        return self._handlers[::-1]


class Answering:
    """Writes responses into a ring.

    Attributes:
        plans: Encoded responses, by the ``id`` of the response, which the plan keeps alive.
        last: The last response to each vCPU.
        late: The vCPUs that would ignore a response now.
        let_through: The subscription that is off during a vCPU's step, by vCPU.
        has_stepped: Whether a response has made some vCPU single-step.
        switches_views: Whether a response has moved some vCPU to a view.
    """

    def __init__(
        self,
        context: DomainContext,
        connection: RingConnection,
        subscriptions: Subscriptions,
        late: LateAnswers,
        default_handlers: DefaultHandlers,
        owner: Answerer,
    ) -> None:
        self._context, self._connection = context, connection
        self._subscriptions, self._owner = subscriptions, owner
        self._default_handlers, self._version = default_handlers, connection.version
        self._backend, self._release = context.backend, context.release
        self._domid = int(context.domid)
        self.plans: dict[int, EncodedResponse] = {}
        self.last: dict[int, Response] = {}
        self.late = late
        self.let_through: dict[int, Subscription] = {}
        self.has_stepped = self.switches_views = False

    def event(self, request: Request) -> Event:
        """Wrap a request in an event."""
        head = _unpack(request[1])
        event = CLASSES[head[2]]()
        event.request, event.head, event.monitor = request, head, self._owner
        return event

    # Unanswered requests.

    def settle(self) -> None:
        """Answer every unanswered request by default.

        An exception of a default handler is raised after everything is answered.
        """
        failure: BaseException | None = None
        for request in self._connection.ring.outstanding:
            try:
                self._answer_by_default(request)
            except BaseException as error:  # noqa: BLE001 - raised below
                failure = failure or error
        if failure is not None:
            raise failure

    def _answer_by_default(self, request: Request) -> None:
        """Answer a request by the default handlers, or by its event's default response.

        If one of them fails, the vCPU is only resumed: its event comes again, or has taken effect.
        """
        event = self.event(request)
        try:
            if event.version != self._version:
                return
            for handler in self._default_handlers.latest_first():
                response = handler(event)
                if not self._is_unanswered(request):
                    return
                if response is not None:
                    self.answer(event, response)
                    return
            try:
                self.answer(event, event.default_response)
            except XenError as error:
                _LOG.warning("%r is resumed, because its default response fails: %s", event, error)
        finally:
            if self._is_unanswered(request):
                self.resume(request)

    def _is_unanswered(self, request: Request) -> bool:
        return any(one is request for one in self._connection.ring.outstanding)

    def resume(self, request: Request) -> None:
        """Answer a request by a plain resume."""
        head = _unpack(request[1])
        self._connection.ring.answer(request, head, head[1] & PAUSED)
        self.last[head[3]] = RESUME

    # Answering.

    def answer(self, event: Event, response: Response) -> None:
        """Write a response into the ring.

        Raises:
            InvalidArgumentError: It does not fit the event, which can still be answered.
            AlreadyError: The event was answered already.
        """
        if not isinstance(response, Response):
            raise InvalidArgumentError(
                f"an event is answered by a Response, not {response!r}; a handler may return None"
            )
        if event.head[3] in self.late.vcpus:
            whole = response
            response = self.late.defer(event, whole, lambda: self._check_fits(event, whole))
        plan = self.plans.get(id(response)) or self._plan(event, response)
        head = event.head
        _, asked, reason, vcpu, _ = head
        if asked & plan.needs != plan.needs or plan.through.closed or plan.back_to.closed:
            self._check_fits(event, response)
        request, ring = event.request, self._connection.ring
        stepping = ring.state[3]
        flags, steps = plan.rows[
            DONE if reason == SINGLESTEP else stepping >> (vcpu & VCPU_MASK) & 1
        ]
        flags |= asked & PAUSED
        bit = 1 << (vcpu & VCPU_MASK)
        stepping = stepping | bit if steps else stepping & ~bit
        union = plan.union or request[1][_U]
        data = plan.data
        if response.registers:
            data = patch_registers(self._version, request[1], response.registers)
        ring.answer(request, head, flags, plan.view, union, data, stepping)
        self.last[vcpu] = response

    def _plan(self, event: Event, response: Response) -> EncodedResponse:
        """Check a response, and encode the part that is the same for every event."""
        if event.monitor is None:
            raise InvalidArgumentError(f"{event!r} did not come from a monitor")
        self._check_fits(event, response)
        action = response.action
        if action in _STEPS:
            self.has_stepped = True
            if action is not Action.FAST_SINGLESTEP or not self._release.fast_singlestep_alone:
                self._subscriptions.enable_singlesteps()
        if action is Action.LET_THROUGH:
            self.let_through[event.vcpu] = self._subscriptions.lift(event)
        elif action is Action.REINJECT:
            self._inject(event)
        plan = EncodedResponse(response)
        if action not in FITTING:  # these must be checked, or do something, for each event
            if len(self.plans) >= _MOST_PLANS:
                self.plans.clear()
            self.plans[id(response)] = plan
        return plan

    def ends_let_through(self, event: Event) -> bool:
        """Enable a lifted subscription again, after its vCPU's single step."""
        _, _, reason, vcpu, _ = event.head
        if reason != SINGLESTEP or vcpu not in self.let_through:
            return False
        self._subscriptions.turn(self.let_through.pop(vcpu), True)
        self.answer(event, RESUME)
        return True

    def redeliver(self, event: Event) -> bool:
        """Answer an event that has come again with its kept response, if there is one."""
        kept = self.late.redeliver(event)
        if kept is None:
            return False
        self.answer(event, kept)
        return True

    def _check_fits(self, event: Event, response: Response) -> None:
        """Raise if a response does not fit: Xen would misread or ignore it."""
        action = response.action
        moves = response.view is not None or response.back_to is not None
        problem = None
        if not event.paused:
            if response != RESUME:
                problem = "the vCPU did not wait: it can only be resumed"
        elif moves and event.view is None:
            problem = "altp2m is off: there are no views"
        elif action in FITTING:
            problem = mismatch_reason(event, response, self._subscriptions.gates_writes)
        if problem is not None:
            raise InvalidArgumentError(
                f"{action.value} cannot answer {event!r}: {problem}", domid=self._domid
            )
        for view in (response.view, response.back_to):
            if view is not None:
                self._check_view(view)

    def _check_view(self, view: OpenView | ViewId) -> None:
        """Raise if a view is gone, and notify the altp2m handle that a response moves vCPUs.

        Xen ignores a switch to a view that does not exist, and a fast single-step back to a number
        beyond its limit (``hvm_fast_singlestep``).
        """
        if isinstance(view, int):
            if view >= self._release.most_views:
                raise InvalidArgumentError(f"there is no view {view}", domid=self._domid)
        elif view.closed or view.domid != self._domid:
            raise InvalidArgumentError(
                f"{view!r} is not an open view of domain {self._domid}", domid=self._domid
            )
        if not self.switches_views and (altp2m := self._context.anybodys_altp2m()) is not None:
            altp2m.note_vcpus_moved()
            self.switches_views = True

    def _inject(self, event: Event) -> None:
        assert isinstance(event, SoftwareBreakpoint | DebugException)
        vector = BP if isinstance(event, SoftwareBreakpoint) else DB
        vcpu, kind = int(event.vcpu), int(event.type)
        # EBUSY: another event is still pending, because hvm_do_resume delayed it while a device
        # model dropped a page, or because another agent injected it. After it the guest executes
        # the instruction again.
        with contextlib.suppress(BusyError):
            self._backend.hvm_inject_trap(
                self._domid, vcpu, vector, kind, NO_ERROR_CODE, event.insn_length, 0
            )
