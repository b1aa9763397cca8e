# SPDX-License-Identifier: LGPL-2.1-or-later
"""A monitor: receive a domain's events, and answer each exactly once.

The loop copies a request's bytes out of the ring, wraps them in an
:class:`~xenaltp2m.values.events.Event`, and yields it or passes it to the handler. The event is
answered once: by a :class:`~xenaltp2m.values.responses.Response`, or by its default response when
the iteration goes on to the next event.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import aclosing
from functools import partial

from xenaltp2m.abi.vm_event import layout
from xenaltp2m.errors import ClosedError, InvalidArgumentError, UnsupportedError
from xenaltp2m.handles.base import Handle, UndoList, check_callback
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.monitor.answering import Answering, DefaultHandlers, Handler
from xenaltp2m.handles.monitor.connection import RingConnection
from xenaltp2m.handles.monitor.draining import Draining
from xenaltp2m.handles.monitor.late_answers import LateAnswers
from xenaltp2m.handles.monitor.loop import EventLoop
from xenaltp2m.handles.monitor.subscriptions import Subscriptions
from xenaltp2m.handles.signals import guard, uninterruptible
from xenaltp2m.values.events import Event, Subscription
from xenaltp2m.values.responses import Response

_LOG = logging.getLogger(__package__)


class Monitor(Handle):
    """A domain's monitor. Made by :meth:`xenaltp2m.handles.domain.Domain.monitor`.

    While a monitor is open in the main thread, SIGTERM and SIGHUP raise :class:`SystemExit` instead
    of killing the process, because a killed agent leaves its guest frozen. Signals that have a
    handler of your own keep it.

    Closing answers all unanswered events, waits until the vCPUs have taken their responses, ends
    single-stepping, disables what the monitor enabled, and frees the ring. If the monitor has
    subscribed to accesses or breakpoints, the vCPUs first leave the view they were moved to,
    because nothing would answer their events there.

    Thread-safety: :meth:`stop` may be called from anywhere, all else from one thread at a time.

    Attributes:
        context: The domain's context.
        version: Xen's vm_event interface version.
        access_required: Whether the domain crashes if a violation finds no monitor.
    """

    def __init__(
        self,
        context: DomainContext,
        subscriptions: tuple[Subscription, ...],
        access_required: bool,
    ) -> None:
        version, vcpus = _known_version(context), context.info().max_vcpu_id + 1
        super().__init__()
        self.context, self.version = context, version
        self.access_required = access_required
        self._default_handlers = DefaultHandlers()
        self._children: list[Handle] = []
        """Handles that need the monitor's events to be answered, and are closed before it."""
        self._attach(subscriptions, vcpus)

    @uninterruptible
    def _attach(self, subscriptions: tuple[Subscription, ...], vcpus: int) -> None:
        """Enable the monitor in Xen, and subscribe to events."""
        context, version = self.context, self.version
        self._domid = int(context.domid)
        self._connection = RingConnection(context, version)
        self._subscriptions = Subscriptions(context, self._undo)
        self._answering = Answering(
            context,
            self._connection,
            self._subscriptions,
            LateAnswers(context, vcpus),
            self._default_handlers,
            self,
        )
        self._draining = Draining(
            context, self._connection, self._subscriptions, self._answering, vcpus
        )
        self._loop = EventLoop(context, self._connection, self._answering, self)
        self._undo.push("", self._connection.let_go)
        guard.enter()  # first: from here on, a killed process would leave an enabled ring
        try:
            with self._undo.rolling_back(context.undo, unless=self._gone):
                self._connection.open_files()
                self._connection.open(self._undo, self._draining.disable)
                for wanted in subscriptions:
                    self.enable(wanted)
                if self.access_required:
                    self._require_access()
        except BaseException:
            self._connection.attached = False
            super().abandon()
            guard.leave()
            raise
        _LOG.info("%r: attached, vm_event version %d", self, self.version)

    def __repr__(self) -> str:
        return f"<Monitor of domain {int(self.context.domid)}>"

    def check_open(self) -> None:
        """Raise if it is closed, even in part.

        Raises:
            ClosedError: It is closed.
        """
        super().check_open()
        if not self._connection.attached:
            raise ClosedError(
                f"{self!r} was closed only in part and has no ring: call close() again",
                domid=self._domid,
            )

    def note_page_removed(self) -> None:
        """Expect Xen to delay responses: a page was removed from one of the domain's p2m tables.

        On its next resume each vCPU then only notifies device models. Registers, emulation and
        exceptions of a response take effect on the resume after that
        (``Release.removal_delays_answers``). Until a vCPU has been resumed once, such a response
        is kept until its event comes again, or carried out by other means.
        """
        self._answering.late.note_page_removed()

    def forget_views(self) -> None:
        """Drop encoded responses: views have other numbers now."""
        self._answering.plans.clear()

    @property
    def iterating(self) -> bool:
        """Whether an iteration over its events runs."""
        return self._loop.iterating

    # Subscriptions.

    @uninterruptible
    def enable(self, which: Subscription | type[Event]) -> None:
        """Subscribe to a further kind of event.

        Args:
            which: A kind of event, or the result of its ``on``.

        Raises:
            InvalidArgumentError: It is neither, or conflicts with an enabled subscription.
            AlreadyError: It is enabled already.
            UnsupportedError: The CPU, this Xen or its library cannot report it.
        """
        self.check_open()
        self._subscriptions.enable(which)

    @uninterruptible
    def disable(self, which: Subscription | type[Event]) -> None:
        """Unsubscribe from a kind of event that was enabled through this handle.

        Raises:
            InvalidArgumentError: It was not enabled.
        """
        super().check_open()  # a ring is not needed: a child may try again to close
        self._subscriptions.disable(which)

    @property
    def subscriptions(self) -> tuple[Subscription, ...]:
        """All enabled subscriptions, also those that the library needs, sorted by their switch."""
        enabled = self._subscriptions.enabled.values()
        return tuple(sorted(enabled, key=lambda one: str(one.key)))

    def add_default_handler(self, handler: Handler) -> None:
        """Register a handler for events that were not answered.

        The handler registered last is called first; if all return None, the event gets its default
        response. An exception of a handler is raised from the iteration, after the vCPU was
        resumed.

        Raises:
            InvalidArgumentError: The handler cannot be called, or is async.
        """
        self.check_open()
        check_callback(handler)
        self._default_handlers.add(handler)

    def close_first(self, handle: Handle) -> None:
        """Register a handle to be closed before this monitor, because it needs events answered."""
        self.check_open()
        self._children = [child for child in self._children if not child.closed] + [handle]

    def _require_access(self) -> None:
        required = partial(self.context.backend.domain_set_access_required, self._domid)
        journal = self.context.journal
        journal.write(access_required=True)
        self._undo.push("", partial(journal.undone, access_required=False), needs_rest=True)
        self._undo.push(f"access_required of domain {self._domid}", partial(required, False))
        required(True)

    # Receiving events.

    def fileno(self) -> int:
        """Return a file descriptor that is readable when events may be waiting.

        Use it in your own event loop: when it is readable, call
        ``next(monitor.events(timeout=0), None)`` until that returns None.
        """
        self.check_open()
        return self._connection.poller.fileno()

    def stop(self) -> None:
        """Stop the running iteration, or the next one; from any thread or signal handler."""
        self._connection.stop()

    def events(
        self, timeout: float | None = None, *, seconds: float | None = None
    ) -> Generator[Event, None, None]:
        """Yield events one at a time; each is answered before the next is yielded.

        An event that :meth:`Event.reply` has not answered gets its default response when the
        iteration goes on. A :class:`DomainEnded` is the last event.

        Args:
            timeout: The iteration ends after this many seconds without an event; None waits for
                ever.
            seconds: The iteration ends after this many seconds in all.

        Raises:
            InvalidArgumentError: A time is not a number, or negative.
            BusyError: An iteration runs already.
            RingError: The ring contains something that is not an event. Its vCPU is answered.
        """
        _check_seconds(timeout=timeout, seconds=seconds)
        return self._events(timeout, seconds)

    def _events(self, timeout: float | None, seconds: float | None) -> Generator[Event, None, None]:
        self.check_open()
        yield from self._loop.events(timeout, seconds)

    def run(
        self, handler: Handler, timeout: float | None = None, *, seconds: float | None = None
    ) -> None:
        """Call a handler for each event, and answer with the response that it returns.

        If the handler raises, the vCPU gets the event's default response first; then the exception
        is raised from this method.

        Args:
            handler: Gets an event and returns its response. None stands for the default response,
                unless the handler has called ``reply``. Returning the same Response object again
                is cheap.
            timeout: As for :meth:`events`.
            seconds: As for :meth:`events`; a running handler is not interrupted.

        Raises:
            InvalidArgumentError: The handler cannot be called, or is async; a time is not a number,
                or negative; or the handler has returned something that is not a response or does
                not fit its event, which has got its default response then.
        """
        check_callback(handler)
        _check_seconds(timeout=timeout, seconds=seconds)
        self.check_open()
        self._loop.run(handler, timeout, seconds)

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        """Yield events as :meth:`events`, for ``async for``.

        Other tasks of the event loop run at least every millisecond, between two events.
        """
        self.check_open()
        async with aclosing(self._loop.each()) as events:
            async for event in events:
                yield event

    # Answering.

    def reply(self, event: Event, response: Response) -> None:
        """Answer an event; see :meth:`Event.reply`."""
        self.check_open()
        self._answering.answer(event, response)

    def flush(self) -> None:
        """Notify Xen of the responses so far; it has processed them when this returns."""
        self.check_open()
        self._connection.flush()

    # Closing.

    def _take_back(self) -> None:
        doing = f"closing {self!r}"
        undo, own = UndoList(), UndoList()
        what = f"monitor of domain {self._domid}"
        own.push(what, lambda: self._undo.unwind(doing), needs_rest=True)
        own.push(f"vCPUs of domain {self._domid} in views", self._draining.leave_views)
        undo.push("", lambda: own.unwind(doing))
        for child in self._children:
            undo.push("", child.close)
        undo.unwind(doing)

    @uninterruptible
    def detach(self) -> None:
        """Disable the monitor before a migration; :meth:`reattach` enables it again."""
        self._detached = self.subscriptions
        self._draining.leave_views()
        self._undo.unwind(f"detaching {self!r}")
        guard.leave()
        super().abandon()

    @uninterruptible
    def reattach(self) -> None:
        """Enable the monitor again after a migration, with the same subscriptions."""
        vcpus = self.context.info().max_vcpu_id + 1
        self._reopen()
        self._attach(self._detached, vcpus)
        self.context.monitor = self

    @uninterruptible
    def abandon(self) -> None:
        """Close after the domain is gone: only this process's own resources are freed."""
        if self.closed:
            return
        self._connection.abandon()
        guard.leave()
        super().abandon()

    def _orphaned(self) -> bool:
        return self.context.is_gone()


def _known_version(context: DomainContext) -> int:
    version = context.backend.vm_event_get_version()
    try:
        layout(version)
    except LookupError as error:
        raise UnsupportedError(str(error), op="vm_event_get_version") from None
    return version


def _check_seconds(**times: float | None) -> None:
    """Check that each value is a number of seconds, or None."""
    for name, value in times.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise InvalidArgumentError(
                f"{name} must be a number of seconds, 0 or more, or None, not {value!r}"
            )
