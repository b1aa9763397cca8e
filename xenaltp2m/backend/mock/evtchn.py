# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent's end of event channels, as ``/dev/xen/evtchn`` gives it."""

from __future__ import annotations

import os
from collections import deque
from functools import partial

from xenaltp2m.backend.mock.monitor import Monitor


class Port:
    """The agent's end of an event channel: fires once, then not before it is unmasked."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.remote = monitor.port
        self.masked = False
        self.pending = False


class Channel:
    """An open ``/dev/xen/evtchn``: its eventfd counts the fired ports that wait to be read."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
        self.ports: dict[int, Port] = {}
        self._fired: deque[int] = deque()

    def bind(self, monitor: Monitor) -> int:
        """``evtchn_bind_interdomain``: a port that fires at once, for what may have been missed."""
        number = max(self.ports, default=0) + 1
        self.ports[number] = Port(monitor)
        monitor.signal = partial(self._fire, number)
        self._fire(number)
        return number

    def unbind(self, number: int) -> None:
        """Let go of a port, and of its event if that waits to be read."""
        port = self.ports.pop(number)
        if port.remote == port.monitor.port:
            port.monitor.signal = None
        if number in self._fired:
            self._fired.remove(number)
            os.eventfd_read(self.fd)

    def pending(self) -> int:
        """Wait for a port that fired."""
        os.eventfd_read(self.fd)
        return self._fired.popleft()

    def unmask(self, number: int) -> None:
        """Let a port fire again, at once if it was signalled meanwhile; unknown ones are passed."""
        port = self.ports.get(number)
        if port is None:
            return
        port.masked = False
        if port.pending:
            port.pending = False
            self._fire(number)

    def close(self) -> None:
        """Let go of everything."""
        for number in list(self.ports):
            self.unbind(number)
        os.close(self.fd)

    def _fire(self, number: int) -> None:
        port = self.ports[number]
        if port.masked:
            port.pending = True
            return
        port.masked = True
        self._fired.append(number)
        os.eventfd_write(self.fd, 1)
