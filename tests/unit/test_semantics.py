# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mock's altp2m does what Xen's does, rule by rule, in every supported release.

Each row is named "what: condition -> outcome". What is expected was read in Xen's source, never in
the mock's: ``do_altp2m_op`` (hvm.c), the ``p2m_*altp2m*`` functions (mm/p2m.c, from 4.19
mm/altp2m.c), mm/mem_access.c, mm/p2m-ept.c, common/vm_event.c, common/monitor.c. Releases before
4.14 are not supported, and neither are the rules that ended with them.

What a mock of one host with one caller cannot show: calls of a domain on itself (EPERM, EINVAL of
the monitor and memory access calls), NULL out-pointers, faulting guest handles (EFAULT), a sub-op
newer than Xen (all came with 4.14), Arm (ENOSYS), ``increase_reservation`` (not in the Protocol),
and what a response does to registers or the emulator.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import (
    EACCES,
    EAGAIN,
    EBUSY,
    EEXIST,
    EILSEQ,
    EINVAL,
    ENODEV,
    ENOMEM,
    ENOSYS,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
    ESRCH,
    errorcode,
)
from functools import partial
from typing import Any, TypeAlias

import pytest

from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend.mock import Livelock, MockBackend, Outcome
from xenaltp2m.backend.mock.machine import Domain
from xenaltp2m.backend.mock.p2m import INVALID_MFN, ORDER_2M, ORDER_4K, PageType
from xenaltp2m.errors import InvalidArgumentError, XenError
from xenaltp2m.types import ALL_GFNS, Altp2mMode

Version: TypeAlias = tuple[int, int]
Call: TypeAlias = Callable[[], object]

N, R, W, RW, X, RX, WX, RWX, RX2RW, N2RWX, R_PW = range(11)
A, B, C = 0x100, 0x101, 0x180
"""RAM; they share a 2M entry where the domain has 2M entries."""
D, E = 0x300, 0x301
"""RAM of the next one."""
HOLE = 0x2000
DIRECT_MMIO = 0xFEE00
RING = 0xFEFF9
TOO_HIGH = 1 << 36
HVM_PARAM_ALTP2M = 35
INVALID_VIEW = 0xFFFF


def default_access(xen: Version) -> int:
    """``XENMEM_access_default``."""
    return 10 if xen < (4, 20) else 11


class Guest:
    """A domain with altp2m on; the backend's operations on it, without the domid."""

    def __init__(self, backend: MockBackend, domid: int) -> None:
        self.backend = backend
        self.domid = domid
        self.xen = backend.release.version

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return partial(getattr(self.backend, op), self.domid)

    @property
    def model(self) -> Domain:
        return self.backend.domain(self.domid)

    def view(self, default: int = RWX, *, enter: bool = False) -> int:
        """Make a view, and move the vCPUs there."""
        view: int = self.altp2m_create_view(default)
        if enter:
            self.altp2m_switch_to_view(view)
        return view

    def access(self, view: int, gfn: int) -> int | None:
        """The access a table has for a gfn, None where it has no entry."""
        try:
            access: int = self.altp2m_get_mem_access(view, gfn)
        except XenError as error:
            assert error.errno == ESRCH
            return None
        return access

    def frame(self, gfn: int, view: int | None = None) -> int:
        """The frame behind a gfn of a view's own table, or of the host p2m."""
        table = self.model.host if view is None else self.model.views[view].table
        return table.lookup(gfn).mfn

    def retype(self, gfn: int, kind: PageType) -> None:
        """Change a host entry's type, as log-dirty tracking and the like do."""
        mfn = INVALID_MFN if kind == PageType.PAGED else self.frame(gfn)
        assert self.model.host.write(gfn, mfn, ORDER_4K, kind, RWX) == 0

    def touch(self, gfn: int, kind: str = "r", vcpu: int = 0) -> Outcome:
        return self.backend.touch(self.domid, gfn, kind, vcpu)

    def exhaust(self, left: int = 0) -> None:
        """Leave only so many pages in the domain's p2m pool."""
        self.model.pool.pages = self.model.pool.used + left

    def populate(self, gfn: int, order: int = 0) -> None:
        self.domain_populate_physmap_exact(gfns(gfn), order)

    def drop(self, *dropped: int) -> None:
        self.domain_decrease_reservation_exact(gfns(*dropped))

    def monitor(self) -> Agent:
        return Agent(self)


def gfns(*numbers: int) -> array[int]:
    return array("Q", numbers)


class Agent:
    """A listener that answers by hand: it writes raw responses into the ring, and notifies."""

    PAUSED, TOGGLE, SWITCH, FAST = 1 << 0, 1 << 4, 1 << 7, 1 << 11

    def __init__(self, guest: Guest) -> None:
        remote, self.ring = guest.monitor_enable()
        self.backend = guest.backend
        self.version = 6 if guest.xen == (4, 14) else 7
        self.size = {6: 384, 7: 400}[self.version]
        self.produced = 0
        self.channel = guest.backend.evtchn_open()
        self.port = guest.backend.evtchn_bind_interdomain(self.channel, guest.domid, remote)

    def reply(
        self, flags: int, *, vcpu: int = 0, view: int = 0, step: int = 0, version: int | None = None
    ) -> None:
        spoken = self.version if version is None else version
        slot = 64 + (self.produced & 7) * self.size
        struct.pack_into("<IIIIH6xH", self.ring, slot, spoken, flags, 1, vcpu, view, step)
        self.produced += 1
        struct.pack_into("<I", self.ring, 8, self.produced)  # rsp_prod
        self.backend.evtchn_notify(self.channel, self.port)


class New:
    """Makes guests on hosts of one release."""

    def __init__(self, xen: Version) -> None:
        self.xen = xen
        self.made: list[Guest] = []

    def __call__(self, *, on: bool = True, host: dict[str, Any] | None = None, **options: Any) -> Guest:
        backend = MockBackend(self.xen, **(host or {}))
        options = {"memory_kib": 4 << 10, "max_kib": 64 << 10, "superpages": False} | options
        guest = Guest(backend, backend.add_domain(**options))
        self.made.append(guest)
        if on:
            guest.altp2m_set_domain_state(True)
        return guest


@dataclass(frozen=True)
class Row:
    name: str
    check: Callable[[New], None]
    since: Version
    until: Version


ROWS: list[Row] = []


def holds(
    name: str, *, since: Version = SUPPORTED[0], until: Version = SUPPORTED[-1]
) -> Callable[[Callable[[New], None]], None]:
    """A row whose body asserts its outcome."""

    def add(check: Callable[[New], None]) -> None:
        ROWS.append(Row(name, check, since, until))

    return add


def refuses(
    condition: str, errno: int, *, since: Version = SUPPORTED[0], until: Version = SUPPORTED[-1]
) -> Callable[[Callable[[New], Call | list[Call]]], None]:
    """A row whose body prepares, and returns the call or calls that fail with that errno."""

    def add(prepare: Callable[[New], Call | list[Call]]) -> None:
        def check(new: New) -> None:
            calls = prepare(new)
            calls = calls if isinstance(calls, list) else [calls]
            assert calls
            for number, call in enumerate(calls):
                got = errno_of(call)
                assert got == errno, f"call {number}: {errorcode.get(got, got)}"

        code = "EOPNOTSUPP" if errno == EOPNOTSUPP else errorcode[errno]
        ROWS.append(Row(f"{condition} -> {code}", check, since, until))

    return add


def errno_of(call: Call) -> int:
    try:
        call()
    except XenError as error:
        assert error.errno is not None, error
        return error.errno
    return 0


CASES = [
    pytest.param(xen, row, id=f"{xen[0]}.{xen[1]}-{row.name}")
    for row in ROWS_OF_MODULE()
    for xen in SUPPORTED
]
