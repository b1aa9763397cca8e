# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exceptions of this package: each has the operation, Xen's errno, and likely causes and cures.

Xen uses few errnos for many causes ("no view left" is EINVAL, "no such view" may be EBUSY), so an
errno alone does not say what to do: :data:`HINTS` lists the causes by operation.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Sequence
from functools import partial
from typing import Any


class XenError(OSError):
    """The base class of every error that this package raises on purpose.

    The exception to this is :class:`ReplayError`, which is not a XenError.

    Attributes:
        op: The backend operation (the C name without ``xc_``) or the handle method.
        errno: Xen's errno as Linux numbers it, or None if no call was made.
        domid: The domain that the error concerns, or None.
        view: The view that it concerns, or None.
        gfn: The gfn that it concerns, or None.
        vcpu: The vCPU that it concerns, or None.
        hint: The likely causes, likeliest first, each with its cure; may be empty.
    """

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        errno: int | None = None,
        domid: int | None = None,
        view: int | None = None,
        gfn: int | None = None,
        vcpu: int | None = None,
        hint: Sequence[str] = (),
    ) -> None:
        super().__init__(errno, message)
        self.message = message
        self.op = op
        self.errno = errno
        self.domid = domid
        self.view = view
        self.gfn = gfn
        self.vcpu = vcpu
        self.hint = tuple(hint)

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        if len(self.hint) == 1:
            return f"{self.message}\n  likely cause: {self.hint[0]}"
        causes = "\n".join(f"    {n}. {cause}" for n, cause in enumerate(self.hint, 1))
        return f"{self.message}\n  likely causes:\n{causes}"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), self.message, errno=self.errno), (), vars(self)

    def context(self) -> dict[str, Any]:
        """Return op, errno, domid, view, gfn and vcpu, as keyword arguments for another error."""
        return {
            "op": self.op,
            "errno": self.errno,
            "domid": self.domid,
            "view": self.view,
            "gfn": self.gfn,
            "vcpu": self.vcpu,
        }


class AccessDeniedError(XenError, PermissionError):
    """Permission denied: EPERM from a policy, or EACCES because the library's release differs."""


class DomainNotFoundError(XenError, ProcessLookupError):
    """There is no domain with that domid, name or uuid."""


class NotMappedError(XenError, LookupError):
    """The gfn has no entry of the kind that the call needs, or the domain is gone (ESRCH)."""


class InvalidArgumentError(XenError, ValueError):
    """An argument is out of range, or Xen refused it (EINVAL)."""


class BusyError(XenError):
    """The domain, view, monitor or resource is in use (EBUSY)."""


class AlreadyError(XenError, FileExistsError):
    """The requested state is set already, or can be set only once (EEXIST)."""


class OutOfMemoryError(XenError):
    """Xen, or the domain's p2m pool, has no memory left (ENOMEM)."""


class UnsupportedError(XenError, NotImplementedError):
    """The host, library or domain does not support this (EOPNOTSUPP, ENOSYS, absent symbol)."""


class ClosedError(XenError, ValueError):
    """The handle or its parent is closed, or the process has forked since it was opened."""


class LibraryError(XenError):
    """No usable Xen library was found; the message lists every candidate and why it failed."""


class SymbolError(XenError, ValueError):
    """An image cannot be used: it is unreadable or damaged, or lacks the symbol."""


class JournalError(XenError):
    """A journal cannot be written or trusted; the change to be recorded was not made."""


class StateError(XenError, ValueError):
    """A saved state of views cannot be used: it is damaged, or its version is unknown."""


class HazardError(XenError):
    """altp2m was not opened because of hazards to its views that were not accepted.

    Attributes:
        hazards: The hazards' names, each with a section in ``docs/hazards.md``.
    """

    def __init__(self, message: str, *, hazards: Sequence[str] = (), **keywords: Any) -> None:
        super().__init__(message, **keywords)
        self.hazards = tuple(hazards)


class RecordingError(XenError, ValueError):
    """A recording cannot be written or read: the file exists, is damaged, or is not a recording."""


class ReplayError(AssertionError):
    """A replayed session makes another call than the recorded one.

    It is not a :class:`XenError`, so that code which handles Xen's refusals does not catch it.

    Attributes:
        line: The line of the recording.
        expected: The recorded call, in words; None at the end of the recording.
        came: The call that was made instead, in words.
    """

    def __init__(self, message: str, *, line: int, expected: str | None, came: str) -> None:
        super().__init__(message)
        self.line, self.expected, self.came = line, expected, came

    def __reduce__(self) -> tuple[Any, ...]:
        made = partial(
            type(self), str(self), line=self.line, expected=self.expected, came=self.came
        )
        return made, (), vars(self)


class RingError(XenError):
    """A monitor's ring contains something that neither Xen nor this package writes."""


class LeftoverError(XenError):
    """Undoing or closing failed in part: some changes are still in place.

    Attributes:
        left: The changes that are still in place, in words.
    """

    def __init__(self, message: str, *, left: Sequence[str] = (), **keywords: Any) -> None:
        super().__init__(message, **keywords)
        self.left = tuple(left)

    def __str__(self) -> str:
        lines = [super().__str__(), *(f"  still in place: {thing}" for thing in self.left)]
        return "\n".join(lines)


def add_failure(error: BaseException, failure: XenError) -> None:
    """Add to an exception the note that undoing has failed, too."""
    error.add_note(str(failure))
    if isinstance(failure, LeftoverError):
        vars(error)["left"] = (*(left_in_place(error) or ()), *failure.left)


def left_in_place(error: BaseException) -> tuple[str, ...] | None:
    """Return the changes that could not be undone, in words; None if an error left nothing.

    A :class:`LeftoverError` lists them, and so does any other exception that ended a ``with`` block
    whose handle could not be closed.
    """
    left: tuple[str, ...] | None = vars(error).get("left")
    return left


class PlacementWarning(UserWarning):
    """A breakpoint may be inside an instruction; an int3 there would corrupt the guest."""


class LibraryMismatchWarning(UserWarning):
    """The library's release is not the running hypervisor's."""


_CLASSES: dict[int, type[XenError]] = {
    _errno.EPERM: AccessDeniedError,
    _errno.EACCES: AccessDeniedError,
    _errno.EINVAL: InvalidArgumentError,
    _errno.EBUSY: BusyError,
    _errno.EEXIST: AlreadyError,
    _errno.ENOMEM: OutOfMemoryError,
    _errno.EOPNOTSUPP: UnsupportedError,
    _errno.ENOSYS: UnsupportedError,
}

_HOST_OFF = (
    "altp2m is off in the hypervisor: add altp2m=1 to Xen's command line and reboot "
    "(needs an Intel CPU with EPT)"
)
_INACTIVE = "altp2m is not active on this domain: enable it first (domain.altp2m())"
_NOT_HVM = "the domain is PV: only HVM and PVH guests have views"
_MODE_OFF = (
    'the domain was created without altp2m: add altp2m="external" to its xl.cfg and recreate it'
)
_MODE_FIXED = (
    "altp2m is set when a domain is created (read-only from Xen 4.19, settable once before): "
    'set altp2m="external" in its xl.cfg'
)
_NO_COUNT = "the domain has no views (Xen 4.21 and later): add altp2m_count=10 to its xl.cfg"
_PRIVILEGE = "the caller may not control this domain: run as root in dom0"
_POLICY = (
    "the domain's mode or the XSM policy forbids it: external mode allows the control domain only"
)
_SKEW = (
    "the library's release is not the hypervisor's: install the matching library, "
    "or name it in XENALTP2M_LIBXENCTRL"
)
_NO_DOMAIN = "the domain is gone: it was destroyed or shut down"
_BAD_VIEW = "no such view: it was destroyed, never created, or altp2m was switched off since"
_BAD_ACCESS = "an access that this release does not support: r_pw needs Xen 4.20"
_NO_POOL = "the domain's p2m pool is exhausted: raise shadow_memory in its xl.cfg, or destroy views"
_NO_RING = "no monitor is enabled on the domain: open one first (domain.monitor())"
_HOLE = (
    "the gfn is not ordinary RAM in the host p2m: a hole, MMIO, log-dirty (video memory that a "
    "viewer displays), or shared"
)
_LAZY = "the view has no own entry for the gfn yet: Xen copies it from the host p2m on first use"
_OLD_XEN = "this Xen is older than the operation"
_NO_VM_EVENT = "the hypervisor was built without CONFIG_VM_EVENT (Xen 4.22)"
_NO_VCPU = "no such vCPU"
_NO_XEN = (
    "this kernel is not running as a Xen control domain (no /dev/xen/privcmd): boot Xen, or use "
    'the mock backend, connect("mock"); xenaltp2m doctor gives details'
)

HINTS: dict[tuple[str, int], tuple[str, ...]] = {
    ("altp2m", _errno.EOPNOTSUPP): (_HOST_OFF, _INACTIVE, _NOT_HVM, _NO_COUNT, _OLD_XEN),
    ("altp2m", _errno.EINVAL): (_BAD_VIEW, _MODE_OFF),
    ("altp2m", _errno.EPERM): (_PRIVILEGE, _POLICY),
    ("altp2m", _errno.ESRCH): (_NO_DOMAIN,),
    ("altp2m", _errno.ENOMEM): (_NO_POOL,),
    ("altp2m_get_domain_state", _errno.EOPNOTSUPP): (_HOST_OFF, _NOT_HVM, _NO_COUNT),
    ("altp2m_get_domain_state", _errno.EINVAL): (_MODE_OFF,),
    ("altp2m_set_domain_state", _errno.EOPNOTSUPP): (_HOST_OFF, _NOT_HVM, _NO_COUNT),
    ("altp2m_set_domain_state", _errno.EINVAL): (
        _MODE_OFF,
        "the domain has nested virtualisation, which excludes altp2m: remove nestedhvm=1",
    ),
    ("altp2m_set_domain_state", _errno.ENOMEM): (
        "Xen has no memory for the view's log-dirty ranges",
    ),
    ("altp2m_create_view", _errno.EINVAL): (
        "no view is left: 10 with view 0 up to Xen 4.20, then altp2m_count in xl.cfg",
        _BAD_ACCESS,
        _MODE_OFF,
    ),
    ("altp2m_create_view", _errno.ENOMEM): ("Xen has no memory for the view's log-dirty ranges",),
    ("altp2m_destroy_view", _errno.EBUSY): (
        "a vCPU is in the view: switch every vCPU to another view first",
        "no such view (Xen returns EBUSY for that, too)",
        "view 0 cannot be destroyed: switch altp2m off instead",
    ),
    ("altp2m_destroy_view", _errno.EINVAL): (_MODE_OFF,),
    ("altp2m_switch_to_view", _errno.EINVAL): (
        _BAD_VIEW,
        "the view is hidden: make it visible first",
        _MODE_OFF,
    ),
    ("altp2m_set_mem_access", _errno.EINVAL): (
        _BAD_VIEW,
        _BAD_ACCESS,
        "the gfn is 2^36 or more",
        _MODE_OFF,
    ),
    ("altp2m_set_mem_access", _errno.EOPNOTSUPP): (_HOST_OFF, _INACTIVE, _NOT_HVM, _NO_VM_EVENT),
    ("altp2m_set_mem_access_multi", _errno.EINVAL): (
        _BAD_VIEW,
        "an access that this release does not support; the gfns before it were changed",
        "a gfn is 2^36 or more; the gfns before it were changed",
        _MODE_OFF,
    ),
    ("altp2m_set_mem_access_multi", _errno.EOPNOTSUPP): (
        _HOST_OFF,
        _INACTIVE,
        _NOT_HVM,
        _NO_VM_EVENT,
    ),
    ("altp2m_set_mem_access_multi", _errno.ENOMEM): (
        _NO_POOL + "; the gfns before the failing one were changed",
    ),
    ("altp2m_get_mem_access", _errno.ESRCH): (_LAZY, _HOLE, _NO_DOMAIN),
    ("altp2m_get_mem_access", _errno.EOPNOTSUPP): (_HOST_OFF, _INACTIVE, _NOT_HVM, _NO_VM_EVENT),
    ("altp2m_change_gfn", _errno.ESRCH): (_HOLE + " (the old or the new one)", _NO_DOMAIN),
    ("altp2m_change_gfn", _errno.EILSEQ): (
        "the view's entry is not RAM (direct MMIO): Xen refuses to remove it",
    ),
    ("altp2m_set_suppress_ve", _errno.ESRCH): (_HOLE, _NO_DOMAIN),
    ("altp2m_set_suppress_ve", _errno.EINVAL): (_BAD_VIEW, "the gfn is 2^36 or more", _MODE_OFF),
    ("altp2m_get_suppress_ve", _errno.ESRCH): (_LAZY, _HOLE, _NO_DOMAIN),
    ("altp2m_set_suppress_ve_multi", _errno.EINVAL): (
        "the first gfn lies above the last, or above what the CPU can address",
        _BAD_VIEW,
        _MODE_OFF,
    ),
    ("altp2m_get_vcpu_p2m_idx", _errno.EINVAL): (_NO_VCPU, _MODE_OFF),
    ("altp2m_set_vcpu_enable_notify", _errno.EINVAL): (
        _NO_VCPU,
        "the page is missing, special, or not ordinary RAM",
        _MODE_OFF,
    ),
    ("altp2m_set_vcpu_enable_notify", _errno.EOPNOTSUPP): (
        "the CPU has no #VE (Intel Broadwell and later have)",
        _HOST_OFF,
        _INACTIVE,
        _NOT_HVM,
    ),
    ("altp2m_set_vcpu_enable_notify", _errno.EEXIST): (
        "the vCPU has a #VE page already: disable it first",
    ),
    ("altp2m_set_vcpu_enable_notify", _errno.EAGAIN): ("the page is paged out or shared",),
    ("altp2m_set_vcpu_enable_notify", _errno.EPERM): (
        "the page is direct MMIO (Xen 4.16 and later)",
        _PRIVILEGE,
        _POLICY,
    ),
    ("altp2m_set_vcpu_disable_notify", _errno.EINVAL): (_NO_VCPU, _MODE_OFF),
    ("altp2m_set_vcpu_disable_notify", _errno.EOPNOTSUPP): (
        "the CPU has no #VE (Intel Broadwell and later have)",
        _HOST_OFF,
        _INACTIVE,
        _NOT_HVM,
    ),
    ("hvm_param_set", _errno.EEXIST): (_MODE_FIXED,),
    ("hvm_param_set", _errno.EINVAL): (
        "an unknown value or parameter, or the domain has nested virtualisation",
        _NOT_HVM,
    ),
    ("hvm_get_mem_type", _errno.EINVAL): (_NOT_HVM,),
    ("domain_get_pod_target", _errno.EINVAL): (_NOT_HVM,),
    ("domain_get_pod_target", _errno.EPERM): (
        "the domain is gone (Xen 4.16 and older return EPERM for that, too)",
        _PRIVILEGE,
    ),
    ("hvm_param_get", _errno.EINVAL): ("an unknown parameter", _NOT_HVM),
    ("monitor_enable", _errno.EBUSY): (
        "a monitor is, or was, active: another agent, or one that was killed",
        "the ring's page is gone and the domain is at its memory limit (domain_setmaxmem)",
    ),
    ("monitor_enable", _errno.EOPNOTSUPP): (
        "the toolstack gave the domain no page for the ring (HVM_PARAM_MONITOR_RING_PFN)",
        _NO_VM_EVENT,
    ),
    ("monitor_enable", _errno.EINVAL): ("the domain is the caller's own, or is not HVM or PVH",),
    ("monitor_disable", _errno.EINVAL): ("no monitor is enabled on the domain",),
    ("monitor_disable", _errno.EBUSY): (
        "vCPUs wait for a free slot in the ring: answer its requests first",
    ),
    ("monitor_resume", _errno.ENODEV): (_NO_RING,),
    ("monitor", _errno.EEXIST): ("the event is already enabled, or already disabled",),
    ("monitor", _errno.EOPNOTSUPP): (
        "this CPU or this Xen cannot send the event",
        "the domain is PV: only HVM and PVH guests can be monitored",
        _NO_VM_EVENT,
    ),
    ("vm_event_get_version", _errno.EOPNOTSUPP): (_NO_VM_EVENT,),
    ("monitor", _errno.EPERM): ("a domain cannot monitor itself", _PRIVILEGE),
    ("monitor_mov_to_msr", _errno.ENXIO): (_NO_RING,),
    ("monitor_mov_to_msr", _errno.EINVAL): (
        "the MSR is outside 0..0x1fff, 0x40000000..0x40001fff and 0xc0000000..0xc0001fff",
    ),
    ("monitor_write_ctrlreg", _errno.EINVAL): ("the index is not 0 (CR0), 1 (CR3), 2 or 3",),
    ("monitor_emulate_each_rep", _errno.EINVAL): (_NO_RING,),
    ("monitor_control_registers", _errno.EACCES): (
        "this Xen is too new for this package: its domctl interface version is another",
        _PRIVILEGE,
    ),
    ("monitor_control_registers", _errno.EOPNOTSUPP): (_NO_VM_EVENT,),
    ("set_mem_access", _errno.ENODEV): (_NO_RING,),
    ("set_mem_access", _errno.EINVAL): (
        (
            "no gfns, gfns beyond the domain's maximum gfn, or an access that this release does "
            "not support"
        ),
        _NOT_HVM,
    ),
    ("set_mem_access", _errno.ENOSYS): (_NO_VM_EVENT,),
    ("set_mem_access_multi", _errno.ENODEV): (_NO_RING,),
    ("set_mem_access_multi", _errno.EINVAL): (
        (
            "an access that this release does not support, or a gfn of 2^36 or more; those before "
            "it were set"
        ),
        _NOT_HVM,
    ),
    ("set_mem_access_multi", _errno.ENOSYS): (_NO_VM_EVENT,),
    ("get_mem_access", _errno.ENODEV): (_NO_RING,),
    ("get_mem_access", _errno.ESRCH): ("the gfn is a hole in the host p2m", _NO_DOMAIN),
    ("get_mem_access", _errno.EINVAL): ("the gfn is beyond the domain's maximum gfn", _NOT_HVM),
    ("get_mem_access", _errno.ENOSYS): (_NO_VM_EVENT,),
    ("domain_set_access_required", _errno.ENOSYS): (_NO_VM_EVENT,),
    ("domain_populate_physmap_exact", _errno.EBUSY): (
        "the domain is at its memory limit: raise it first (domain_setmaxmem)",
        "the host has no memory left",
        _NO_DOMAIN,
    ),
    ("domain_decrease_reservation_exact", _errno.EINVAL): (
        "a gfn is a hole, or direct MMIO; the gfns before it were removed",
        _NO_DOMAIN,
    ),
    ("domain_unpause", _errno.EINVAL): ("the domain is not paused, or not by the toolstack",),
    ("domain_debug_control", _errno.EINVAL): (_NO_VCPU, _NOT_HVM),
    ("vcpu_getinfo", _errno.EINVAL): (_NO_VCPU,),
    ("vcpu_getinfo", _errno.ENOENT): (_NO_VCPU,),
    ("hvm_inject_trap", _errno.EINVAL): (
        _NO_VCPU,
        "the domain is PV: traps can be injected into HVM and PVH guests only",
    ),
    ("hvm_inject_trap", _errno.EBUSY): (
        "another event is pending for the vCPU: let the vCPU run, then inject again",
    ),
    ("domain_hvm_getcontext", _errno.EINVAL): (_NOT_HVM,),
    ("domain_hvm_getcontext_partial", _errno.EINVAL): ("Xen saves no such record", _NOT_HVM),
    ("domain_hvm_getcontext_partial", _errno.ENOENT): (_NO_VCPU,),
    ("domain_hvm_setcontext", _errno.EINVAL): (
        "an unknown record, or one of the wrong size, or for a vCPU that does not exist",
        _NOT_HVM,
    ),
    ("domain_hvm_setcontext", _errno.ENODATA): ("the stream is truncated",),
    ("set_paging_mempool_size", _errno.EINVAL): ("the size is not a whole number of pages",),
    ("foreignmemory_map", _errno.EINVAL): ("a gfn is a hole in the host p2m, or MMIO",),
    ("evtchn_bind_interdomain", _errno.EINVAL): (
        "the domain has no such port, or another agent has bound it",
    ),
    ("interface_open", _errno.ENOENT): (_NO_XEN,),
    ("interface_open", _errno.EACCES): (_PRIVILEGE,),
    ("*", _errno.ESRCH): (_NO_DOMAIN,),
    ("*", _errno.EACCES): (_SKEW, _PRIVILEGE),
    ("*", _errno.EPERM): (_PRIVILEGE,),
    ("*", _errno.ENOMEM): ("the host has no memory left",),
    ("*", _errno.EMFILE): (
        "this process has too many open files: close some, or raise `ulimit -n`",
    ),
}
"""Causes, likeliest first, by (operation, errno), with fallbacks by family (``altp2m``,
``monitor``) and ``*``. ``tests/unit/test_errors.py`` compares them with the hypervisor's own
refusals."""


def missing_symbol(op: str, symbol: str, since: tuple[int, int]) -> UnsupportedError:
    """Return the exception for a C function that the loaded library lacks."""
    release = f"{since[0]}.{since[1]}"
    return UnsupportedError(
        f"{op}: the loaded library has no {symbol}, which needs Xen {release}",
        op=op,
        hint=(f"the library is older than Xen {release}: install the hypervisor's own library",),
    )


def hint(op: str, errno: int) -> tuple[str, ...]:
    """Return the likely causes of an errno of an operation, likeliest first; empty if unknown."""
    for key in (op, op.partition("_")[0], "*"):
        if (causes := HINTS.get((key, errno))) is not None:
            return causes
    return ()


def not_known(what: str, number: int, op: str, domid: int | None = None) -> UnsupportedError:
    """Return the exception for a number that only a newer xenaltp2m may know."""
    return UnsupportedError(
        f"{op}: Xen reports {what} as {number}, which this version of xenaltp2m does not know",
        op=op,
        domid=domid,
        hint=("this Xen is newer: a newer xenaltp2m may know it",),
    )


def from_errno(
    op: str,
    errno: int,
    *,
    domid: int | None = None,
    view: int | None = None,
    gfn: int | None = None,
    vcpu: int | None = None,
) -> XenError:
    """Return the exception for a failed call; only this function chooses its class."""
    kind = _CLASSES.get(errno, XenError)
    if errno == _errno.ESRCH:
        kind = DomainNotFoundError if gfn is None else NotMappedError
    about = [
        text
        for value, text in (
            (domid, f"domain {domid}"),
            (view, f"view {view}"),
            (gfn, f"gfn {gfn:#x}" if gfn is not None else ""),
            (vcpu, f"vCPU {vcpu}"),
        )
        if value is not None
    ]
    where = f" ({', '.join(about)})" if about else ""
    name = _errno.errorcode.get(errno, str(errno))
    if name == "ENOTSUP":  # the number has two names; Xen uses the other
        name = "EOPNOTSUPP"
    return kind(
        f"{op}{where}: {name}, {os.strerror(errno)}",
        op=op,
        errno=errno,
        domid=domid,
        view=view,
        gfn=gfn,
        vcpu=vcpu,
        hint=hint(op, errno),
    )
