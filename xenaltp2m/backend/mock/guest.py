# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's memory access, and what the hypervisor makes of it in the vCPU's view.

Restates ``hvm_hap_nested_page_fault``, ``p2m_altp2m_get_or_propagate`` and
``p2m_mem_access_check``. An access that a monitor must hear of leaves the vCPU paused.
"""

from __future__ import annotations

import enum

from xenaltp2m.backend.mock.machine import Domain, Livelock, Vcpu, View
from xenaltp2m.backend.mock.p2m import (
    ACCESS_N2RWX,
    ACCESS_RWX,
    ACCESS_RX2RW,
    INVALID_MFN,
    ORDER_4K,
    Lookup,
    P2m,
    PageType,
    R,
    W,
    X,
    access_rights,
    entry_rights,
)

_KINDS = {"r": R, "w": R | W, "x": X}
"""A write fault counts as a read too (``ept_handle_violation``)."""
_ACCESS_RW = R | W
_RETRIES = 8
_WRITES_EMULATED = frozenset({PageType.RAM_RO, PageType.GRANT_MAP_RO, PageType.IOREQ_SERVER})


class Outcome(enum.Enum):
    """How an access ended."""

    DONE = "done"
    """It went through, perhaps after Xen filled or changed the entry."""
    EMULATED = "emulated"
    """There is no memory: the device model's business."""
    EVENT = "event"
    """It violates the view; a monitor hears of it and the vCPU waits."""
    VIRTUALISATION_EXCEPTION = "#VE"
    """It violates the view; the guest itself is told."""
    CRASH = "crash"
    """The domain is gone."""


def touch(domain: Domain, vcpu: Vcpu, gfn: int, kind: str) -> Outcome:
    """Let a vCPU read ("r"), write ("w") or fetch ("x") one gfn in its current view.

    Raises:
        Livelock: The vCPU would fault for ever: what Xen fills in has no rights, and being a
            superpage is then no entry to Xen at all (``ept_get_entry``).
    """
    wanted = _KINDS[kind]
    for _ in range(_RETRIES):
        view = domain.views[vcpu.view] if domain.active else None
        table = domain.host if view is None else view.table
        host = domain.host_lookup(gfn, populate=True, unshare=bool(wanted & W))
        if domain.crashed:
            return Outcome.CRASH
        found = table.lookup(gfn)
        if not found.mapped:
            if view is None or not host.mapped:
                return Outcome.EMULATED
            _copy(domain, view, gfn, host)
            continue
        rights = entry_rights(found.type, found.access)
        if rights & W and not rights & R:
            domain.crash("EPT misconfiguration: writable but not readable")  # Intel SDM 28.3.3.1
            return Outcome.CRASH
        outcome: Outcome | None = Outcome.DONE
        if wanted & ~access_rights(found.access):
            outcome = _violation(domain, vcpu, view, table, gfn, found, wanted)
        elif wanted & ~rights:
            outcome = _type_fault(domain, gfn, found.type, wanted)
        elif wanted & X and found.order and not domain.machine.executable_superpages:
            outcome = _shatter(domain, table, gfn, found)
        if outcome is not None:
            return outcome
    raise Livelock(f"gfn {gfn:#x}: the vCPU faults for ever")


def _shatter(domain: Domain, table: P2m, gfn: int, found: Lookup) -> Outcome:
    """XSA-304: the superpage has no execute right, and a fetch makes a 4K entry of its gfn."""
    if table.write(gfn, found.mfn, ORDER_4K, found.type, found.access):
        domain.crash("a superpage could not be split: the p2m pool is exhausted")
        return Outcome.CRASH
    return Outcome.DONE


def _type_fault(domain: Domain, gfn: int, kind: PageType, wanted: int) -> Outcome | None:
    """What the page's type forbids, not its access; None to try again."""
    if wanted & W and kind == PageType.RAM_LOGDIRTY:
        domain.write_logdirty(gfn)
        return None
    if wanted & W and kind in _WRITES_EMULATED:
        return Outcome.EMULATED
    domain.crash(f"nobody handles the access to {kind.name}")
    return Outcome.CRASH


def _copy(domain: Domain, view: View, gfn: int, host: Lookup) -> None:
    """``p2m_altp2m_get_or_propagate``: fill a view's hole from the host."""
    order = host.order
    if domain.release.lazy_copy_fits_view_order:
        order = min(order, view.table.lookup(gfn).order)
    access = host.access
    if domain.release.lazy_copy_takes_view_default:
        access = view.default_access
    mask = (1 << order) - 1
    if view.table.write_range(gfn & ~mask, host.mfn & ~mask, order, host.type, access):
        domain.crash("a view could not be filled: the p2m pool is exhausted")


def _violation(
    domain: Domain,
    vcpu: Vcpu,
    view: View | None,
    table: P2m,
    gfn: int,
    found: Lookup,
    wanted: int,
) -> Outcome | None:
    """``p2m_mem_access_check``; None to try again."""
    if view is not None and not found.suppress_ve and vcpu.veinfo is not None:
        return Outcome.VIRTUALISATION_EXCEPTION

    def rewrite(access: int) -> None:
        if found.mfn != INVALID_MFN:
            table.write(gfn, found.mfn, ORDER_4K, found.type, access)

    if found.access == ACCESS_RX2RW and wanted & W:
        rewrite(_ACCESS_RW)
        return None
    required = domain.access_required if view is None else view.access_required
    if found.access == ACCESS_N2RWX:
        rewrite(ACCESS_RWX)
        return Outcome.CRASH if _unheard(domain, required) else None
    if domain.listened:
        vcpu.event_pauses += 1
        return Outcome.EVENT
    if _unheard(domain, required):
        return Outcome.CRASH
    rewrite(ACCESS_RWX)
    return None


def _unheard(domain: Domain, required: bool) -> bool:
    """Crash the domain where a violation must be heard and nobody listens."""
    if domain.listened or not required:
        return False
    domain.crash("memory access violation, and no monitor where one is required")
    return True
