# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls of event channels on the modelled host."""

from __future__ import annotations

import functools
from errno import EBADF, EINVAL, ENOTCONN

from xenaltp2m.backend import arguments
from xenaltp2m.backend.mock.calls import operation
from xenaltp2m.backend.mock.evtchn import Channel, Port
from xenaltp2m.backend.mock.machine import HypercallError, Machine
from xenaltp2m.backend.mock.scheduler import Scheduler
from xenaltp2m.backend.protocol import PortCalls


class EventChannelCalls(Scheduler):
    """The open event channels, by their file descriptors."""

    def __init__(self, machine: Machine, seed: int) -> None:
        super().__init__(machine, seed)
        self._channels: dict[int, Channel] = {}

    @operation
    def evtchn_open(self) -> int:
        channel = Channel()
        self._channels[channel.fd] = channel
        return channel.fd

    @operation
    def evtchn_close(self, channel: int) -> None:
        self._channel(channel).close()
        del self._channels[channel]

    @operation
    def evtchn_fd(self, channel: int) -> int:
        return self._channel(channel).fd

    @operation
    def evtchn_bind_interdomain(self, channel: int, domid: int, remote_port: int) -> int:
        bound = self._channel(channel)
        monitor = self._monitors.get(domid)
        if monitor is None or not monitor.enabled or remote_port != monitor.port or monitor.signal:
            raise HypercallError(EINVAL)
        return bound.bind(monitor)

    @operation
    def evtchn_pending(self, channel: int) -> int:
        return self._channel(channel).pending()

    @operation
    def evtchn_unmask(self, channel: int, port: int) -> None:
        self._channel(channel).unmask(port)
        bound = self._channel(channel).ports.get(port)
        if bound is not None and self._simulates(domid := bound.monitor.domain.domid):
            self._go_on(domid)

    @operation
    def evtchn_notify(self, channel: int, port: int) -> None:
        bound = self._port(channel, port)
        if bound.remote == bound.monitor.port:
            bound.monitor.resume()
            self._go_on(bound.monitor.domain.domid)

    def evtchn_calls(self, channel: int, port: int) -> PortCalls:
        """One port's calls, each of which is logged as the method of that name."""
        arguments.check("evtchn_calls", {"channel": channel, "port": port})

        def notify() -> int:
            self.evtchn_notify(channel, port)
            return 0

        self._check_open()
        return PortCalls(
            functools.partial(self.evtchn_pending, channel),
            functools.partial(self.evtchn_unmask, channel, port),
            notify,
        )

    def _channel(self, channel: int) -> Channel:
        if channel not in self._channels:
            raise HypercallError(EBADF)
        return self._channels[channel]

    def _port(self, channel: int, port: int) -> Port:
        bound = self._channel(channel).ports.get(port)
        if bound is None:
            raise HypercallError(ENOTCONN)
        return bound
