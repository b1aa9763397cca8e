# SPDX-License-Identifier: LGPL-2.1-or-later
"""The basic types: access rights, altp2m modes, numbers, information about domains and vCPUs.

This module imports nothing of this package, needs no Xen library, and makes no hypercall.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType
from uuid import UUID

DomId = NewType("DomId", int)
"""A domain's number on this host, 0..0x7fef."""

ViewId = NewType("ViewId", int)
"""A view's number within its domain (Xen: altp2m index, p2midx, SLAT id); 0 is the default view."""

Gfn = NewType("Gfn", int)
"""A guest frame number: a guest-physical address shifted right by 12. Never an address."""

VcpuId = NewType("VcpuId", int)
"""A virtual CPU's number within its domain, from 0."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

ALL_GFNS = (1 << 64) - 1
"""``~0`` as a gfn argument: for Xen "the default" or "revert", depending on the call."""

GFN_LIMIT = 1 << 36
"""Every gfn is below this: four levels of tables of 512 entries (``ept_set_entry``)."""

HVM_PARAM_ALTP2M = 35
"""The HVM parameter with a domain's :class:`Altp2mMode` (``public/hvm/params.h``)."""

SINGLE_STEP_OFF = 0
"""``XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF`` (public/domctl.h)."""

HOST_VIEW = ViewId(0)
"""View 0: access calls on it act on the host p2m, remaps and switches on the default view."""


class Access(enum.Flag):
    """The access rights of a page in a view.

    Plain rights combine with ``|`` (``Access.R | Access.X is Access.RX``). The members after
    ``RWX`` are Xen's modes that change by themselves or stand for a default; they do not combine.
    Xen's number for each depends on the release: see :func:`xenaltp2m.abi.releases.release`.
    """

    N = 0
    R = 1
    W = 2
    X = 4
    RW = R | W
    RX = R | X
    WX = W | X
    RWX = R | W | X
    RX2RW = 8
    """Readable and executable; the first write makes it ``RW`` without an event."""
    N2RWX = 16
    """No access; the first access makes it ``RWX`` and sends an event without pausing the vCPU."""
    R_PW = 32
    """As ``R``, but the CPU's page walk may set accessed and dirty bits (Xen 4.20 and later)."""
    DEFAULT = 64
    """The host p2m's default access at the time of the call."""

    def __str__(self) -> str:
        return _ACCESS_NAMES.get(self) or repr(self)


_ACCESS_NAMES = {
    Access.RX2RW: "rx2rw",
    Access.N2RWX: "n2rwx",
    Access.R_PW: "r_pw",
    Access.DEFAULT: "default",
} | {
    Access(bits): "".join(
        letter if bits & bit else "-" for letter, bit in (("r", 1), ("w", 2), ("x", 4))
    )
    for bits in range(8)
}


class Altp2mMode(enum.IntEnum):
    """Who may use a domain's altp2m (``altp2m=`` in xl.cfg, ``HVM_PARAM_ALTP2M``)."""

    DISABLED = 0
    MIXED = 1
    """The guest itself and the control domain."""
    EXTERNAL = 2
    """The control domain only."""
    LIMITED = 3
    """The control domain; the guest may only set its #VE information page."""


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """Information about a domain (``xc_domain_getinfolist``). Memory is counted in 4 KiB pages."""

    domid: DomId
    uuid: UUID
    hvm: bool
    """True for HVM and PVH guests, the only kinds that have views."""
    paused: bool
    dying: bool
    shutdown: bool
    shutdown_reason: int
    """Xen's ``SHUTDOWN_*`` number; valid only if ``shutdown`` is true."""
    pages: int
    max_pages: int
    vcpus: int
    """The number of online vCPUs; in a PVH guest that has never run, only the first is online."""
    max_vcpu_id: int
    shared_pages: int = 0
    """Pages that are shared with other domains (``XENMEM_sharing_op``)."""
    paged_pages: int = 0
    """Pages that are paged out to disk (``XENMEM_paging_op``)."""


@dataclass(frozen=True, slots=True)
class PodTarget:
    """A domain's populate-on-demand state (``xc_domain_get_pod_target``), in 4 KiB pages."""

    pages: int
    cached: int
    """Pages in the cache, from which gfns are populated."""
    entries: int
    """Gfns that are not populated yet."""


class MemoryType(enum.IntEnum):
    """The type of a gfn in the host p2m (``HVMMEM_*``, ``HVMOP_get_mem_type``)."""

    RAM = 0
    """RAM, or a gfn that is not populated on demand yet."""
    READ_ONLY = 1
    """A ROM, or RAM that is log-dirty or shared, to which writes trap to Xen."""
    EMULATED = 2
    """MMIO, even without a device, or a hole."""
    IOREQ_SERVER = 4


@dataclass(frozen=True, slots=True)
class VcpuInfo:
    """Information about a vCPU (``xc_vcpu_getinfo``)."""

    online: bool
    blocked: bool
    """Whether it waits for an event, such as an interrupt after HLT."""
    running: bool
    cpu_time: int
    """The time that it has run, in nanoseconds."""


@dataclass(frozen=True, slots=True)
class ViewInfo:
    """Information about a view, whoever made it."""

    id: ViewId
    default_access: Access
    """The access of pages that Xen copies on first use; for view 0 the host p2m's default."""
    vcpus: tuple[VcpuId, ...]
    """The vCPUs that are in the view."""


@dataclass(frozen=True, slots=True)
class SuppressVeFailure:
    """The first gfn that a bulk suppress-#VE call could not change, and the errno."""

    gfn: Gfn
    errno: int
