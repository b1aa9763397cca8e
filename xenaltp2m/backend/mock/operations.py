# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Backend Protocol over the model of a host: each operation answers as the release does."""

from __future__ import annotations

from xenaltp2m import errors
from xenaltp2m.backend.clock import CLOCK, Clock
from xenaltp2m.backend.mock.altp2m_calls import Altp2mCalls
from xenaltp2m.backend.mock.domain_calls import DomainCalls
from xenaltp2m.backend.mock.event_channel_calls import EventChannelCalls
from xenaltp2m.backend.mock.memory_calls import MemoryCalls
from xenaltp2m.backend.mock.monitor_calls import MonitorCalls
from xenaltp2m.backend.mock.vcpu_calls import VcpuCalls


class ModelBackend(
    DomainCalls, VcpuCalls, Altp2mCalls, MonitorCalls, EventChannelCalls, MemoryCalls
):
    """A modelled host that implements the Protocol. See :class:`xenaltp2m.backend.Backend`."""

    name = "mock"
    clock: Clock = CLOCK

    def close(self) -> None:
        """Give everything back, whatever fails; the first failure has the others in its notes."""
        if self._closed:
            return
        self._closed = True
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        failures = []
        for key in [*self._mappings]:
            try:
                self._give_back("close", key)
            except errors.BusyError as error:
                failures.append(error)
        if failures:
            first, *others = failures
            for other in others:
                first.add_note(f"then: {other}")
            raise first
