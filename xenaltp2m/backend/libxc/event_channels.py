# SPDX-License-Identifier: LGPL-2.1-or-later
"""Event channels, which announce events and responses between Xen and this process."""

from __future__ import annotations

import errno as _errno
import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from xenaltp2m import errors
from xenaltp2m.backend.libxc.checks import as_domid, as_number
from xenaltp2m.backend.libxc.clib import NULL, checked, operation, refusal
from xenaltp2m.backend.libxc.connection import Connection
from xenaltp2m.backend.libxc.loader import Loader
from xenaltp2m.backend.protocol import PortCalls
from xenaltp2m.errors import XenError


class EventChannels(Connection):
    """The open event channels, by a number of our own."""

    def __init__(self, loader: Loader | None = None) -> None:
        self._channels: dict[int, Any] = {}
        self._channel_numbers = itertools.count(1)
        super().__init__(loader)

    def _held(self) -> list[Callable[[], object]]:
        held = super()._held()
        if self._channels:
            close = partial(checked, "xenevtchn_close", self._evtchn.xenevtchn_close)
            held += [partial(close, handle) for handle in self._channels.values()]
        return held

    def _forget(self) -> None:
        super()._forget()
        self._channels.clear()

    def evtchn_open(self) -> int:
        handle = self._evtchn.xenevtchn_open(self._log.logger, 0)
        if handle == NULL:
            raise self._log.annotate(refusal("xenevtchn_open"))
        channel = next(self._channel_numbers)
        self._channels[channel] = handle
        return channel

    def evtchn_close(self, channel: int) -> None:
        close, handle = self._evtchn.xenevtchn_close, self._channel("evtchn_close", channel)
        del self._channels[channel]
        checked("xenevtchn_close", close, handle)

    def evtchn_fd(self, channel: int) -> int:
        return self._channel_call("xenevtchn_fd", channel)

    def evtchn_bind_interdomain(self, channel: int, domid: int, remote_port: int) -> int:
        function, remote = "xenevtchn_bind_interdomain", as_number("remote_port", remote_port)
        return self._channel_call(function, channel, as_domid(domid), remote, domid=domid)

    def evtchn_pending(self, channel: int) -> int:
        """``xenevtchn_pending``; goes on waiting after a signal whose handler returned."""
        while True:
            try:
                return self._channel_call("xenevtchn_pending", channel)
            except XenError as error:
                if error.errno != _errno.EINTR:
                    raise

    def evtchn_unmask(self, channel: int, port: int) -> None:
        self._channel_call("xenevtchn_unmask", channel, as_number("port", port))

    def evtchn_notify(self, channel: int, port: int) -> None:
        self._channel_call("xenevtchn_notify", channel, as_number("port", port))

    def evtchn_calls(self, channel: int, port: int) -> PortCalls:
        """The port's calls; of these, libxenevtchn's first two are this read and this write.

        ``tools/libs/evtchn/linux.c``, ``xenevtchn_pending`` and ``xenevtchn_unmask``, 4.14 to 4.22.
        """
        handle, number = self._channel("evtchn_calls", channel), as_number("port", port)
        descriptor = self.evtchn_fd(channel)
        word = number.to_bytes(4, sys.byteorder)
        return PortCalls(
            partial(os.read, descriptor, len(word)),
            partial(os.write, descriptor, word),
            partial(self._evtchn.xenevtchn_notify, handle, number),
        )

    def _channel(self, op: str, channel: int) -> Any:
        handle = self._channels.get(channel)
        if handle is None:
            raise errors.from_errno(op, _errno.EBADF)
        return handle

    def _channel_call(
        self, function: str, channel: int, *args: int, domid: int | None = None
    ) -> int:
        call = getattr(self._evtchn, function)
        result: int = call(self._channel(operation(function), channel), *args)
        if result < 0:
            raise refusal(function, domid=domid)
        return result
