# SPDX-License-Identifier: LGPL-2.1-or-later
"""The subscriptions of a monitor: enable and disable events in Xen."""

from __future__ import annotations

import contextlib
import logging
from functools import partial

from xenaltp2m.errors import AlreadyError, InvalidArgumentError
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.monitor.response_encoding import DENIABLE
from xenaltp2m.values.events import (
    SINGLESTEP_ON,
    Event,
    MemAccess,
    SoftwareBreakpoint,
    Subscription,
    WriteCtrlreg,
)

_LOG = logging.getLogger(__package__)


class Subscriptions:
    """The subscriptions of one monitor.

    Attributes:
        enabled: The enabled subscriptions, by their switch.
        gates_writes: Whether register writes wait for the response, until the ring is freed.
        keeps_views_going: Whether vCPUs in views need their events answered.
    """

    def __init__(self, context: DomainContext, undo: UndoList) -> None:
        self._backend, self._domid = context.backend, int(context.domid)
        self._undo = undo
        self.enabled: dict[tuple[object, ...], Subscription] = {}
        self.gates_writes = self.keeps_views_going = False

    def __repr__(self) -> str:
        return f"<Monitor of domain {self._domid}>"  # as messages name its owner

    def enable(self, which: Subscription | type[Event]) -> None:
        """See :meth:`Monitor.enable`."""
        wanted = subscription(which)
        if wanted.key in self.enabled:
            raise AlreadyError(
                f"{self!r} has subscribed to {_words(wanted)} already", domid=self._domid
            )
        self._check_gate(wanted)
        if wanted.deniable:
            self._backend.monitor_control_registers(self._domid)
            self.gates_writes = True
        if wanted.switch is not None:
            if wanted.key != SINGLESTEP_ON.key:  # this one ends with the ring, after all steps
                self._undo.push(
                    f"{_words(wanted)} of domain {self._domid}", partial(self._turn_off, wanted)
                )
            try:
                self.turn(wanted, True)
            except AlreadyError:
                # No other monitor can be open: one has left it on, with its own options.
                _LOG.info("%r: %s was left on, and is set again", self, _words(wanted))
                self.turn(wanted, False)
                self.turn(wanted, True)
        self.enabled[wanted.key] = wanted
        self.keeps_views_going |= wanted.event in (MemAccess, SoftwareBreakpoint)

    def disable(self, which: Subscription | type[Event]) -> None:
        """See :meth:`Monitor.disable`."""
        unwanted = subscription(which)
        if unwanted.key not in self.enabled:
            raise InvalidArgumentError(f"{self!r} has not subscribed to {_words(unwanted)}")
        self._turn_off(self.enabled[unwanted.key])

    def enable_singlesteps(self) -> None:
        """Enable single-step events: without them a step never ends (``hvm_monitor_debug``)."""
        if SINGLESTEP_ON.key not in self.enabled:
            self.enable(SINGLESTEP_ON)

    def lift(self, event: Event) -> Subscription:
        """Disable the subscription of an event in Xen, and return it, to be enabled again.

        Raises:
            InvalidArgumentError: This monitor has not enabled it.
        """
        for one in self.enabled.values():
            if one.event is type(event):
                with contextlib.suppress(AlreadyError):
                    self.turn(one, False)
                return one
        raise InvalidArgumentError(f"{self!r} has not subscribed to {event!r}")

    def turn(self, which: Subscription, on: bool) -> None:
        """Switch a subscription on or off in Xen."""
        assert which.switch is not None
        word = "disable" if which.switch == "monitor_inguest_pagefault" else "enable"
        switch = getattr(self._backend, which.switch)
        switch(self._domid, **{word: on, **which.options})

    def _turn_off(self, which: Subscription) -> None:
        if which.key not in self.enabled:
            return
        if which.switch is not None:
            with contextlib.suppress(AlreadyError):
                self.turn(which, False)
        del self.enabled[which.key]

    def _check_gate(self, wanted: Subscription) -> None:
        """Raise if deniable writes would be combined with writes whose vCPU does not wait.

        Xen delays the latter, too, until it happens to schedule the vCPU again: meanwhile the
        guest runs on without the write (``hvm_set_cr3``, ``hvm_do_resume``).
        """
        if wanted.deniable or self.gates_writes:
            for each in (wanted, *self.enabled.values()):
                index, sync = (each.options.get(name) for name in ("index", "sync"))
                if each.event is WriteCtrlreg and index in DENIABLE and not sync:
                    raise InvalidArgumentError(
                        "a monitor with deniable register writes cannot subscribe to "
                        f"{_words(each)} with sync=False: the guest would run on before the "
                        "register is written",
                        domid=self._domid,
                    )


def subscription(wanted: Subscription | type[Event]) -> Subscription:
    """Return the subscription to a kind of event.

    Raises:
        InvalidArgumentError: It is not a kind of event, or the kind needs options.
    """
    if isinstance(wanted, Subscription):
        return wanted
    if isinstance(wanted, type) and issubclass(wanted, Event):
        return wanted.on()
    raise InvalidArgumentError(f"{wanted!r} is neither a kind of event nor the result of its on()")


def _words(which: Subscription) -> str:
    name = which.switch or str(getattr(which.event, "__name__", ""))
    options = [str(value) for value in which.key[1:]]
    return " ".join([name.removeprefix("monitor_"), *options])
