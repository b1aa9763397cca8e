# SPDX-License-Identifier: LGPL-2.1-or-later
"""The least of a host that a monitor needs: a ring's page, and a front end as Xen's.

The front end is written from ``public/io/ring.h`` and ``common/vm_event.c``, not from our ring.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any
from uuid import UUID

import xenaltp2m as xa
from xenaltp2m.abi.releases import release
from xenaltp2m.backend import PortCalls
from xenaltp2m.backend.clock import CLOCK, Clock
from xenaltp2m.types import DomainInfo, DomId, VcpuInfo

SIZES = {6: 384, 7: 400}
SLOTS_AT = 64
MASK = 0xFFFFFFFF
DOMID = 1
UUID_OF_DOMAIN = UUID(int=1)


class RingHost:
    """A backend with one domain and a ring; what else is asked of it does nothing.

    Attributes:
        responses: The bytes of each response taken, in order.
        calls: The names of the calls made that are not part of the loop.
    """

    name = "ring host"
    clock: Clock = CLOCK

    def __init__(self, version: int = 7, vcpus: int = 4, start: int = 0) -> None:
        self.release = release(4, 14) if version == 6 else release(4, 20)
        self.version = version
        self.vcpus = vcpus
        self.start = start
        self.page = memoryview(bytearray(4096))
        self.produced = self.consumed = start
        self.responses: list[bytes] = []
        self.calls: list[str] = []
        self.on_notify: Callable[[], None] = lambda: None
        self.alive = True
        self.shutdown_reason: int | None = None
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)

    def put(self, raw: bytes) -> None:
        """Post a request."""
        assert (self.produced - self.consumed) & MASK < 8, "Xen would not post into a full ring"
        at = SLOTS_AT + self.produced % 8 * SIZES[self.version]
        self.page[at : at + len(raw)] = raw
        self.produced = (self.produced + 1) & MASK
        struct.pack_into("<I", self.page, 0, self.produced)
        os.eventfd_write(self.fd, 1)

    def damage(self, req_prod: int) -> None:
        """Write nonsense where the number of requests should be."""
        struct.pack_into("<I", self.page, 0, req_prod & MASK)
        os.eventfd_write(self.fd, 1)

    def notified(self) -> int:
        """Take every response, as ``vm_event_resume`` does."""
        shown = struct.unpack_from("<I", self.page, 8)[0]
        while self.consumed != shown:
            at = SLOTS_AT + self.consumed % 8 * SIZES[self.version]
            self.responses.append(bytes(self.page[at : at + SIZES[self.version]]))
            self.consumed = (self.consumed + 1) & MASK
        self.on_notify()
        return 0

    def pending(self) -> None:
        """Take the event channel's signal."""
        os.eventfd_read(self.fd)

    def monitor_enable(self, domid: int) -> tuple[int, memoryview]:
        del domid
        return 3, self.page

    def vm_event_get_version(self) -> int:
        return self.version

    def evtchn_open(self) -> int:
        return self.fd

    def evtchn_fd(self, channel: int) -> int:
        return channel

    def evtchn_bind_interdomain(self, *_: int) -> int:
        return 5

    def evtchn_calls(self, *_: int) -> PortCalls:
        return PortCalls(self.pending, lambda: None, self.notified)

    def monitor_unmap_ring(self, page: memoryview) -> None:
        self.calls.append("monitor_unmap_ring")
        page[0:1]  # still mapped

    def domain_getinfolist(self, first_domid: int, limit: int) -> list[DomainInfo]:
        del first_domid, limit
        if not self.alive:
            return []
        return [
            DomainInfo(
                domid=DomId(DOMID), uuid=UUID_OF_DOMAIN, hvm=True, paused=False, dying=False,
                shutdown=self.shutdown_reason is not None,
                shutdown_reason=self.shutdown_reason or 0,
                pages=1, max_pages=1, vcpus=self.vcpus, max_vcpu_id=self.vcpus - 1,
            )
        ]  # fmt: skip

    def vcpu_getinfo(self, domid: int, vcpu: int) -> VcpuInfo:
        del domid, vcpu
        return VcpuInfo(online=True, blocked=True, running=False, cpu_time=0)

    def close(self) -> None:
        """Close the event channel."""
        os.close(self.fd)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*_: object, **__: object) -> None:
            self.calls.append(name)

        return call


def domain(host: RingHost) -> xa.Domain:
    """Return a handle of the host's domain."""
    xen = xa.Xen(host)
    return xen.domain(DOMID)


def started(host: RingHost, *subscriptions: Any) -> tuple[xa.Domain, xa.Monitor]:
    """Open a monitor, its indices moved to the host's start."""
    dom = domain(host)
    monitor = dom.monitor(*subscriptions)
    if host.start:
        struct.pack_into("<IIII", host.page, 0, *[host.start] * 4)
        monitor._connection.ring.state = (host.start, host.start, (), 0)
        monitor._connection.notified = host.start
    return dom, monitor


def finish(dom: xa.Domain) -> None:
    """Forget the handles of a host."""
    dom.abandon()
    dom.xen.abandon()
