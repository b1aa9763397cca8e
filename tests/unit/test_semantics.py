# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mock's altp2m does what Xen's does, rule by rule, in every supported release.

Each row is named "what: condition -> outcome". What is expected was read in Xen's source, never in
the mock's: ``do_altp2m_op`` (hvm.c), the ``p2m_*altp2m*`` functions (mm/p2m.c, from 4.19
mm/altp2m.c), mm/mem_access.c, mm/p2m-ept.c, common/vm_event.c, common/monitor.c. A release means
its last update (4.14.6, 4.15.7, 4.16.7, 4.17.7, 4.18.6, 4.19.6, 4.20.4, 4.21.2, 4.22.0).

Left out, because only releases before 4.14 did so: EINVAL of change_gfn where it is ESRCH now, and
ENOENT or EINVAL for an empty pool; ESRCH and EINVAL of set_mem_access on holes; EINVAL for an
unknown sub-op; what enable_notify said to a caller from another domain; EINVAL of xc_monitor_resume
on success. And because a mock of one host and one caller cannot show them: calls of a domain on
itself (EPERM, EINVAL of the monitor and memory access calls), NULL out-pointers, faulting guest
handles (EFAULT), a sub-op newer than Xen (all came with 4.14), Arm (ENOSYS), a page that cannot be
unshared (EAGAIN), ``increase_reservation`` (not in the Protocol), and what a response does to
registers or the emulator.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
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

from tests.rows import Rows
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.abi.x86 import CR0_PE
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
D, E = 0x210, 0x211
"""RAM of the next one. To Xen the holes of a view's first 2M are 4K ones as long as it is empty."""
HOLE = 0x2000
DIRECT_MMIO = 0xFEE00
RING = 0xFEFF9
HIGHEST = 0xFEFFF
"""The last of the toolstack's pages."""
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
        self.agents: list[Agent] = []

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
        got: list[int] = []
        errno = errno_of(lambda: got.append(self.altp2m_get_mem_access(view, gfn)))
        assert errno in {0, ESRCH}
        return got[0] if got else None

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
        self.agents.append(Agent(self))
        return self.agents[-1]

    def close(self) -> None:
        for agent in self.agents:
            agent.close()
        self.backend.close()


def gfns(*numbers: int) -> array[int]:
    return array("Q", numbers)


class Agent:
    """A listener that answers by hand: it writes raw responses into the ring, and notifies."""

    PAUSED, TOGGLE, SWITCH, FAST = 1 << 0, 1 << 4, 1 << 7, 1 << 11

    def __init__(self, guest: Guest) -> None:
        remote, self.ring = guest.monitor_enable()
        self.guest = guest
        self.backend = guest.backend
        self.version = 6 if guest.xen == (4, 14) else 7
        self.size = {6: 384, 7: 400}[self.version]
        self.produced = 0
        self.channel = guest.backend.evtchn_open()
        self.port = guest.backend.evtchn_bind_interdomain(self.channel, guest.domid, remote)

    def close(self) -> None:
        self.backend.evtchn_close(self.channel)
        self.backend.monitor_unmap_ring(self.ring)
        if self.guest.model.listened:
            self.guest.monitor_disable()

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

    def __call__(
        self, *, on: bool = True, host: dict[str, Any] | None = None, **options: Any
    ) -> Guest:
        backend = MockBackend(self.xen, **({"memory_pages": 1 << 13} | (host or {})))
        memory_kib = 4096 if options.get("superpages") else 0x220 * 4
        options = {"memory_kib": memory_kib, "max_kib": 64 << 10, "superpages": False} | options
        guest = Guest(backend, backend.add_domain(**options))
        guest.model.unpause()
        self.made.append(guest)
        if on:
            guest.altp2m_set_domain_state(True)
        return guest

    def close(self) -> None:
        """Close the hosts of all guests that were made."""
        for guest in self.made:
            guest.close()


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
    """The errno a call fails with, 0 where it does not, -1 where Xen was never asked."""
    try:
        call()
    except XenError as error:
        return -1 if error.errno is None else error.errno
    return 0


# The gate: what every call passes first.


def altp2m_calls(guest: Guest, *, but: tuple[str, ...] = ()) -> list[Call]:
    """Every altp2m call, each with arguments that are fine once view 1 exists."""
    calls: dict[str, tuple[Any, ...]] = {
        "get_domain_state": (),
        "set_domain_state": (True,),
        "set_vcpu_enable_notify": (0, A),
        "set_vcpu_disable_notify": (0,),
        "create_view": (RWX,),
        "destroy_view": (1,),
        "switch_to_view": (0,),
        "set_mem_access": (1, A, RX),
        "set_mem_access_multi": (1, bytes([RX]), gfns(A)),
        "get_mem_access": (1, ALL_GFNS),
        "change_gfn": (1, A, B),
        "set_suppress_ve": (1, A, False),
        "set_suppress_ve_multi": (1, A, B, False),
        "get_suppress_ve": (1, A),
        "get_vcpu_p2m_idx": (0,),
        "set_visibility": (1, True),
    }
    return [
        partial(getattr(guest, f"altp2m_{op}"), *args)
        for op, args in calls.items()
        if op not in but
    ]


STATE = ("get_domain_state", "set_domain_state")


@refuses("any altp2m call: host without altp2m support, first of all", EOPNOTSUPP)
def _(new: New) -> list[Call]:
    guest = new(on=False, host={"altp2m": False, "privileged": False}, mode=Altp2mMode.DISABLED)
    nobody = Guest(guest.backend, 77)
    return altp2m_calls(guest) + altp2m_calls(nobody)


@refuses("any altp2m call: no such domain", ESRCH)
def _(new: New) -> list[Call]:
    return altp2m_calls(Guest(new(host={"privileged": False}, on=False).backend, 77))


@refuses("any altp2m call: PV domain", EOPNOTSUPP)
def _(new: New) -> list[Call]:
    return altp2m_calls(new(on=False, kind="pv", mode=Altp2mMode.DISABLED))


@refuses("any altp2m call but get and set_domain_state: altp2m inactive", EOPNOTSUPP)
def _(new: New) -> list[Call]:
    guest = new(on=False, mode=Altp2mMode.DISABLED)
    guest.backend.machine.privileged = False
    return altp2m_calls(guest, but=STATE)


@refuses("get and set_domain_state: mode disabled", EINVAL)
def _(new: New) -> list[Call]:
    guest = new(on=False, mode=Altp2mMode.DISABLED, view_count=0)
    guest.backend.machine.privileged = False
    return [guest.altp2m_get_domain_state, partial(guest.altp2m_set_domain_state, True)]


@refuses("get and set_domain_state: altp2m_count 0", EOPNOTSUPP, since=(4, 21))
def _(new: New) -> list[Call]:
    guest = new(on=False, view_count=0)
    guest.backend.machine.privileged = False
    return [guest.altp2m_get_domain_state, partial(guest.altp2m_set_domain_state, True)]


@refuses("any altp2m call: not permitted by mode or XSM", EPERM)
def _(new: New) -> list[Call]:
    guest = new()
    guest.view()
    guest.backend.machine.privileged = False
    return altp2m_calls(guest)


@holds("any altp2m call: permitted, active, view 1 there -> 0")
def _(new: New) -> None:
    for number in range(len(altp2m_calls(new()))):
        guest = new()
        guest.view()
        guest.altp2m_set_mem_access(1, A, RWX)
        altp2m_calls(guest)[number]()


@refuses("any domctl: libxc of another domctl version", EACCES)
def _(new: New) -> list[Call]:
    other = (4, 22) if new.xen < (4, 18) else (4, 17)
    guest = new(host={"library": other})
    return [
        guest.domain_pause,
        guest.domain_unpause,
        partial(guest.domain_setmaxmem, 1 << 20),
        partial(guest.domain_debug_control, 0, 0),
        partial(guest.domain_set_access_required, True),
        guest.domain_hvm_getcontext,
        partial(guest.domain_hvm_getcontext_partial, 2, 0),
        partial(guest.domain_hvm_setcontext, b""),
        guest.get_paging_mempool_size,
        partial(guest.set_paging_mempool_size, 1 << 24),
        guest.monitor_enable,
        guest.monitor_disable,
        guest.monitor_resume,
        guest.monitor_get_capabilities,
        partial(guest.monitor_singlestep, True),
        partial(guest.monitor_mov_to_msr, 0x10, True, False),
        partial(guest.monitor_emulate_each_rep, True),
        guest.backend.vm_event_get_version,
    ]


@refuses("listing domains, a sysctl: libxc of another sysctl version", EACCES)
def _(new: New) -> list[Call]:
    guest = new(host={"library": (4, 22) if new.xen < (4, 21) else (4, 17)})
    return [partial(guest.backend.domain_getinfolist, 0, 10)]


@holds(
    "listing domains: libxc of another domctl but the same sysctl version -> works",
    since=(4, 18),
    until=(4, 20),
)
def _(new: New) -> None:
    guest = new(host={"library": (4, 17)})
    assert guest.backend.domain_getinfolist(guest.domid, 1)


@holds("HVMOPs and memory ops: libxc of another domctl version -> work")
def _(new: New) -> None:
    guest = new(host={"library": (4, 22) if new.xen < (4, 18) else (4, 17)})
    view = guest.view(RX, enter=True)
    guest.altp2m_change_gfn(view, A, B)
    guest.populate(HOLE)
    guest.hvm_param_get(HVM_PARAM_ALTP2M)
    assert guest.domain_maximum_gpfn() >= HOLE


@holds(
    "any domctl: libxc of another release with the same domctl version -> works",
    since=(4, 19),
    until=(4, 21),
)
def _(new: New) -> None:
    guest = new(host={"library": (4, 19) if new.xen > (4, 19) else (4, 21)})
    guest.domain_pause()


# The mode.


@refuses("HVM_PARAM_ALTP2M set: change of a non-zero value", EEXIST, until=(4, 18))
def _(new: New) -> list[Call]:
    guest = new(on=False, mode=Altp2mMode.EXTERNAL)
    return [partial(guest.hvm_param_set, HVM_PARAM_ALTP2M, mode) for mode in (0, 1, 3, 4)]


@refuses("HVM_PARAM_ALTP2M set: always", EEXIST, since=(4, 19))
def _(new: New) -> list[Call]:
    domains = [
        new(on=False, mode=Altp2mMode.EXTERNAL),
        new(on=False, mode=Altp2mMode.DISABLED),
        new(on=False, mode=Altp2mMode.DISABLED, nested=True),
    ]
    return [
        partial(guest.hvm_param_set, HVM_PARAM_ALTP2M, mode)
        for guest in domains
        for mode in range(5)
    ]


@refuses("HVM_PARAM_ALTP2M set: value > 3, or nested on", EINVAL, until=(4, 18))
def _(new: New) -> list[Call]:
    plain = new(on=False, mode=Altp2mMode.DISABLED)
    nested = new(on=False, mode=Altp2mMode.DISABLED, nested=True)
    return [
        partial(plain.hvm_param_set, HVM_PARAM_ALTP2M, 4),
        partial(nested.hvm_param_set, HVM_PARAM_ALTP2M, 2),
    ]


@holds("HVM_PARAM_ALTP2M set: zero before -> set once, and altp2m can be enabled", until=(4, 18))
def _(new: New) -> None:
    guest = new(on=False, mode=Altp2mMode.DISABLED)
    guest.hvm_param_set(HVM_PARAM_ALTP2M, 2)
    guest.hvm_param_set(HVM_PARAM_ALTP2M, 2)
    assert guest.hvm_param_get(HVM_PARAM_ALTP2M) == 2
    guest.altp2m_set_domain_state(True)


@holds("HVM_PARAM_ALTP2M get: any release -> the mode")
def _(new: New) -> None:
    for mode in Altp2mMode:
        assert new(on=False, mode=mode).hvm_param_get(HVM_PARAM_ALTP2M) == mode


# get_domain_state, set_domain_state.


@holds("get_domain_state: enabled, inactive -> 0, False")
def _(new: New) -> None:
    guest = new(on=False)
    assert guest.altp2m_get_domain_state() is False
    guest.altp2m_set_domain_state(True)
    assert guest.altp2m_get_domain_state() is True


@refuses("set_domain_state: nested HVM", EINVAL)
def _(new: New) -> list[Call]:
    guest = new(on=False, nested=True)
    return [partial(guest.altp2m_set_domain_state, state) for state in (True, False)]


@holds("set_domain_state: same state -> 0, no effect")
def _(new: New) -> None:
    guest = new(on=False)
    guest.altp2m_set_domain_state(False)
    guest.altp2m_set_domain_state(True)
    view = guest.view(enter=True)
    guest.altp2m_set_mem_access(view, A, RX)
    guest.altp2m_set_domain_state(True)
    assert guest.access(view, A) == RX
    assert guest.altp2m_get_vcpu_p2m_idx(0) == view


@holds("set_domain_state(1): - -> view 0 exists, visible, all p2midx 0")
def _(new: New) -> None:
    guest = new(vcpus=3)
    assert [guest.altp2m_get_vcpu_p2m_idx(vcpu) for vcpu in range(3)] == [0, 0, 0]
    guest.altp2m_set_visibility(0, True)
    guest.altp2m_switch_to_view(0)
    guest.altp2m_change_gfn(0, A, B)


@holds("set_domain_state(1): host default changed before -> view 0 takes it")
def _(new: New) -> None:
    guest = new()
    guest.altp2m_set_mem_access(0, ALL_GFNS, RX)
    guest.altp2m_set_domain_state(False)
    guest.altp2m_set_domain_state(True)
    assert guest.model.views[0].default_access == RX


@holds("set_domain_state(0): views in use -> all views gone, p2midx 0xffff, #VE off")
def _(new: New) -> None:
    guest = new(vcpus=2)
    view = guest.view(enter=True)
    guest.altp2m_set_mem_access(view, A, RX)
    guest.altp2m_change_gfn(0, A, B)
    guest.altp2m_set_visibility(view, False)
    guest.altp2m_set_vcpu_enable_notify(0, C)
    guest.altp2m_set_domain_state(False)
    assert [vcpu.view for vcpu in guest.model.vcpus] == [INVALID_VIEW] * 2
    guest.altp2m_set_domain_state(True)
    assert errno_of(partial(guest.altp2m_get_mem_access, view, A)) == EINVAL
    guest.altp2m_set_vcpu_enable_notify(0, C)  # not EEXIST
    assert guest.frame(A, 0) == INVALID_MFN
    assert guest.view() == view
    guest.altp2m_switch_to_view(view)  # visible again
    assert guest.access(view, A) is None


@holds("set_domain_state(1): fails for want of memory -> ENOMEM, and stays active", until=(4, 15))
def _(new: New) -> None:
    guest = new(on=False)
    guest.backend.machine.xen_heap_exhausted = True
    assert errno_of(partial(guest.altp2m_set_domain_state, True)) == ENOMEM
    assert guest.altp2m_get_domain_state() is True
    assert guest.model.vcpus[0].view == INVALID_VIEW
    assert errno_of(partial(guest.altp2m_switch_to_view, 0)) == EINVAL


@holds("set_domain_state(1): fails for want of memory -> ENOMEM, and inactive", since=(4, 16))
def _(new: New) -> None:
    guest = new(on=False)
    guest.backend.machine.xen_heap_exhausted = True
    assert errno_of(partial(guest.altp2m_set_domain_state, True)) == ENOMEM
    assert guest.altp2m_get_domain_state() is False


# create_view, destroy_view.


@refuses("create_view: access > default", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    last = default_access(guest.xen)
    return [partial(guest.altp2m_create_view, access) for access in (last + 1, 99, 0xFFFF)]


@refuses("create_view: no free id", EINVAL)
def _(new: New) -> Call:
    guest = new()
    assert [guest.view() for _ in range(9)] == list(range(1, 10))
    return guest.view


@refuses("create_view: no free id of altp2m_count", EINVAL, since=(4, 21))
def _(new: New) -> list[Call]:
    few, many = new(view_count=3), new(view_count=12)
    assert [few.view() for _ in range(2)] == [1, 2]
    assert [many.view() for _ in range(11)] == list(range(1, 12))
    return [few.view, many.view]


@holds("create_view: altp2m_count -> not yet a setting, 10 views", until=(4, 20))
def _(new: New) -> None:
    guest = new(view_count=3)
    assert [guest.view() for _ in range(9)] == list(range(1, 10))


@refuses("create_view: no memory for the log-dirty ranges", ENOMEM)
def _(new: New) -> Call:
    guest = new()
    guest.backend.machine.xen_heap_exhausted = True
    return guest.view


@holds("create_view: ok -> lowest free id")
def _(new: New) -> None:
    guest = new()
    assert [guest.view() for _ in range(4)] == [1, 2, 3, 4]
    guest.altp2m_destroy_view(3)
    guest.altp2m_destroy_view(2)
    assert [guest.view() for _ in range(3)] == [2, 3, 5]


@holds("create_view: every access -> kept as the view's default")
def _(new: New) -> None:
    for access in range(default_access(new.xen)):
        guest = new()
        assert guest.altp2m_get_mem_access(guest.view(access), ALL_GFNS) == access


@holds("create_view: default -> the host default of that moment")
def _(new: New) -> None:
    guest = new()
    guest.altp2m_set_mem_access(0, ALL_GFNS, RX)
    view = guest.view(default_access(guest.xen))
    guest.altp2m_set_mem_access(0, ALL_GFNS, RW)
    assert guest.altp2m_get_mem_access(view, ALL_GFNS) == RX


@holds("create_view: after a destroy -> empty, visible, its remap range forgotten")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_change_gfn(view, A, B)
    guest.altp2m_set_visibility(view, False)
    guest.altp2m_destroy_view(view)
    assert guest.view() == view
    assert guest.access(view, A) is None
    guest.altp2m_switch_to_view(view)
    guest.altp2m_set_mem_access(view, D, RX)
    assert guest.access(view, A) is None  # nor when there is something above it
    guest.drop(B)
    assert guest.access(view, D) == RX


@refuses("destroy_view: view 0, bad view, any vCPU in it", EBUSY)
def _(new: New) -> list[Call]:
    guest = new(vcpus=2)
    view, other = guest.view(), guest.view()
    guest.model.vcpus[0].view, guest.model.vcpus[1].view = other, view
    return [partial(guest.altp2m_destroy_view, bad) for bad in (0, view, other, 3, 9, 10, 0xFFFF)]


# switch_to_view, set_visibility, get_vcpu_p2m_idx.


@refuses("switch_to_view: bad view or invisible", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    view = guest.view()
    guest.altp2m_set_visibility(view, False)
    return [partial(guest.altp2m_switch_to_view, bad) for bad in (view, 2, 9, 10, 0xFFFF)]


@holds("switch_to_view: ok -> every vCPU moves")
def _(new: New) -> None:
    guest = new(vcpus=3)
    view = guest.view(enter=True)
    assert [guest.altp2m_get_vcpu_p2m_idx(vcpu) for vcpu in range(3)] == [view] * 3
    guest.altp2m_switch_to_view(view)
    guest.altp2m_switch_to_view(0)
    assert [guest.altp2m_get_vcpu_p2m_idx(vcpu) for vcpu in range(3)] == [0] * 3


@refuses("set_visibility: bad view", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [partial(guest.altp2m_set_visibility, bad, True) for bad in (1, 9, 10, 0xFFFF)]


@holds("set_visibility: view 0, or view in use -> 0, its vCPUs stay")
def _(new: New) -> None:
    guest = new()
    guest.altp2m_set_visibility(0, False)
    assert guest.altp2m_get_vcpu_p2m_idx(0) == 0
    assert errno_of(partial(guest.altp2m_switch_to_view, 0)) == EINVAL
    view = guest.view(enter=True)
    guest.altp2m_set_visibility(view, False)
    assert guest.altp2m_get_vcpu_p2m_idx(0) == view
    guest.altp2m_set_visibility(0, True)
    guest.altp2m_switch_to_view(0)


@refuses("get_vcpu_p2m_idx: no such vCPU", EINVAL)
def _(new: New) -> list[Call]:
    guest = new(vcpus=2)
    return [partial(guest.altp2m_get_vcpu_p2m_idx, vcpu) for vcpu in (2, 0xFFFFFFFF)]


# change_gfn.


@refuses("change_gfn: bad view", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [
        partial(guest.altp2m_change_gfn, view, HOLE, target)
        for view in (1, 9, 10, 0xFFFF)
        for target in (HOLE, ALL_GFNS)
    ]


@holds("change_gfn revert: no entry in view -> 0")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    for gfn in (A, HOLE, DIRECT_MMIO, TOO_HIGH):
        guest.altp2m_change_gfn(view, gfn, ALL_GFNS)
    assert guest.access(view, A) is None
    assert guest.access(0, A) == RWX


@refuses("change_gfn revert: view entry is direct MMIO (XSA-378)", EILSEQ)
def _(new: New) -> Call:
    guest = new()
    view = guest.view(enter=True)
    assert guest.touch(DIRECT_MMIO) is Outcome.DONE
    return partial(guest.altp2m_change_gfn, view, DIRECT_MMIO, ALL_GFNS)


@refuses("change_gfn revert: view entry is neither RAM nor broken", EILSEQ, since=(4, 21))
def _(new: New) -> Call:
    guest = new()
    view = guest.view()
    table = guest.model.views[view].table
    assert table.write(A, guest.frame(A), ORDER_4K, PageType.MMIO_DM, RWX) == 0
    return partial(guest.altp2m_change_gfn, view, A, ALL_GFNS)


@holds("change_gfn revert: view entry is neither RAM nor broken -> 0, removed", until=(4, 20))
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    table = guest.model.views[view].table
    assert table.write(A, guest.frame(A), ORDER_4K, PageType.MMIO_DM, RWX) == 0
    guest.altp2m_change_gfn(view, A, ALL_GFNS)
    assert guest.access(view, A) is None


@holds("change_gfn revert: view entry is broken, RAM, grant or foreign -> 0, removed")
def _(new: New) -> None:
    removable = (PageType.BROKEN, PageType.RAM_RO, PageType.GRANT_MAP_RW, PageType.FOREIGN)
    for kind in removable:
        guest = new()
        view = guest.view()
        table = guest.model.views[view].table
        assert table.write(A, guest.frame(A), ORDER_4K, kind, RWX) == 0
        guest.altp2m_change_gfn(view, A, ALL_GFNS)
        assert guest.access(view, A) is None


@refuses("change_gfn revert: inside a superpage of the view, pool empty", ENOMEM)
def _(new: New) -> Call:
    guest = new(superpages=True)
    view = guest.view(enter=True)
    guest.touch(D)
    guest.exhaust()
    return partial(guest.altp2m_change_gfn, view, D, ALL_GFNS)


@holds("change_gfn revert: fails -> the frame keeps its M2P, and counts as dirty (XSA-389)")
def _(new: New) -> None:
    guest = new(superpages=True)
    view = guest.view(enter=True)
    guest.touch(D)
    guest.exhaust()
    assert errno_of(partial(guest.altp2m_change_gfn, view, D, ALL_GFNS)) == ENOMEM
    assert guest.model.m2p[guest.frame(D)] == D
    assert D in guest.model.dirty


@holds("change_gfn revert: remapped -> the gfn fills from the host again, its access lost")
def _(new: New) -> None:
    guest = new()
    view = guest.view(enter=True)
    guest.altp2m_change_gfn(view, A, B)
    guest.altp2m_set_mem_access(view, A, RX)
    guest.altp2m_change_gfn(view, A, ALL_GFNS)
    assert guest.access(view, A) is None
    assert guest.touch(A) is Outcome.DONE
    assert guest.access(view, A) == RWX
    assert guest.frame(A, view) == guest.frame(A)


@holds("change_gfn revert: of a lazily copied gfn -> the guest's own frame loses its M2P")
def _(new: New) -> None:
    guest = new()
    view = guest.view(enter=True)
    guest.touch(A)
    assert guest.model.m2p[guest.frame(A)] == A
    guest.altp2m_change_gfn(view, A, ALL_GFNS)
    assert guest.frame(A) not in guest.model.m2p


@holds("change_gfn revert: of a remap -> the shadow frame loses its M2P, the original keeps it")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_change_gfn(view, A, B)
    guest.altp2m_change_gfn(view, A, ALL_GFNS)
    assert guest.frame(B) not in guest.model.m2p
    assert guest.model.m2p[guest.frame(A)] == A


@holds("change_gfn revert: gfn dirty -> clean in the log-dirty bitmap from 4.22 on")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_change_gfn(view, A, B)
    guest.model.dirty.add(A)
    guest.altp2m_change_gfn(view, A, ALL_GFNS)
    assert (A in guest.model.dirty) is (guest.xen < (4, 22))


@holds("change_gfn revert: range -> does not shrink, a drop still resets")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_change_gfn(view, A, B)
    guest.altp2m_change_gfn(view, A, ALL_GFNS)
    guest.altp2m_set_mem_access(view, D, RX)
    guest.drop(B)
    assert guest.access(view, D) is None


@refuses("change_gfn: old or new has no effective ram_rw entry", ESRCH)
def _(new: New) -> list[Call]:
    guest = new()
    view = guest.view()
    other = {
        0x110: PageType.RAM_LOGDIRTY,
        0x111: PageType.RAM_RO,
        0x112: PageType.IOREQ_SERVER,
        0x113: PageType.GRANT_MAP_RW,
        0x114: PageType.FOREIGN,
        0x115: PageType.PAGED,
    }
    for gfn, kind in other.items():
        guest.retype(gfn, kind)
    unfit = [HOLE, DIRECT_MMIO, TOO_HIGH, *other]
    olds = [partial(guest.altp2m_change_gfn, view, gfn, A) for gfn in (*unfit, ALL_GFNS)]
    news = [partial(guest.altp2m_change_gfn, view, A, gfn) for gfn in unfit]
    return [*olds, *news]


@holds("change_gfn: the view has its own entry -> its type is not looked at")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_set_mem_access(view, A, RX)
    guest.altp2m_set_mem_access(view, B, RW)
    guest.retype(A, PageType.RAM_LOGDIRTY)
    guest.retype(B, PageType.RAM_LOGDIRTY)
    guest.altp2m_change_gfn(view, A, B)
    assert guest.access(view, A) == RW


@refuses("change_gfn: old prepopulate fails, pool empty", ENOMEM)
def _(new: New) -> Call:
    guest = new(superpages=True)
    view = guest.view()
    guest.exhaust()
    return partial(guest.altp2m_change_gfn, view, A, B)


@holds("change_gfn: final write fails, pool empty -> 0, nothing done")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_set_mem_access(view, D, RX)
    guest.exhaust()
    guest.altp2m_change_gfn(view, A, E)  # A's part of the view has no table yet
    assert guest.access(view, A) is None
    guest.drop(E)  # the range was not extended, so nothing is reset
    assert guest.access(view, D) == RX


@holds("change_gfn: ok -> new's frame, new's access, old's access lost")
def _(new: New) -> None:
    guest = new()
    view = guest.view(RW)
    guest.altp2m_set_mem_access(0, B, RX)
    guest.altp2m_set_mem_access(view, A, R)
    guest.altp2m_change_gfn(view, A, B)
    assert guest.frame(A, view) == guest.frame(B)
    assert guest.access(view, A) == RX  # of the host's entry, not the view's default
    assert guest.access(view, B) is None  # new is only looked up
    assert guest.frame(A) != guest.frame(B)


@holds("change_gfn: new in a host superpage -> looked up, not copied; old's superpage is")
def _(new: New) -> None:
    guest = new(superpages=True)
    view = guest.view()
    guest.altp2m_change_gfn(view, A, D)
    assert guest.access(view, D) is None
    assert guest.access(view, B) == RWX


@holds("change_gfn: several -> the range spans every new gfn")
def _(new: New) -> None:
    for order in ((0, 4), (4, 0), (0, 4, 1)):
        guest, (one, *_) = with_remaps(new)
        for offset in order:
            guest.altp2m_change_gfn(one, A, HOLE + offset)
        guest.drop(HOLE + 3)
        assert guest.access(one, D) is None


@holds("change_gfn: new is remapped in this view -> its frame and access, one step")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_change_gfn(view, B, C)
    guest.altp2m_set_mem_access(view, B, X)
    guest.altp2m_change_gfn(view, A, B)
    assert guest.frame(A, view) == guest.frame(C)
    assert guest.access(view, A) == X


@holds("change_gfn: from the control domain -> suppress #VE set")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_set_suppress_ve(view, A, False)
    guest.altp2m_change_gfn(view, A, B)
    assert guest.altp2m_get_suppress_ve(view, A) is True


@holds("change_gfn: to itself -> a private 4K copy")
def _(new: New) -> None:
    guest = new(superpages=True)
    view = guest.view()
    guest.altp2m_change_gfn(view, A, A)
    found = guest.model.views[view].table.lookup(A)
    assert (found.mfn, found.order) == (guest.frame(A), ORDER_4K)


@holds("change_gfn: view 0 -> remaps the default view, not the host")
def _(new: New) -> None:
    guest = new()
    before = guest.frame(A)
    guest.altp2m_change_gfn(0, A, B)
    assert guest.frame(A, 0) == guest.frame(B)
    assert guest.frame(A) == before
    guest.altp2m_change_gfn(0, A, ALL_GFNS)
    assert guest.frame(A, 0) == INVALID_MFN


@holds("change_gfn: the frame behind new is replaced in the host -> the remap keeps the old one")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_change_gfn(view, A, B)
    old = guest.frame(B)
    guest.populate(B)
    assert guest.frame(B) != old
    assert guest.frame(A, view) == old


# set_mem_access, set_mem_access_multi, get_mem_access.


@refuses("set_mem_access: bad view (view != 0)", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [
        partial(guest.altp2m_set_mem_access, view, gfn, RX)
        for view in (1, 9, 10, 0xFFFF)
        for gfn in (A, HOLE, ALL_GFNS)
    ]


@refuses("set_mem_access: invalid access number", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    guest.view()
    last = default_access(guest.xen)
    return [
        partial(guest.altp2m_set_mem_access, view, gfn, access)
        for view in (0, 1)
        for gfn in (A, HOLE, ALL_GFNS)
        for access in (last + 1, 99)
    ]


@holds("set_mem_access: every access number -> read back; default is the host's, r_pw is 4.20's")
def _(new: New) -> None:
    guest = new()
    view = guest.view(RX)
    for table in (0, view):
        for access in range(default_access(guest.xen)):
            guest.altp2m_set_mem_access(table, A, access)
            assert guest.access(table, A) == access
    assert default_access(guest.xen) == R_PW or guest.xen >= (4, 20)
    guest.altp2m_set_mem_access(0, ALL_GFNS, RW)
    guest.altp2m_set_mem_access(view, A, default_access(guest.xen))
    assert guest.access(view, A) == RW


@holds("set_mem_access: gfn ~0 -> 0, host default changed, whatever the view")
def _(new: New) -> None:
    for view in (0, 1):
        guest = new()
        guest.view(RX)
        guest.altp2m_set_mem_access(view, ALL_GFNS, RW)
        assert guest.altp2m_get_mem_access(0, ALL_GFNS) == RW
        assert guest.altp2m_get_mem_access(1, ALL_GFNS) == RX
        assert guest.access(0, A) == RWX
        guest.populate(HOLE)
        assert guest.access(0, HOLE) == RW


@holds("set_mem_access view>0: hole, MMIO, log-dirty etc. not in view -> 0, nothing")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.retype(A, PageType.RAM_LOGDIRTY)
    guest.retype(B, PageType.RAM_RO)
    for gfn in (HOLE, DIRECT_MMIO, TOO_HIGH, A, B):
        guest.altp2m_set_mem_access(view, gfn, RX)
        assert guest.access(view, gfn) is None
    assert guest.domain_maximum_gpfn() == HIGHEST


@holds("set_mem_access view 0: hole -> 0; empty entry, and the highest gfn grows")
def _(new: New) -> None:
    guest = new()
    guest.altp2m_set_mem_access(0, 0x100000, RX)
    assert guest.access(0, 0x100000) is None
    assert guest.domain_maximum_gpfn() == 0x100000


@holds("set_mem_access view 0: hole inside a view's remap range -> that view is reset")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.populate(HOLE)
    guest.populate(HOLE + 2)
    guest.altp2m_change_gfn(view, A, HOLE)
    guest.altp2m_change_gfn(view, B, HOLE + 2)
    guest.altp2m_set_mem_access(0, HOLE + 3, RX)
    assert guest.access(view, A) == RWX
    guest.altp2m_set_mem_access(0, HOLE + 1, RX)
    assert guest.access(view, A) is None


@refuses("set_mem_access view 0: gfn >= 2^36", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [partial(guest.altp2m_set_mem_access, 0, gfn, RX) for gfn in (TOO_HIGH, ALL_GFNS - 1)]


@refuses("set_mem_access: pool empty", ENOMEM)
def _(new: New) -> list[Call]:
    fine, coarse = new(), new(superpages=True)
    for guest in (fine, coarse):
        guest.view()
        guest.exhaust()
    return [
        partial(fine.altp2m_set_mem_access, 1, A, RX),
        partial(coarse.altp2m_set_mem_access, 1, A, RX),  # the 2M copy
        partial(coarse.altp2m_set_mem_access, 0, A, RX),  # the split of the host's entry
    ]


@holds("set_mem_access view 0: ok -> the host's entry, not the default view's")
def _(new: New) -> None:
    guest = new()
    guest.altp2m_set_mem_access(0, A, RX)
    assert guest.model.host.lookup(A).access == RX
    assert guest.frame(A, 0) == INVALID_MFN


@holds("set_mem_access view>0: ok -> only that view's entry")
def _(new: New) -> None:
    guest = new()
    view, other = guest.view(), guest.view()
    guest.altp2m_set_mem_access(view, A, RX)
    assert guest.access(view, A) == RX
    assert guest.access(other, A) is None
    assert guest.access(0, A) == RWX
    assert guest.frame(A, view) == guest.frame(A)


@holds("set_mem_access view>0: a remapped gfn -> keeps its remap")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_change_gfn(view, A, B)
    guest.altp2m_set_mem_access(view, A, X)
    assert (guest.frame(A, view), guest.access(view, A)) == (guest.frame(B), X)


@holds(
    "set_mem_access view>0: a host superpage -> copied whole; host's access, view default from 4.22"
)
def _(new: New) -> None:
    guest = new(superpages=True)
    view = guest.view(RW)
    guest.altp2m_set_mem_access(view, A, RX)
    assert guest.access(view, A) == RX
    neighbours = RW if guest.xen >= (4, 22) else RWX
    assert [guest.access(view, gfn) for gfn in (0, B, C, 0x1FF)] == [neighbours] * 4
    assert guest.frame(C, view) == guest.frame(C)
    assert guest.access(view, 0x200) is None  # the next superpage


@holds("set_mem_access view>0: a host superpage, view default n -> the neighbours vanish (4.22)")
def _(new: New) -> None:
    guest = new(superpages=True)
    view = guest.view(N)
    guest.altp2m_set_mem_access(view, A, RX)
    assert guest.access(view, A) == RX
    assert guest.access(view, B) == (None if guest.xen >= (4, 22) else RWX)


@holds(
    "set_mem_access view>0: a host superpage, view default x -> as n, where XSA-304 counts (4.22)"
)
def _(new: New) -> None:
    for executable in (False, True):
        guest = new(host={"executable_superpages": executable}, superpages=True)
        view = guest.view(X)
        guest.altp2m_set_mem_access(view, A, RX)
        copied = X if executable else None
        assert guest.access(view, B) == (copied if guest.xen >= (4, 22) else RWX)


@holds("set_mem_access view 0: a host superpage -> split, the neighbours as they were")
def _(new: New) -> None:
    guest = new(superpages=True)
    guest.altp2m_set_mem_access(0, A, R)
    assert [guest.access(0, gfn) for gfn in (A - 1, A, B)] == [RWX, R, RWX]
    assert guest.frame(B) == guest.frame(A) + 1


@refuses(
    "set_mem_access, _multi, get_mem_access: 4.22 without CONFIG_VM_EVENT",
    EOPNOTSUPP,
    since=(4, 22),
)
def _(new: New) -> list[Call]:
    guest = new(host={"vm_event": False})
    return [
        partial(guest.altp2m_set_mem_access, 1, A, RX),
        partial(guest.altp2m_set_mem_access_multi, 1, b"", gfns()),
        partial(guest.altp2m_get_mem_access, 1, A),
        guest.monitor_enable,
        partial(guest.monitor_singlestep, True),
        guest.monitor_control_registers,
        guest.backend.vm_event_get_version,
    ]


@refuses(
    "xc_set_mem_access, _multi, xc_get_mem_access: 4.22 without CONFIG_VM_EVENT",
    ENOSYS,
    since=(4, 22),
)
def _(new: New) -> list[Call]:
    guest = new(host={"vm_event": False})
    return [
        partial(guest.set_mem_access, RX, A, 1),
        partial(guest.set_mem_access_multi, bytes([RX]), gfns(A)),
        partial(guest.get_mem_access, A),
        partial(guest.domain_set_access_required, True),
    ]


@holds("set_mem_access: CONFIG_VM_EVENT -> cannot be left out before 4.22", until=(4, 21))
def _(new: New) -> None:
    guest = new(host={"vm_event": False})
    guest.altp2m_set_mem_access(0, A, RX)


@holds("set_mem_access_multi: bad access at element k -> EINVAL, 0..k-1 applied")
def _(new: New) -> None:
    guest = new()
    for view in (0, guest.view()):
        accesses, where = bytes([RX, R, 99, RW]), gfns(A, B, C, D)
        call = partial(guest.altp2m_set_mem_access_multi, view, accesses, where)
        assert errno_of(call) == EINVAL
        untouched = None if view else RWX
        got = [guest.access(view, gfn) for gfn in (A, B, C, D)]
        assert got == [RX, R, untouched, untouched]


@holds("set_mem_access_multi: pool empty at element k -> ENOMEM, 0..k-1 applied")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.exhaust(left=3)  # the tables for A and B, none for D
    call = partial(guest.altp2m_set_mem_access_multi, view, bytes([RX, R, RW]), gfns(A, B, D))
    assert errno_of(call) == ENOMEM
    assert [guest.access(view, gfn) for gfn in (A, B, D)] == [RX, R, None]


@holds("set_mem_access_multi: missing gfns, ~0 too -> skipped, no default changed")
def _(new: New) -> None:
    guest = new()
    view = guest.view(RW)
    where = gfns(HOLE, ALL_GFNS, DIRECT_MMIO, A)
    guest.altp2m_set_mem_access_multi(view, bytes([RX] * 4), where)
    assert guest.access(view, A) == RX
    assert guest.altp2m_get_mem_access(0, ALL_GFNS) == RWX
    assert guest.altp2m_get_mem_access(view, ALL_GFNS) == RW


@refuses("set_mem_access_multi view 0: gfn >= 2^36, ~0 too", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [
        partial(guest.altp2m_set_mem_access_multi, 0, bytes([RX]), gfns(gfn))
        for gfn in (TOO_HIGH, ALL_GFNS)
    ]


@holds("set_mem_access_multi: nr 0 -> 0 (bad view still EINVAL)")
def _(new: New) -> None:
    guest = new()
    guest.altp2m_set_mem_access_multi(0, b"", gfns())
    guest.altp2m_set_mem_access_multi(guest.view(), b"", gfns())
    assert errno_of(partial(guest.altp2m_set_mem_access_multi, 2, b"", gfns())) == EINVAL


@holds("set_mem_access_multi: default in the list -> the host's default")
def _(new: New) -> None:
    guest = new()
    view = guest.view(R)
    guest.altp2m_set_mem_access(0, ALL_GFNS, RX)
    guest.altp2m_set_mem_access_multi(view, bytes([default_access(guest.xen)]), gfns(A))
    assert guest.access(view, A) == RX


@refuses("get_mem_access: bad view (view != 0)", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [
        partial(guest.altp2m_get_mem_access, view, gfn)
        for view in (1, 9, 10, 0xFFFF)
        for gfn in (A, HOLE, ALL_GFNS)
    ]


@refuses("get_mem_access: gfn absent in that table, no fallback to the host", ESRCH)
def _(new: New) -> list[Call]:
    guest = new()
    view = guest.view()
    return [
        *(partial(guest.altp2m_get_mem_access, view, gfn) for gfn in (A, HOLE, TOO_HIGH)),
        *(partial(guest.altp2m_get_mem_access, 0, gfn) for gfn in (HOLE, TOO_HIGH)),
    ]


@holds("get_mem_access: gfn ~0 -> 0, that table's default")
def _(new: New) -> None:
    guest = new()
    view = guest.view(RX)
    guest.altp2m_set_mem_access(0, ALL_GFNS, R)
    assert guest.altp2m_get_mem_access(0, ALL_GFNS) == R
    assert guest.altp2m_get_mem_access(view, ALL_GFNS) == RX


# suppress #VE.


@refuses("set_suppress_ve: bad view", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [
        partial(guest.altp2m_set_suppress_ve, view, gfn, True)
        for view in (1, 9, 10, 0xFFFF)
        for gfn in (A, HOLE)
    ]


@refuses("set_suppress_ve: unresolvable", ESRCH)
def _(new: New) -> list[Call]:
    guest = new()
    view = guest.view()
    guest.retype(A, PageType.RAM_LOGDIRTY)
    return [
        partial(guest.altp2m_set_suppress_ve, view, gfn, True)
        for gfn in (HOLE, DIRECT_MMIO, A, TOO_HIGH)
    ]


@refuses("set_suppress_ve: pool empty", ENOMEM)
def _(new: New) -> Call:
    guest = new()
    view = guest.view()
    guest.exhaust()
    return partial(guest.altp2m_set_suppress_ve, view, A, False)


@holds("set_suppress_ve: view 0, hole -> 0; empty entry, may reset views")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.populate(HOLE)
    guest.populate(HOLE + 2)
    guest.altp2m_change_gfn(view, A, HOLE)
    guest.altp2m_change_gfn(view, B, HOLE + 2)
    guest.altp2m_set_suppress_ve(0, HOLE + 1, False)
    assert guest.access(view, A) is None
    assert errno_of(partial(guest.altp2m_get_suppress_ve, 0, HOLE + 1)) == ESRCH
    guest.altp2m_set_suppress_ve(0, 0x100000, False)
    assert guest.domain_maximum_gpfn() == 0x100000


@refuses("set_suppress_ve view 0: gfn >= 2^36", EINVAL)
def _(new: New) -> Call:
    return partial(new().altp2m_set_suppress_ve, 0, TOO_HIGH, True)


@holds("set_suppress_ve: gfn ~0 -> livelock in Xen, refused loudly")
def _(new: New) -> None:
    guest = new()
    for view in (0, guest.view()):
        with pytest.raises(InvalidArgumentError, match="never returns"):
            guest.altp2m_set_suppress_ve(view, ALL_GFNS, True)
        with pytest.raises(Livelock):
            guest.model.set_suppress_ve(view, ALL_GFNS, True)
    assert not any("suppress" in call.op for call in guest.backend.calls)


@holds("set_suppress_ve: ok -> one 4K entry with the effective access, no superpage copied")
def _(new: New) -> None:
    guest = new(superpages=True)
    view = guest.view(R)
    guest.altp2m_set_suppress_ve(view, A, False)
    assert guest.altp2m_get_suppress_ve(view, A) is False
    assert guest.access(view, A) == RWX  # the host's, not the view's default
    assert guest.access(view, B) is None
    guest.altp2m_set_suppress_ve(view, A, True)
    assert guest.altp2m_get_suppress_ve(view, A) is True


@holds("set_suppress_ve: an entry of the view -> keeps its access and frame")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_change_gfn(view, A, B)
    guest.altp2m_set_mem_access(view, A, X)
    guest.altp2m_set_suppress_ve(view, A, False)
    assert (guest.access(view, A), guest.frame(A, view)) == (X, guest.frame(B))


@holds("set_suppress_ve: #VE neither enabled nor known to the CPU -> 0")
def _(new: New) -> None:
    guest = new(host={"has_virtualisation_exceptions": False})
    guest.altp2m_set_suppress_ve(0, A, False)
    assert guest.altp2m_get_suppress_ve(0, A) is False


@holds("suppress_ve: entries that come to be -> 1; set_mem_access inherits what was there")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    assert guest.altp2m_get_suppress_ve(0, A) is True
    guest.altp2m_set_mem_access(view, A, RX)
    assert guest.altp2m_get_suppress_ve(view, A) is True
    guest.altp2m_set_suppress_ve(view, A, False)
    guest.altp2m_set_mem_access(view, A, RW)
    assert guest.altp2m_get_suppress_ve(view, A) is False
    guest.altp2m_set_suppress_ve(0, B, False)
    guest.altp2m_set_mem_access(view, B, RX)
    assert guest.altp2m_get_suppress_ve(view, B) is True  # the view had no entry to inherit from
    guest.altp2m_set_mem_access(0, B, RX)
    assert guest.altp2m_get_suppress_ve(0, B) is False


@refuses("get_suppress_ve: bad view", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [partial(guest.altp2m_get_suppress_ve, view, A) for view in (1, 9, 10, 0xFFFF)]


@refuses("get_suppress_ve: absent", ESRCH)
def _(new: New) -> list[Call]:
    guest = new()
    view = guest.view()
    return [
        partial(guest.altp2m_get_suppress_ve, view, A),
        partial(guest.altp2m_get_suppress_ve, 0, HOLE),
        partial(guest.altp2m_get_suppress_ve, 0, ALL_GFNS),
    ]


@refuses("set_supress_ve_multi: first > clamped last / bad view", EINVAL)
def _(new: New) -> list[Call]:
    guest = new(host={"physical_address_bits": 39})
    guest.view()
    return [
        partial(guest.altp2m_set_suppress_ve_multi, 1, B, A, True),
        partial(guest.altp2m_set_suppress_ve_multi, 1, 1 << 39, (1 << 39) + 5, True),
        partial(guest.altp2m_set_suppress_ve_multi, 1, ALL_GFNS, ALL_GFNS, True),
        partial(guest.altp2m_set_suppress_ve_multi, 2, A, B, True),
        partial(guest.altp2m_set_suppress_ve_multi, 0xFFFF, A, B, True),
    ]


@holds("set_supress_ve_multi: some gfns fail -> 0; the first failure, the rest done")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.retype(0x102, PageType.RAM_LOGDIRTY)
    guest.retype(0x104, PageType.RAM_RO)
    assert guest.altp2m_set_suppress_ve_multi(view, 0x100, 0x105, False) == (0x102, ESRCH)
    good = (0x100, 0x101, 0x103, 0x105)
    assert not any(guest.altp2m_get_suppress_ve(view, gfn) for gfn in good)
    assert guest.altp2m_set_suppress_ve_multi(view, A, B, True) is None


@holds("set_supress_ve_multi: last beyond maxphysaddr -> clamped, the first absent gfn reported")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    last = guest.domain_maximum_gpfn()
    assert guest.altp2m_set_suppress_ve_multi(view, last + 1, ALL_GFNS, True) == (last + 1, ESRCH)


@holds("set_supress_ve_multi: view 0, gfns to the end -> as good as a livelock, refused loudly")
def _(new: New) -> None:
    with pytest.raises(Livelock):
        new().altp2m_set_suppress_ve_multi(0, A, ALL_GFNS, True)


# The #VE information page.


@refuses("enable_notify: vcpu >= max", EINVAL)
def _(new: New) -> list[Call]:
    guest = new(host={"has_virtualisation_exceptions": False}, vcpus=2)
    return [partial(guest.altp2m_set_vcpu_enable_notify, vcpu, A) for vcpu in (2, 0xFFFFFFFF)]


@refuses("enable_notify: CPU without #VE", EOPNOTSUPP)
def _(new: New) -> Call:
    guest = new(host={"has_virtualisation_exceptions": False})
    return partial(guest.altp2m_set_vcpu_enable_notify, 0, HOLE)


@refuses("enable_notify: already on", EEXIST)
def _(new: New) -> list[Call]:
    guest = new()
    guest.altp2m_set_vcpu_enable_notify(0, A)
    return [partial(guest.altp2m_set_vcpu_enable_notify, 0, gfn) for gfn in (A, B, HOLE)]


@refuses("enable_notify: page missing / special / wrong type", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    guest.model.special_frames.add(guest.frame(A))
    guest.retype(B, PageType.RAM_RO)
    guest.retype(C, PageType.GRANT_MAP_RW)
    return [
        partial(guest.altp2m_set_vcpu_enable_notify, 0, gfn) for gfn in (HOLE, TOO_HIGH, A, B, C)
    ]


@refuses("enable_notify: paged", EAGAIN)
def _(new: New) -> Call:
    guest = new()
    guest.retype(A, PageType.PAGED)
    return partial(guest.altp2m_set_vcpu_enable_notify, 0, A)


@refuses("enable_notify: direct MMIO", EPERM)
def _(new: New) -> Call:
    return partial(new().altp2m_set_vcpu_enable_notify, 0, DIRECT_MMIO)


@holds("enable_notify: log-dirty or shared page -> 0, the shared one unshared")
def _(new: New) -> None:
    guest = new(vcpus=2)
    guest.retype(A, PageType.RAM_LOGDIRTY)
    guest.retype(B, PageType.SHARED)
    guest.altp2m_set_vcpu_enable_notify(0, A)
    guest.altp2m_set_vcpu_enable_notify(1, B)
    assert guest.model.host.lookup(B).type == PageType.RAM_RW


@holds("enable_notify: ballooned out meanwhile -> the page stays until #VE goes off")
def _(new: New) -> None:
    guest = new()
    pages = guest.model.pages
    guest.altp2m_set_vcpu_enable_notify(0, A)
    guest.drop(A)
    assert guest.model.pages == pages
    guest.altp2m_set_vcpu_disable_notify(0)
    assert guest.model.pages == pages - 1


@refuses("disable_notify: vcpu >= max", EINVAL)
def _(new: New) -> Call:
    guest = new(host={"has_virtualisation_exceptions": False})
    return partial(guest.altp2m_set_vcpu_disable_notify, 1)


@refuses("disable_notify: no #VE", EOPNOTSUPP)
def _(new: New) -> Call:
    guest = new(host={"has_virtualisation_exceptions": False})
    return partial(guest.altp2m_set_vcpu_disable_notify, 0)


@holds("disable_notify: not enabled -> 0")
def _(new: New) -> None:
    guest = new()
    guest.altp2m_set_vcpu_disable_notify(0)
    guest.altp2m_set_vcpu_enable_notify(0, A)
    guest.altp2m_set_vcpu_disable_notify(0)
    guest.altp2m_set_vcpu_enable_notify(0, B)


# Lazy copy and propagation.


@holds("lazy copy: access -> the host's (to 4.18), the view's default (from 4.19)")
def _(new: New) -> None:
    guest = new()
    guest.altp2m_set_mem_access(0, A, R)
    view = guest.view(RX, enter=True)
    assert guest.touch(A) is Outcome.DONE
    assert guest.access(view, A) == (RX if guest.xen >= (4, 19) else R)
    assert guest.frame(A, view) == guest.frame(A)


@holds("lazy copy: a host superpage, a hole as large in the view -> copied whole")
def _(new: New) -> None:
    guest = new(superpages=True)
    view = guest.view(enter=True)
    guest.touch(D)
    found = guest.model.views[view].table.lookup(D)
    assert (found.mfn, found.order) == (guest.frame(D), ORDER_2M)
    assert guest.access(view, E) == RWX


@holds("lazy copy: a host superpage, the first gfns of an empty view -> 4K from 4.17 on")
def _(new: New) -> None:
    """Below the highest gfn ever mapped a hole counts as 4K, and a new view starts from 0."""
    guest = new(superpages=True)
    for _again in range(2):
        view = guest.view(enter=True)
        guest.touch(A)
        found = guest.model.views[view].table.lookup(A)
        assert found.order == (ORDER_4K if guest.xen >= (4, 17) else ORDER_2M)
        guest.touch(D)
        guest.altp2m_switch_to_view(0)
        guest.altp2m_destroy_view(view)


@holds("lazy copy: a host superpage, the first gfns of a view emptied by a reset -> copied whole")
def _(new: New) -> None:
    """A reset leaves the highest gfn ever mapped as it was."""
    guest = new(superpages=True)
    view = guest.view(enter=True)
    guest.populate(HOLE)
    guest.altp2m_change_gfn(view, A, HOLE)
    guest.drop(HOLE)
    guest.touch(A)
    assert guest.model.views[view].table.lookup(A).order == ORDER_2M


@holds("lazy copy: a host superpage, a 4K hole in the view -> 4K (from 4.17), all of it (to 4.16)")
def _(new: New) -> None:
    guest = new(superpages=True)
    view = guest.view(enter=True)
    guest.altp2m_set_mem_access(view, D, RX)
    guest.altp2m_change_gfn(view, E, ALL_GFNS)
    guest.touch(E)
    assert guest.access(view, E) == RWX
    assert guest.access(view, D) == (RX if guest.xen >= (4, 17) else RWX)


@holds("lazy copy: emulated MMIO -> nothing copied, the device model answers in every view")
def _(new: New) -> None:
    guest = new()
    view = guest.view(N, enter=True)
    assert guest.touch(HOLE, "w") is Outcome.EMULATED
    assert guest.access(view, HOLE) is None


@holds("direct MMIO: the APIC's page -> there from creation on in 4.14, then once it has run")
def _(new: New) -> None:
    backend = new(on=False).backend
    fresh = Guest(backend, backend.add_domain("fresh"))
    fresh.domain_pause()
    fresh.domain_unpause()
    assert (fresh.frame(DIRECT_MMIO) != INVALID_MFN) is (fresh.xen == (4, 14))
    fresh.domain_unpause()
    assert fresh.frame(DIRECT_MMIO) != INVALID_MFN


@holds("lazy copy: direct MMIO -> copied, from 4.19 with the view's default")
def _(new: New) -> None:
    guest = new()
    view = guest.view(R, enter=True)
    guest.touch(DIRECT_MMIO)
    assert guest.access(view, DIRECT_MMIO) == (R if guest.xen >= (4, 19) else RWX)


@holds("lazy copy: pool empty -> the domain crashes")
def _(new: New) -> None:
    guest = new()
    guest.view(enter=True)
    guest.exhaust()
    assert guest.touch(A) is Outcome.CRASH
    assert guest.model.crashed
    assert "pool is exhausted" in guest.model.crash_reason


@holds("lazy copy: view default n, host superpage -> the vCPU never gets out (from 4.19)")
def _(new: New) -> None:
    """D superpage without rights is a hole to ept_get_entry: it is copied again and again."""
    guest = new(superpages=True)
    guest.view(N, enter=True)
    guest.monitor()
    if guest.xen < (4, 19):
        assert guest.touch(D) is Outcome.DONE
    else:
        with pytest.raises(Livelock):
            guest.touch(D)


@holds("host access: set through view 0 -> not enforced in view 0 for untouched gfns (from 4.19)")
def _(new: New) -> None:
    guest = new()
    guest.monitor()
    guest.altp2m_set_mem_access(0, A, R)
    outcome = Outcome.DONE if guest.xen >= (4, 19) else Outcome.EVENT
    assert guest.touch(A, "w") is outcome
    assert guest.access(0, A) == R


@holds("host access: set through view 0 -> enforced in view 0 for gfns it has")
def _(new: New) -> None:
    guest = new()
    guest.monitor()
    assert guest.touch(A, "w") is Outcome.DONE
    guest.altp2m_set_mem_access(0, A, R)
    assert guest.touch(A, "w") is Outcome.EVENT


@holds("propagation: a host write to a gfn the view has -> host's frame, type and access")
def _(new: New) -> None:
    guest = new()
    view, other = guest.view(), guest.view()
    guest.altp2m_change_gfn(view, A, B)
    guest.altp2m_set_mem_access(view, C, X)
    guest.altp2m_set_mem_access(0, A, R)
    guest.altp2m_set_mem_access(0, C, RW)
    assert (guest.access(view, A), guest.frame(A, view)) == (R, guest.frame(A))
    assert guest.access(view, C) == RW
    assert guest.access(other, A) is None


@holds("propagation: while altp2m is off -> none")
def _(new: New) -> None:
    guest = new(on=False)
    guest.altp2m_set_domain_state(True)
    view = guest.view()
    guest.altp2m_set_mem_access(view, A, RX)
    guest.model.active = False
    guest.drop(A)
    guest.model.active = True
    assert guest.access(view, A) == RX


@holds("propagation: a 2M host write, base in the view -> all 512 entries overwritten")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    for gfn in (0x200, D):
        guest.altp2m_set_mem_access(view, gfn, RX)
    guest.populate(0x200, order=ORDER_2M)
    assert [guest.access(view, gfn) for gfn in (0x200, D, E)] == [RWX] * 3
    assert guest.frame(E, view) == guest.frame(E)


@holds("propagation: a 2M host write, base not in the view -> its entries stay, stale")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_set_mem_access(view, D, RX)
    old = guest.frame(D)
    guest.populate(0x200, order=ORDER_2M)
    assert (guest.access(view, D), guest.frame(D, view)) == (RX, old)
    assert guest.frame(D) != old


@holds("propagation: the view's write fails -> its errno, though the host changed")
def _(new: New) -> None:
    guest = new(superpages=True)
    view = guest.view(enter=True)
    guest.touch(D)
    guest.exhaust(left=1)  # enough to split the host's superpage, not the view's
    assert errno_of(partial(guest.altp2m_set_mem_access, 0, D, R)) == ENOMEM
    assert guest.access(0, D) == R
    assert guest.access(view, D) == RWX


def with_remaps(new: New) -> tuple[Guest, list[int]]:
    """Three views with an entry for D each; the first two have remaps to HOLE..HOLE+4."""
    guest = new()
    views = [guest.view(default) for default in (RW, RX, R)]
    for gfn in range(HOLE, HOLE + 5):
        guest.populate(gfn)
    for view in views:
        guest.altp2m_set_mem_access(view, D, X)
    return guest, views


@holds("propagation: a drop inside one view's remap range -> that view is reset, no other")
def _(new: New) -> None:
    guest, (one, two, three) = with_remaps(new)
    guest.altp2m_change_gfn(two, A, HOLE)
    guest.altp2m_change_gfn(two, B, HOLE + 2)
    guest.drop(HOLE + 1)
    assert [guest.access(view, D) for view in (one, two, three)] == [X, None, X]
    assert guest.access(two, A) is None


@holds("propagation: a drop at either end of the range -> resets; one beyond -> does not")
def _(new: New) -> None:
    for gone, reset in ((0, False), (1, True), (3, True), (4, False)):
        guest, (one, *_) = with_remaps(new)
        guest.altp2m_change_gfn(one, A, HOLE + 1)
        guest.altp2m_change_gfn(one, B, HOLE + 3)
        guest.drop(HOLE + gone)
        assert (guest.access(one, D) is None) is reset


@holds("propagation: a drop inside two views' ranges -> every view is reset")
def _(new: New) -> None:
    guest, views = with_remaps(new)
    guest.altp2m_change_gfn(views[0], A, HOLE)
    guest.altp2m_change_gfn(views[2], B, HOLE)
    guest.altp2m_change_gfn(0, A, B)  # view 0 is one of them
    guest.drop(HOLE)
    assert [guest.access(view, D) for view in views] == [None] * 3
    assert guest.frame(A, 0) == INVALID_MFN


@holds("propagation: a drop outside every range -> views keep the rest, and lose the gfn")
def _(new: New) -> None:
    guest, views = with_remaps(new)
    guest.altp2m_change_gfn(views[0], A, HOLE)
    guest.drop(D)
    assert [guest.access(view, D) for view in views] == [None] * 3
    assert guest.frame(A, views[0]) == guest.frame(HOLE)


@holds(
    "reset: - -> the view exists as before, with default, visibility and vCPUs; the range is empty"
)
def _(new: New) -> None:
    guest, (one, *_) = with_remaps(new)
    guest.altp2m_switch_to_view(one)
    guest.altp2m_set_visibility(one, False)
    guest.altp2m_change_gfn(one, A, HOLE)
    guest.drop(HOLE)
    assert guest.altp2m_get_vcpu_p2m_idx(0) == one
    assert guest.altp2m_get_mem_access(one, ALL_GFNS) == RW
    assert errno_of(partial(guest.altp2m_switch_to_view, one)) == EINVAL
    guest.altp2m_set_mem_access(one, D, X)
    guest.populate(HOLE)
    guest.drop(HOLE)
    assert guest.access(one, D) == X


@holds("reset: - -> gives the view's tables back to the pool")
def _(new: New) -> None:
    guest, (one, *_) = with_remaps(new)
    before = guest.model.pool.used
    guest.altp2m_change_gfn(one, A, HOLE)
    guest.drop(HOLE)
    assert guest.model.pool.used < before


@holds("propagation: a dropped superpage -> counts whole (from 4.17), by its base gfn (to 4.16)")
def _(new: New) -> None:
    guest, (one, *_) = with_remaps(new)
    guest.altp2m_change_gfn(one, D, B)
    guest.model.host_write(0, INVALID_MFN, ORDER_2M, PageType.INVALID, RWX)
    assert (guest.access(one, D) is None) is (guest.xen >= (4, 17))


@holds("propagation: xc_monitor_enable -> drops the ring's gfn")
def _(new: New) -> None:
    guest = new()
    view = guest.view()
    guest.altp2m_change_gfn(view, A, RING)
    guest.monitor()
    assert guest.access(view, A) is None
    assert guest.access(0, RING) is None


@holds("propagation: xc_set_mem_access over a hole -> a drop too")
def _(new: New) -> None:
    guest, (one, *_) = with_remaps(new)
    guest.monitor()
    guest.altp2m_change_gfn(one, A, HOLE)
    guest.altp2m_change_gfn(one, B, HOLE + 4)
    guest.drop(HOLE + 2)
    guest.altp2m_set_mem_access(one, D, X)
    guest.altp2m_change_gfn(one, A, HOLE)
    guest.altp2m_change_gfn(one, B, HOLE + 4)
    guest.set_mem_access(RX, HOLE + 2, 1)
    assert guest.access(one, D) is None


# Guest accesses.

VIOLATIONS = {
    N: "rwx", R: "wx", RW: "x", X: "rw", RX: "w", RWX: "", R_PW: "wx",
}  # fmt: skip
"""Which kinds of access an entry does not allow; a write is a read as well."""


@holds("guest access, ring: violation -> event, vCPU paused; else none")
def _(new: New) -> None:
    for access, kinds in VIOLATIONS.items():
        if access == R_PW and new.xen < (4, 20):
            continue
        for kind in "rwx":
            guest = new()
            guest.monitor()
            guest.altp2m_set_mem_access(guest.view(enter=True), A, access)
            outcome = Outcome.EVENT if kind in kinds else Outcome.DONE
            assert guest.touch(A, kind) is outcome, (access, kind)
            assert guest.model.vcpus[0].event_pauses == (kind in kinds)


@holds("guest access: w or wx -> EPT misconfiguration, the domain crashes")
def _(new: New) -> None:
    for access in (W, WX):
        for kind in "rwx":
            guest = new()
            guest.monitor()
            guest.altp2m_set_mem_access(guest.view(enter=True), A, access)
            assert guest.touch(A, kind) is Outcome.CRASH


@holds("guest access: rx2rw, write -> becomes rw, no event")
def _(new: New) -> None:
    guest = new()
    guest.monitor()
    view = guest.view(enter=True)
    guest.altp2m_set_mem_access(view, A, RX2RW)
    assert guest.touch(A, "r") is Outcome.DONE
    assert guest.touch(A, "x") is Outcome.DONE
    assert guest.access(view, A) == RX2RW
    assert guest.touch(A, "w") is Outcome.DONE
    assert guest.access(view, A) == RW
    assert guest.touch(A, "x") is Outcome.EVENT


@holds("guest access: n2rwx, any -> becomes rwx, the vCPU goes on")
def _(new: New) -> None:
    for kind in "rwx":
        guest = new()
        guest.monitor()
        view = guest.view(enter=True)
        guest.altp2m_set_mem_access(view, A, N2RWX)
        assert guest.touch(A, kind) is Outcome.DONE
        assert guest.access(view, A) == RWX
        assert guest.model.vcpus[0].event_pauses == 0


@holds("guest access, no ring: access_required -> domain crash")
def _(new: New) -> None:
    for access in (N, N2RWX):
        guest = new()
        guest.domain_set_access_required(True)
        guest.altp2m_set_mem_access(guest.view(enter=True), A, access)
        assert guest.touch(A) is Outcome.CRASH
        info = guest.backend.domain_getinfolist(guest.domid, 1)[0]
        assert (info.shutdown, info.shutdown_reason) == (True, 3)


@holds("guest access, no ring: not required -> entry becomes rwx in the table in use, no event")
def _(new: New) -> None:
    guest = new()
    view, other = guest.view(enter=True), guest.view()
    for table in (view, other):
        guest.altp2m_set_mem_access(table, A, N)
    assert guest.touch(A, "w") is Outcome.DONE
    assert guest.access(view, A) == RWX
    assert guest.access(other, A) == N
    assert guest.model.vcpus[0].event_pauses == 0


@holds("guest access, no ring: access_required set while inactive -> does not reach the views")
def _(new: New) -> None:
    guest = new(on=False)
    guest.domain_set_access_required(True)
    guest.altp2m_set_domain_state(True)
    guest.altp2m_set_mem_access(guest.view(enter=True), A, N)
    assert guest.touch(A) is Outcome.DONE
    guest.altp2m_set_domain_state(False)
    guest.model.host.write(A, guest.frame(A), ORDER_4K, PageType.RAM_RW, N)
    assert guest.touch(A) is Outcome.CRASH  # but the host has it


@holds("guest access: suppress #VE clear, #VE page set -> #VE, no event")
def _(new: New) -> None:
    guest = new(vcpus=2)
    guest.monitor()
    view = guest.view(enter=True)
    guest.altp2m_set_vcpu_enable_notify(0, C)
    guest.altp2m_set_mem_access(view, A, RX)
    assert guest.touch(A, "w") is Outcome.EVENT  # suppressed
    guest.altp2m_set_suppress_ve(view, A, False)
    assert guest.touch(A, "w") is Outcome.EVENT  # in real mode
    guest.model.vcpus[0].set_register("cr0", CR0_PE)
    assert guest.touch(A, "w") is Outcome.VIRTUALISATION_EXCEPTION
    assert guest.touch(A, "w") is Outcome.EVENT  # the guest has not done with the last
    assert guest.touch(A, "w", vcpu=1) is Outcome.EVENT  # has no page
    assert guest.touch(A, "r") is Outcome.DONE


@holds("guest access: log-dirty, write -> plain RAM again, dirty; a view's entry is overwritten")
def _(new: New) -> None:
    guest = new()
    view = guest.view(RW, enter=True)
    guest.altp2m_set_mem_access(view, B, RX)
    guest.retype(A, PageType.RAM_LOGDIRTY)
    assert guest.touch(A) is Outcome.DONE
    assert A not in guest.model.dirty
    assert guest.touch(A, "w") is Outcome.DONE
    assert A in guest.model.dirty
    assert guest.model.host.lookup(A).type == PageType.RAM_RW
    assert guest.access(view, A) == RWX  # p2m_change_type_one: the host's default
    assert guest.access(view, B) == RX


@holds("guest access: read-only RAM, write -> discarded by the emulator")
def _(new: New) -> None:
    guest = new()
    guest.retype(A, PageType.RAM_RO)
    assert guest.touch(A, "r") is Outcome.DONE
    assert guest.touch(A, "w") is Outcome.EMULATED


@holds("guest access: fetch from a superpage without execute right -> shattered (XSA-304)")
def _(new: New) -> None:
    for executable in (False, True):
        guest = new(host={"executable_superpages": executable}, superpages=True)
        view = guest.view(enter=True)
        assert guest.touch(D, "r") is Outcome.DONE
        assert guest.touch(D, "x") is Outcome.DONE
        found = guest.model.views[view].table.lookup(D)
        assert found.order == (ORDER_2M if executable else ORDER_4K)


# The monitor.


@refuses("xc_monitor_enable: ring active", EBUSY)
def _(new: New) -> Call:
    guest = new()
    guest.monitor()
    return guest.monitor_enable


@holds("xc_monitor_enable: ring active -> a stray page stays at the ring's gfn")
def _(new: New) -> None:
    guest = new()
    guest.monitor()
    assert guest.access(0, RING) is None
    assert errno_of(guest.monitor_enable) == EBUSY
    assert guest.access(0, RING) == RWX


@refuses("xc_monitor_enable: the ring's page is gone and the domain at its limit", EBUSY)
def _(new: New) -> Call:
    guest = new()
    guest.drop(RING)
    guest.domain_setmaxmem(0)
    return guest.monitor_enable


@refuses("xc_monitor_enable: no ring gfn", EOPNOTSUPP)
def _(new: New) -> Call:
    guest = new()
    guest.hvm_param_set(28, 0)
    return guest.monitor_enable


@refuses("xc_monitor_enable: PV domain", EINVAL)
def _(new: New) -> Call:
    return new(on=False, kind="pv", mode=Altp2mMode.DISABLED).monitor_enable


@refuses("xc_monitor_*: no such domain", ESRCH)
def _(new: New) -> list[Call]:
    nobody = Guest(new().backend, 77)
    return [
        nobody.monitor_enable,
        nobody.monitor_disable,
        nobody.monitor_resume,
        nobody.monitor_get_capabilities,
        partial(nobody.monitor_singlestep, True),
        nobody.monitor_control_registers,
    ]


@refuses("xc_monitor_disable: no ring", EINVAL)
def _(new: New) -> Call:
    return new().monitor_disable


@holds("xc_monitor_disable: waiters queued -> EBUSY, the subscriptions gone all the same")
def _(new: New) -> None:
    guest = new()
    agent = guest.monitor()
    guest.monitor_singlestep(True)
    agent.backend._monitors[guest.domid].queue.append(guest.model.vcpus[0])
    assert errno_of(guest.monitor_disable) == EBUSY
    guest.monitor_singlestep(True)  # not EEXIST
    assert errno_of(guest.monitor_enable) == EBUSY
    agent.backend._monitors[guest.domid].queue.clear()


@holds("xc_monitor_disable: ok -> subscriptions gone; a vCPU with an open event stays paused")
def _(new: New) -> None:
    guest = new()
    guest.monitor()
    guest.monitor_singlestep(True)
    guest.altp2m_set_mem_access(guest.view(enter=True), A, N)
    assert guest.touch(A) is Outcome.EVENT
    guest.monitor_disable()
    assert guest.model.vcpus[0].event_pauses == 1
    assert errno_of(partial(guest.monitor_singlestep, False)) == EEXIST
    assert errno_of(guest.monitor_disable) == EINVAL


@refuses("xc_monitor_resume: no ring", ENODEV)
def _(new: New) -> Call:
    return new().monitor_resume


def switches(guest: Guest) -> dict[str, tuple[Any, ...]]:
    """The event switches of a release, with arguments behind ``enable``."""
    named: dict[str, tuple[Any, ...]] = {
        "singlestep": (),
        "software_breakpoint": (),
        "descriptor_access": (),
        "guest_request": (True, False),
        "inguest_pagefault": (),
        "debug_exceptions": (True,),
        "cpuid": (),
        "emul_unimplemented": (),
    }
    if guest.xen >= (4, 17):
        named["vmexit"] = (True,)
    if guest.xen >= (4, 18):
        named["io"] = ()
    return named


@refuses("xc_monitor_<event>: already so", EEXIST)
def _(new: New) -> list[Call]:
    calls: list[Call] = []
    for state in (True, False):
        guest = new()
        calls += [
            partial(getattr(guest, f"monitor_{event}"), state, *more)
            for event, more in switches(guest).items()
        ]
        calls.append(partial(guest.monitor_write_ctrlreg, 1, state, True, 0, False))
        calls.append(partial(guest.monitor_mov_to_msr, 0x10, state, False))
        if state:
            guest.monitor()
            for call in calls:
                call()
    return calls


@refuses("xc_monitor_<event>: unsupported", EOPNOTSUPP)
def _(new: New) -> list[Call]:
    pv = new(on=False, kind="pv", mode=Altp2mMode.DISABLED)
    return [
        *(partial(new().monitor_privileged_call, state) for state in (True, False)),
        *(
            partial(getattr(pv, f"monitor_{event}"), True, *more)
            for event, more in switches(pv).items()
        ),
        partial(pv.monitor_write_ctrlreg, 9, True, True, 0, False),
        partial(pv.monitor_mov_to_msr, 0x10, True, False),
    ]


@holds("xc_monitor_<event>: no ring -> most need none")
def _(new: New) -> None:
    guest = new()
    for event, more in switches(guest).items():
        getattr(guest, f"monitor_{event}")(True, *more)
    for index in range(4):
        guest.monitor_write_ctrlreg(index, True, True, 0, False)


@holds("xc_monitor_get_capabilities: - -> the release's events; none for PV")
def _(new: New) -> None:
    bits = 0b0000_1111_0111_1111
    if new.xen >= (4, 17):
        bits |= 1 << 12
    if new.xen >= (4, 18):
        bits |= 1 << 13
    assert new().monitor_get_capabilities() == bits
    assert new(on=False, kind="pv", mode=Altp2mMode.DISABLED).monitor_get_capabilities() == 0


@refuses("xc_monitor_write_ctrlreg: index >= 4", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [
        partial(guest.monitor_write_ctrlreg, 4, state, True, 0, False) for state in (True, False)
    ]


@refuses("xc_monitor_mov_to_msr: enable without ring", ENXIO)
def _(new: New) -> list[Call]:
    guest = new()
    return [partial(guest.monitor_mov_to_msr, msr, True, False) for msr in (0x10, 0x12345678)]


@refuses("xc_monitor_mov_to_msr: MSR out of ranges", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    guest.monitor()
    outside = (0x2000, 0x3FFFFFFF, 0x40002000, 0xBFFFFFFF, 0xC0002000, 0xFFFFFFFF)
    return [partial(guest.monitor_mov_to_msr, msr, True, False) for msr in outside]


@holds("xc_monitor_mov_to_msr: MSR at the ends of the ranges -> 0")
def _(new: New) -> None:
    guest = new()
    guest.monitor()
    for msr in (0, 0x1FFF, 0x40000000, 0x40001FFF, 0xC0000000, 0xC0001FFF):
        guest.monitor_mov_to_msr(msr, True, False)
        guest.monitor_mov_to_msr(msr, False, False)


@refuses("xc_monitor_emulate_each_rep: no ring", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [partial(guest.monitor_emulate_each_rep, state) for state in (True, False)]


@holds("xc_monitor_emulate_each_rep: already so -> 0")
def _(new: New) -> None:
    guest = new()
    guest.monitor()
    for state in (True, True, False, False):
        guest.monitor_emulate_each_rep(state)


@holds("XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS: PV, no ring, another libxc -> 0")
def _(new: New) -> None:
    pv = new(on=False, kind="pv", mode=Altp2mMode.DISABLED)
    pv.monitor_control_registers()
    guest = new(host={"library": (4, 22) if new.xen < (4, 18) else (4, 17)})
    guest.monitor_control_registers()
    guest = new()
    guest.monitor()
    for _ in range(2):
        guest.monitor_control_registers()
        assert guest.backend._monitors[guest.domid].gates_writes
    guest.monitor_disable()
    assert not guest.backend._monitors[guest.domid].gates_writes


# Host memory access.


@refuses("xc_set_mem_access, _multi, xc_get_mem_access: no ring", ENODEV)
def _(new: New) -> list[Call]:
    guest = new()
    return [
        partial(guest.set_mem_access, RX, A, 1),
        partial(guest.set_mem_access, 99, A, 0),
        partial(guest.set_mem_access_multi, bytes([RX]), gfns(A)),
        partial(guest.get_mem_access, A),
    ]


@refuses("xc_set_mem_access, _multi, xc_get_mem_access: not an HVM domain", EINVAL)
def _(new: New) -> list[Call]:
    guest = new(on=False, kind="pv", mode=Altp2mMode.DISABLED)
    return [
        partial(guest.set_mem_access, RX, A, 1),
        partial(guest.set_mem_access_multi, bytes([RX]), gfns(A)),
        partial(guest.get_mem_access, A),
    ]


@refuses("xc_set_mem_access: nr 0 or beyond maximum_gpfn, bad access", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    guest.monitor()
    last = guest.domain_maximum_gpfn()
    return [
        partial(guest.set_mem_access, RX, A, 0),
        partial(guest.set_mem_access, RX, last, 2),
        partial(guest.set_mem_access, RX, last + 1, 1),
        partial(guest.set_mem_access, RX, ALL_GFNS - 1, 5),
        partial(guest.set_mem_access, default_access(guest.xen) + 1, A, 1),
        partial(guest.set_mem_access, 99, ALL_GFNS, 0),
        partial(guest.set_mem_access_multi, bytes([99]), gfns(A)),
    ]


@holds("xc_set_mem_access: ok -> the gfns' host access; ~0 -> the default")
def _(new: New) -> None:
    guest = new(on=False)
    guest.monitor()
    guest.set_mem_access(RX, A, 2)
    assert [guest.get_mem_access(gfn) for gfn in (A, B, B + 1)] == [RX, RX, RWX]
    guest.set_mem_access_multi(bytes([R, X]), gfns(D, E))
    assert [guest.get_mem_access(gfn) for gfn in (D, E)] == [R, X]
    guest.set_mem_access(RW, ALL_GFNS, 0)
    assert guest.get_mem_access(ALL_GFNS) == RW


@refuses("xc_get_mem_access: hole", ESRCH)
def _(new: New) -> Call:
    guest = new()
    guest.monitor()
    return partial(guest.get_mem_access, HOLE)


@refuses("xc_get_mem_access: beyond maximum_gpfn", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    guest.monitor()
    last = guest.domain_maximum_gpfn()
    return [partial(guest.get_mem_access, gfn) for gfn in (last + 1, ALL_GFNS - 1)]


# Memory.


@refuses("populate_physmap_exact: short", EBUSY)
def _(new: New) -> list[Call]:
    guest, gone, full = new(), Guest(new().backend, 77), new(host={"memory_pages": 1500})
    huge = new(host={"memory_pages": 1 << 21})
    huge.domain_setmaxmem(ALL_GFNS)
    guest.domain_setmaxmem(0)
    return [
        partial(guest.populate, HOLE),
        partial(gone.populate, HOLE),
        partial(full.populate, 0x4000, order=ORDER_2M),
        partial(huge.populate, 1 << 20, order=19),  # more than Xen gives at once
    ]


@holds("populate_physmap_exact: short -> what came before the limit stays")
def _(new: New) -> None:
    guest = new()
    guest.domain_setmaxmem((guest.model.pages + 2) * 4)
    where = gfns(HOLE, HOLE + 1, HOLE + 2)
    assert errno_of(partial(guest.domain_populate_physmap_exact, where)) == EBUSY
    assert [guest.access(0, gfn) for gfn in where] == [RWX, RWX, None]


@holds("populate_physmap_exact: over RAM -> replaced, the old frame without M2P and not given back")
def _(new: New) -> None:
    guest = new()
    pages, old = guest.model.pages, guest.frame(A)
    guest.populate(A)
    assert guest.frame(A) != old
    assert guest.model.m2p[guest.frame(A)] == A
    assert old not in guest.model.m2p
    assert guest.model.pages == pages + 1


@holds("populate_physmap_exact: over grant, foreign or direct MMIO -> EBUSY, the domain crashes")
def _(new: New) -> None:
    for kind in (PageType.GRANT_MAP_RW, PageType.GRANT_MAP_RO, PageType.FOREIGN):
        guest = new()
        guest.retype(A, kind)
        assert errno_of(partial(guest.populate, A)) == EBUSY
        assert guest.model.crashed
    guest = new()
    assert errno_of(partial(guest.populate, DIRECT_MMIO)) == EBUSY
    assert guest.model.crashed


@refuses("decrease_reservation_exact: short", EINVAL)
def _(new: New) -> list[Call]:
    guest = new()
    return [partial(guest.drop, HOLE), partial(Guest(guest.backend, 77).drop, A)]


@holds("decrease_reservation_exact: short -> what came before the hole is gone")
def _(new: New) -> None:
    guest = new()
    assert errno_of(partial(guest.drop, A, HOLE, B)) == EINVAL
    assert [guest.access(0, gfn) for gfn in (A, B)] == [None, RWX]


@refuses("decrease_reservation_exact: direct MMIO", EINVAL)
def _(new: New) -> Call:
    return partial(new().drop, DIRECT_MMIO)


@holds("maximum_gpfn: a dropped gfn -> the highest ever mapped, it never shrinks")
def _(new: New) -> None:
    guest = new()
    guest.populate(0x100000)
    guest.drop(0x100000)
    assert guest.domain_maximum_gpfn() == 0x100000


# Responses.


def paused(new: New, **options: Any) -> tuple[Guest, Agent, int]:
    """A guest whose vCPU 0 waits in a view for an answer."""
    guest = new(**options)
    agent = guest.monitor()
    view = guest.view(enter=True)
    guest.altp2m_set_mem_access(view, A, N)
    assert guest.touch(A) is Outcome.EVENT
    return guest, agent, view


@holds("vm_event response: VCPU_PAUSED -> unpaused once, and once only")
def _(new: New) -> None:
    guest, agent, _ = paused(new)
    guest.touch(A)
    agent.reply(agent.PAUSED)
    assert guest.model.vcpus[0].event_pauses == 1
    agent.reply(agent.PAUSED)
    agent.reply(agent.PAUSED)
    assert guest.model.vcpus[0].event_pauses == 0


@holds("vm_event response: without VCPU_PAUSED -> applied, the vCPU stays paused")
def _(new: New) -> None:
    guest, agent, _ = paused(new)
    agent.reply(agent.SWITCH)
    assert guest.altp2m_get_vcpu_p2m_idx(0) == 0
    assert guest.model.vcpus[0].event_pauses == 1


@holds("vm_event response: wrong version -> ignored, stays paused")
def _(new: New) -> None:
    guest, agent, view = paused(new)
    for version in (0, agent.version - 1, agent.version + 1):
        agent.reply(agent.PAUSED | agent.SWITCH, version=version)
    assert guest.model.vcpus[0].event_pauses == 1
    assert guest.altp2m_get_vcpu_p2m_idx(0) == view
    agent.reply(agent.PAUSED)
    assert guest.model.vcpus[0].event_pauses == 0


@holds("vm_event response: vcpu not paused -> ignored")
def _(new: New) -> None:
    guest, agent, view = paused(new, vcpus=2)
    agent.reply(agent.PAUSED | agent.SWITCH | agent.TOGGLE, vcpu=1)
    assert guest.altp2m_get_vcpu_p2m_idx(1) == view
    assert guest.model.vcpus[1].single_step is False


@holds("vm_event response: no such vcpu -> ignored, the next one is taken")
def _(new: New) -> None:
    guest, agent, _ = paused(new)
    agent.reply(agent.PAUSED, vcpu=1)
    agent.reply(agent.PAUSED, vcpu=0xFFFFFFFF)
    assert guest.model.vcpus[0].event_pauses == 1
    agent.reply(agent.PAUSED)
    assert guest.model.vcpus[0].event_pauses == 0


@holds("vm_event response: ALTERNATE_P2M -> that vCPU alone switches")
def _(new: New) -> None:
    guest, agent, view = paused(new, vcpus=2)
    other = guest.view()
    agent.reply(agent.PAUSED | agent.SWITCH, view=other)
    assert [guest.altp2m_get_vcpu_p2m_idx(vcpu) for vcpu in range(2)] == [other, view]


@holds("vm_event response: ALTERNATE_P2M to non-existent view -> no switch, rest applied")
def _(new: New) -> None:
    for bad in (5, 10, 0xFFFF):
        guest, agent, view = paused(new)
        agent.reply(agent.PAUSED | agent.SWITCH | agent.TOGGLE, view=bad)
        assert guest.altp2m_get_vcpu_p2m_idx(0) == view
        assert guest.model.vcpus[0].event_pauses == 0
        assert guest.model.vcpus[0].single_step is True


@holds("vm_event response: ALTERNATE_P2M to invisible view -> switches")
def _(new: New) -> None:
    guest, agent, _ = paused(new)
    hidden = guest.view()
    guest.altp2m_set_visibility(hidden, False)
    agent.reply(agent.PAUSED | agent.SWITCH, view=hidden)
    assert guest.altp2m_get_vcpu_p2m_idx(0) == hidden


@holds("vm_event response: TOGGLE_SINGLESTEP -> on, off")
def _(new: New) -> None:
    guest, agent, _ = paused(new)
    agent.reply(agent.TOGGLE)
    assert guest.model.vcpus[0].single_step is True
    agent.reply(agent.TOGGLE)
    assert guest.model.vcpus[0].single_step is False


@holds(
    "vm_event response: FAST_SINGLESTEP -> single-step on, the view remembered, unless TOGGLE too"
)
def _(new: New) -> None:
    guest, agent, _ = paused(new)
    vcpu = guest.model.vcpus[0]
    agent.reply(agent.FAST | agent.TOGGLE, step=7)
    assert (vcpu.single_step, vcpu.fast_step_view) == (True, None)
    agent.reply(agent.FAST | agent.SWITCH, view=0, step=7)  # need not exist
    assert (vcpu.single_step, vcpu.fast_step_view, vcpu.view) == (True, 7, 0)


@holds("vm_event response: FAST_SINGLESTEP to an index beyond the limit -> the flag is ignored")
def _(new: New) -> None:
    limits = {10: 10} if new.xen < (4, 21) else {10: 10, 3: 3}
    for count, bad in limits.items():
        guest, agent, _ = paused(new, view_count=count)
        agent.reply(agent.PAUSED | agent.FAST, step=bad)
        vcpu = guest.model.vcpus[0]
        assert (vcpu.single_step, vcpu.fast_step_view, vcpu.event_pauses) == (False, None, 0)


@holds("vm_event response: the ring -> eight slots, used round and round; Xen asks for the next")
def _(new: New) -> None:
    guest, agent, _ = paused(new)
    vcpu = guest.model.vcpus[0]
    assert struct.unpack_from("<IIII", agent.ring) == (1, 1, 0, 1)
    for number in range(1, 20):
        vcpu.event_pauses = 1
        agent.reply(agent.PAUSED)
        assert vcpu.event_pauses == 0
        assert struct.unpack_from("<12xI", agent.ring) == (number + 1,)  # rsp_event


@holds("vm_event response: several before one notify -> all taken; xc_monitor_resume does it too")
def _(new: New) -> None:
    guest, agent, _ = paused(new, vcpus=3)
    for vcpu in guest.model.vcpus:
        vcpu.event_pauses = 1
    responses = [(0, 0), (agent.version, 9), *((agent.version, number) for number in range(3))]
    for index, (version, number) in enumerate(responses):  # the first two are dropped
        slot = 64 + index * agent.size
        struct.pack_into("<IIII", agent.ring, slot, version, agent.PAUSED, 1, number)
    struct.pack_into("<I", agent.ring, 8, len(responses))
    assert [vcpu.event_pauses for vcpu in guest.model.vcpus] == [1, 1, 1]
    guest.monitor_resume()
    assert [vcpu.event_pauses for vcpu in guest.model.vcpus] == [0, 0, 0]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_semantics(row: Row) -> None:
    """Each release that the row is about is checked, and each that fails is reported."""
    rows = Rows()
    for xen in rows.each([xen for xen in SUPPORTED if row.since <= xen <= row.until]):
        new = New(xen)
        with rows.row(f"Xen {xen[0]}.{xen[1]}"):
            row.check(new)
        new.close()


def test_every_row_has_its_own_name() -> None:
    names = [row.name for row in ROWS]
    assert sorted(set(names)) == sorted(names)


def test_every_release_is_supported() -> None:
    """The rows are written for these; a new release needs its own reading of Xen."""
    assert SUPPORTED[0] == (4, 14)
    assert SUPPORTED[-1] == (4, 22)
