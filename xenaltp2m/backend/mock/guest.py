# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's memory access, and what the hypervisor makes of it in the vCPU's view.

Restates ``hvm_hap_nested_page_fault``, ``p2m_altp2m_get_or_propagate`` and
``p2m_mem_access_check``. An access that is reported to a monitor leaves the vCPU paused.
"""

from __future__ import annotations

import enum
import struct
from typing import TypeVar

from xenaltp2m.abi.vm_event import AccessFlag, Reason
from xenaltp2m.abi.x86 import CR0_PE
from xenaltp2m.backend.mock.machine import Domain, Livelock, View
from xenaltp2m.backend.mock.monitor import Monitor
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
from xenaltp2m.backend.mock.vcpu import Vcpu, Waits
from xenaltp2m.types import PAGE_SIZE

_T = TypeVar("_T")
_KINDS = {"r": R, "w": R | W, "x": X}
"""A write fault counts as a read too (``ept_handle_violation``)."""
_QUALIFICATIONS = {"r": R, "w": W, "x": X}
_EPT_VIOLATION, _EPT_MISCONFIGURATION = 48, 49
"""``EXIT_REASON_*``."""
_RIGHTS_SHIFT = 3
_LINEAR_ADDRESS_VALID, _FAULT_OF_LINEAR_ADDRESS = 1 << 7, 1 << 8
AT_PAGE = AccessFlag.GLA_VALID | AccessFlag.FAULT_WITH_GLA
"""The linear address is known, and it is the page it translates to that faults, not the walk."""
_U64 = (1 << 64) - 1
_ACCESS_RW = R | W
_RETRIES = 8
_VE_INFORMATION, _VE_BUSY = struct.Struct("<IIQQQH"), (1 << 32) - 1
"""``ve_info_t`` (asm/hvm/vmx/vmx.h)."""
_WRITES_EMULATED = frozenset({PageType.RAM_RO, PageType.GRANT_MAP_RO, PageType.IOREQ_SERVER})


class Outcome(enum.Enum):
    """How an access ended."""

    DONE = "done"
    """It went through, perhaps after Xen filled or changed the entry."""
    EMULATED = "emulated"
    """There is no memory: the device model's business."""
    EVENT = "event"
    """It violates the view; the monitor receives an event, and the vCPU waits."""
    VIRTUALISATION_EXCEPTION = "#VE"
    """It violates the view; the guest itself receives the exception."""
    CRASH = "crash"
    """The domain is gone."""


def drive(vcpu: Vcpu, code: Waits[_T]) -> _T | None:
    """Run hypervisor code for a vCPU to its end; None where the vCPU is put on a wait queue."""
    try:
        next(code)
    except StopIteration as done:
        result: _T = done.value
        return result
    vcpu.waiting = code
    return None


def touch(monitor: Monitor, vcpu: Vcpu, gfn: int, kind: str, offset: int = 0) -> Outcome:
    """Let a vCPU read ("r"), write ("w") or fetch ("x") in one gfn in its current view.

    It need not be running otherwise; but if it waits for room in the ring it does nothing.

    Raises:
        Livelock: The vCPU would fault for ever: what Xen fills in has no rights, and being a
            superpage is then no entry to Xen at all (``ept_get_entry``).
    """
    if vcpu.waiting is not None:
        return Outcome.EVENT
    return drive(vcpu, access(monitor, vcpu, gfn * PAGE_SIZE + offset, kind)) or Outcome.EVENT


def access(
    monitor: Monitor,
    vcpu: Vcpu,
    address: int,
    kind: str,
    linear: int | None = None,
    where: AccessFlag = AT_PAGE,
    *,
    delivers: bool = False,
) -> Waits[Outcome]:
    """One access of a page at a physical address; see :func:`touch`.

    ``linear`` is the linear address it is for, the same where paging is off; ``where`` tells
    whether it is for the page itself or for a table on the way to it; ``delivers`` whether the CPU
    is about to deliver an event.
    """
    domain = monitor.domain
    linear = address if linear is None else linear & _U64
    gfn = address // PAGE_SIZE
    wanted = _KINDS[kind]
    for _ in range(_RETRIES):
        view = domain.views[vcpu.view] if domain.active else None
        host = domain.host_lookup(gfn, populate=True, unshare=bool(wanted & W))
        if domain.crashed:
            return Outcome.CRASH
        found = (domain.host if view is None else view.table).lookup(gfn)
        rights = entry_rights(found.type, found.access) if found.mapped else 0
        misconfigured = bool(rights & W and not rights & R)
        shatters = bool(wanted & X and found.order and not domain.machine.executable_superpages)
        if not (wanted & ~rights or misconfigured or shatters):
            return Outcome.DONE
        reason = _EPT_MISCONFIGURATION if misconfigured else _EPT_VIOLATION
        qualification = _QUALIFICATIONS[kind] | rights << _RIGHTS_SHIFT | _LINEAR_ADDRESS_VALID
        if where == AT_PAGE:
            qualification |= _FAULT_OF_LINEAR_ADDRESS
        convertible = not (found.suppress_ve or misconfigured or delivers)
        if convertible and _tell_guest(domain, vcpu, (qualification, linear, address)):
            return Outcome.VIRTUALISATION_EXCEPTION
        if (yield from vm_exit(monitor, vcpu, reason, qualification)):
            return Outcome.EVENT
        if misconfigured:
            domain.crash("EPT misconfiguration: writable but not readable")  # SDM 28.3.3.1
            return Outcome.CRASH
        fault = address, linear, wanted | where
        outcome = yield from _resolve(monitor, vcpu, view, host, found, fault)
        if outcome is not None:
            return outcome
        if vcpu.ring_blocked:
            return Outcome.EVENT  # tried again when the ring has room
    raise Livelock(f"gfn {gfn:#x}: the vCPU faults for ever")


def _resolve(
    monitor: Monitor,
    vcpu: Vcpu,
    view: View | None,
    host: Lookup,
    found: Lookup,
    fault: tuple[int, int, int],
) -> Waits[Outcome | None]:
    """Handle an EPT violation as Xen does; None if the vCPU tries the access again.

    Args:
        monitor: The domain's monitor.
        vcpu: The vCPU.
        view: Its view; None for the host p2m.
        host: The host's entry.
        found: The view's entry, or the host's.
        fault: Physical address, linear address, and what was wanted with the flags of where.
    """
    domain, gfn = monitor.domain, fault[0] // PAGE_SIZE
    wanted = fault[2] & (R | W | X)
    table = domain.host if view is None else view.table
    if not found.mapped:
        if view is None or not host.mapped:
            return Outcome.EMULATED
        _copy(domain, view, gfn, host)
        return None
    if wanted & ~access_rights(found.access):
        return (yield from _violation(monitor, vcpu, view, table, found, fault))
    if wanted & ~entry_rights(found.type, found.access):
        return _type_fault(domain, gfn, found.type, wanted)
    return _shatter(domain, table, gfn, found)


def _tell_guest(domain: Domain, vcpu: Vcpu, about: tuple[int, int, int]) -> bool:
    """Fill the #VE page, unless the CPU leaves guest mode all the same.

    SDM 3C, Convertible EPT Violations: it does in real mode, and while the page is in use.
    ``about`` is exit qualification, linear and physical address.
    """
    if vcpu.veinfo is None or not vcpu.register("cr0") & CR0_PE:
        return False
    frames = domain.machine.frames
    _, busy, *_ = _VE_INFORMATION.unpack_from(frames.peek(vcpu.veinfo))
    if busy:
        return False
    page = frames.page(vcpu.veinfo)
    _VE_INFORMATION.pack_into(page, 0, _EPT_VIOLATION, _VE_BUSY, *about, vcpu.view)
    return True


def vm_exit(monitor: Monitor, vcpu: Vcpu, reason: int, qualification: int = 0) -> Waits[bool]:
    """The vCPU leaves guest mode; True if Xen does not handle why, having sent an event.

    The beginning of ``vmx_vmexit_handler``, and ``hvm_monitor_vmexit``.
    """
    fields = {
        "vmexit.arch.vmx.reason": reason,
        "vmexit.arch.vmx.qualification": qualification,
    }
    return (yield from monitor.report("vmexit", vcpu, Reason.VMEXIT, fields))


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
    monitor: Monitor,
    vcpu: Vcpu,
    view: View | None,
    table: P2m,
    found: Lookup,
    fault: tuple[int, int, int],
) -> Waits[Outcome | None]:
    """``p2m_mem_access_check``, with physical address, linear address and flags; None: again."""
    domain = monitor.domain
    address, linear, flags = fault
    gfn, offset = divmod(address, PAGE_SIZE)

    def rewrite(access: int) -> None:
        if found.mfn != INVALID_MFN:
            table.write(gfn, found.mfn, ORDER_4K, found.type, access)

    if found.access == ACCESS_RX2RW and flags & W:
        rewrite(_ACCESS_RW)
        return None
    required = domain.access_required if view is None else view.access_required
    promoted = found.access == ACCESS_N2RWX
    if promoted:
        rewrite(ACCESS_RWX)
    if domain.listened:
        fields = {
            "mem_access.gfn": gfn,
            "mem_access.offset": offset,
            "mem_access.gla": linear,
            "mem_access.flags": flags,
        }
        paused = yield from monitor.traps(vcpu, Reason.MEM_ACCESS, fields, sync=not promoted)
        return Outcome.EVENT if paused else None
    if required:
        domain.crash("memory access violation, and no monitor where one is required")
        return Outcome.CRASH
    if not promoted:
        rewrite(ACCESS_RWX)
    return None
