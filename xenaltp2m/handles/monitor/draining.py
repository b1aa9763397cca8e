# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disable a monitor only after every vCPU has been answered and has taken its response."""

from __future__ import annotations

import logging

from xenaltp2m.errors import BusyError, RingError, XenError
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.monitor.answering import PAUSED, Answering
from xenaltp2m.handles.monitor.connection import RingConnection
from xenaltp2m.handles.monitor.subscriptions import Subscriptions
from xenaltp2m.types import SINGLE_STEP_OFF, VcpuInfo
from xenaltp2m.values.responses import view_number

_LOG = logging.getLogger(__package__)
_SETTLE_SECONDS = 0.2
_SETTLE_SECONDS_OF_WRITES = 2.0
"""The same, if register writes wait for responses: the guest would run on without such a write."""
_SETTLE_STEP = 0.001
_DISABLE_TRIES = 100


class Draining:
    """Drains a ring and disables its monitor."""

    def __init__(
        self,
        context: DomainContext,
        connection: RingConnection,
        subscriptions: Subscriptions,
        answering: Answering,
        vcpus: int,
    ) -> None:
        self._context, self._connection = context, connection
        self._subscriptions, self._answering = subscriptions, answering
        self._backend, self._clock = context.backend, context.backend.clock
        self._domid, self._version = int(context.domid), connection.version
        self._vcpus = vcpus
        self._damaged = False

    def __repr__(self) -> str:
        return f"<Monitor of domain {self._domid}>"  # as messages name its owner

    def disable(self) -> None:
        """Answer everything, wait until the responses have taken effect, and free the ring.

        Xen keeps a response's registers in memory until the vCPU runs, and disabling frees that
        memory (``vm_event_cleanup_domain``): so the vCPUs must run in between.
        """
        if not self._connection.enabled:
            return
        self.leave_views()
        self._answer_all()
        self._await_vcpus()
        for attempt in range(_DISABLE_TRIES):
            last = attempt == _DISABLE_TRIES - 1
            try:
                with self._context.paused():
                    late = self._answer_all()  # vCPUs that had waited for a free slot
                    if last or not (late and self._subscriptions.gates_writes):
                        answered = sorted(self._answering.last)
                        for vcpu in answered if self._answering.has_stepped else ():
                            self._backend.domain_debug_control(self._domid, SINGLE_STEP_OFF, vcpu)
                        self._connection.give_back()
                        return
                self._await_vcpus()
            except BusyError as error:
                if last:
                    raise
                _LOG.debug("%r: disabling is tried again: %s", self, error.message)
            self._clock.sleep(_SETTLE_STEP)  # vCPUs that wait for a free slot must run to get one

    def leave_views(self) -> None:
        """Move the vCPUs out of views in which nothing would answer their events."""
        if self._answering.switches_views or self._subscriptions.keeps_views_going:
            altp2m = self._context.anybodys_altp2m()
            if altp2m is not None:
                altp2m.move_vcpus_back()

    def _answer_all(self) -> bool:
        """Resume every vCPU that waits for a response.

        If the ring is damaged, every vCPU gets a response; Xen ignores it for a vCPU that does not
        wait (``vm_event_resume``).

        Returns:
            Whether a vCPU has waited.
        """
        waited, ring = False, self._connection.ring
        try:
            self._connection.flush()  # in case a notification has failed before
            for _ in range(_DISABLE_TRIES):  # bounded: a stuck switch would fill the ring for ever
                if not (ring.unread or ring.outstanding):
                    break
                waited = True
                while ring.take() is not None:
                    pass
                for request in ring.outstanding:
                    self._answering.resume(request)
                self._connection.flush()
        except RingError as error:
            if not self._damaged:
                _LOG.warning("%r: every vCPU is resumed, because %s", self, error.message)
                for vcpu in range(self._vcpus):
                    ring.force(self._version, vcpu, PAUSED)
                    self._connection.flush()
            self._damaged = True
        return waited

    def _await_vcpus(self) -> None:
        """Wait, for a bounded time, until the answered vCPUs have run."""
        info = self._context.find()
        if info is None or info.paused or info.shutdown or info.dying:
            return
        gates_writes = self._subscriptions.gates_writes
        end = self._clock.monotonic() + (
            _SETTLE_SECONDS_OF_WRITES if gates_writes else _SETTLE_SECONDS
        )
        waiting: dict[int, VcpuInfo | None] = dict.fromkeys(self._answering.last)
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
                _LOG.info("%r: vCPUs %s have not run since their response", self, sorted(waiting))
                return
            self._clock.sleep(_SETTLE_STEP)

    def _returned(self, vcpu: int) -> bool:
        """Check whether a vCPU's fast single-step has ended."""
        response = self._answering.last[vcpu]
        if response.back_to is None:
            return True
        back_to = view_number(response.back_to)
        try:
            return self._backend.altp2m_get_vcpu_p2m_idx(self._domid, vcpu) == back_to
        except XenError:
            return True  # altp2m is off by now
