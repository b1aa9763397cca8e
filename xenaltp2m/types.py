# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of the field as Python types: access rights, modes, numbers, domain facts.

Imports nothing of ours, needs no library, and touches no hypervisor.
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
"""``~0`` as Xen reads it in a gfn argument: "the default" or "revert", depending on the call."""

GFN_LIMIT = 1 << 36
"""Gfns are below this: four levels of tables of 512 entries (``ept_set_entry``)."""

HVM_PARAM_ALTP2M = 35
"""``public/hvm/params.h``: a domain's :class:`Altp2mMode`."""

SINGLE_STEP_OFF = 0
"""``XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF`` (public/domctl.h)."""

HOST_VIEW = ViewId(0)
"""View 0: access calls on it act on the host p2m, remaps and switches on the default view."""


class Access(enum.Flag):
    """What a guest may do with a page in a view.

    Plain rights combine with ``|`` (``Access.R | Access.X is Access.RX``). The members below
    ``RWX`` are Xen's modes that change by themselves or take a default; they do not combine.
    The number Xen wants for each differs by release: see :func:`xenaltp2m.abi.releases.release`.
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
    """Readable and executable until the first write, which silently makes it ``RW``."""
    N2RWX = 16
    """No access; the first access sends an event without pausing and makes it ``RWX``."""
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
    """The control domain; the guest may only name its #VE information page."""


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """What ``xc_domain_getinfolist`` says of a domain. Memory is counted in 4 KiB pages."""

    domid: DomId
    uuid: UUID
    hvm: bool
    """True for HVM and PVH guests, the only kinds that have views."""
    paused: bool
    dying: bool
    shutdown: bool
    shutdown_reason: int
    """Xen's ``SHUTDOWN_*`` number; means something only where ``shutdown`` is true."""
    pages: int
    max_pages: int
    vcpus: int
    """vCPUs that are up; in a PVH guest that never ran, only the first."""
    max_vcpu_id: int
    shared_pages: int = 0
    """Pages that are shared with other domains (``XENMEM_sharing_op``)."""
    paged_pages: int = 0
    """Pages that were written to disk (``XENMEM_paging_op``)."""


@dataclass(frozen=True, slots=True)
class PodTarget:
    """What ``xc_domain_get_pod_target`` says of a domain, in 4 KiB pages."""

    pages: int
    cached: int
    """Pages that wait to be given to a gfn that is populated on demand."""
    entries: int
    """Gfns that are yet to be populated on demand."""


class MemoryType(enum.IntEnum):
    """What a gfn is in the host p2m, as ``HVMOP_get_mem_type`` tells it (``HVMMEM_*``)."""

    RAM = 0
    """Also a gfn that is yet to be populated on demand."""
    READ_ONLY = 1
    """A ROM; or RAM that is log-dirty or shared, to which a write is seen by Xen first."""
    EMULATED = 2
    """MMIO, of a device or of nothing; and any hole."""
    IOREQ_SERVER = 4


@dataclass(frozen=True, slots=True)
class VcpuInfo:
    """What ``xc_vcpu_getinfo`` says of a vCPU."""

    online: bool
    blocked: bool
    """It waits for an event, such as an interrupt after HLT."""
    running: bool
    cpu_time: int
    """How long it has run, in nanoseconds."""


@dataclass(frozen=True, slots=True)
class ViewInfo:
    """What Xen tells of a view, whoever made it."""

    id: ViewId
    default_access: Access
    """What pages get that the view copies on first use; of view 0 the host p2m's."""
    vcpus: tuple[VcpuId, ...]
    """The vCPUs that are in it."""


@dataclass(frozen=True, slots=True)
class SuppressVeFailure:
    """The first gfn a bulk suppress-#VE call could not change, and why."""

    gfn: Gfn
    errno: int
