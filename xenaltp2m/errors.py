# SPDX-License-Identifier: LGPL-2.1-or-later
"""One tree of errors, each with what was asked, what Xen said, and the likely cause and cure.

Xen reuses few errnos for many causes ("no view left" is EINVAL, "no such view" may be EBUSY), so
an errno alone does not tell a user what to do: :data:`HINTS` lists the causes by operation.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Sequence
from functools import partial
from typing import Any


class XenError(OSError):
    """Something was refused. Root of every error this package raises on purpose.

    Only :class:`ReplayError` is none, for a reason.

    Attributes:
        op: The backend operation (the C name without ``xc_``) or the handle method.
        errno: Xen's errno as Linux numbers it, or None where no call was made.
        domid: The domain it was about, where it was about one.
        view: The view, likewise.
        gfn: The gfn.
        vcpu: The vCPU.
        hint: The likely causes in order, each with its cure; may be empty.
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
        """What the error is about: op, errno, domid, view, gfn and vcpu, as keyword arguments."""
        return {
            "op": self.op,
            "errno": self.errno,
            "domid": self.domid,
            "view": self.view,
            "gfn": self.gfn,
            "vcpu": self.vcpu,
        }


class AccessDeniedError(XenError, PermissionError):
    """Not allowed: EPERM from a policy, or EACCES from a library of another release."""


class DomainNotFoundError(XenError, ProcessLookupError):
    """No domain with that number, name or uuid."""


class NotMappedError(XenError, LookupError):
    """The gfn has no entry of the kind the call needs, or the domain has gone (ESRCH)."""


class InvalidArgumentError(XenError, ValueError):
    """An argument out of range, or one that Xen refused (EINVAL)."""


class BusyError(XenError):
    """In use (EBUSY)."""


class AlreadyError(XenError, FileExistsError):
    """Already in the requested state, or settable only once (EEXIST)."""


class OutOfMemoryError(XenError):
    """Xen, or the domain's p2m pool, has no memory left (ENOMEM)."""


class UnsupportedError(XenError, NotImplementedError):
    """The host, the library or the domain cannot do this (EOPNOTSUPP, ENOSYS, absent symbol)."""


class ClosedError(XenError, ValueError):
    """The handle is closed, its parent is, or the process forked since it was opened."""


class LibraryError(XenError):
    """No usable Xen library; lists every candidate and why it failed."""


class SymbolError(XenError, ValueError):
    """An image cannot be used: it is unreadable, damaged, or has no such symbol."""


class JournalError(XenError):
    """A journal cannot be written or trusted; the change it was for has not been made."""


class StateError(XenError, ValueError):
    """A saved state of views cannot be used: it is damaged, or of a version not known."""


class HazardError(XenError):
    """Something undermines the views that were to be made, and nobody has accepted it.

    Attributes:
        hazards: The names of what was found, each a section of ``docs/hazards.md``.
    """

    def __init__(self, message: str, *, hazards: Sequence[str] = (), **keywords: Any) -> None:
        super().__init__(message, **keywords)
        self.hazards = tuple(hazards)


class RecordingError(XenError, ValueError):
    """A recording cannot be made or read: it is there already, damaged, or not known."""


class ReplayError(AssertionError):
    """A replayed session does what the recorded one did not.

    No :class:`XenError`: who copes with a refusal by Xen must not take this for one.

    Attributes:
        line: Of the recording.
        expected: What is recorded there, in words; None where the recording has ended.
        came: What came instead, in words.
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
    """A monitor's ring holds what neither Xen nor this package can have put there."""


class LeftoverError(XenError):
    """An operation failed and so did undoing it.

    Attributes:
        left: What is still in place, in words, one entry for each thing.
    """

    def __init__(self, message: str, *, left: Sequence[str] = (), **keywords: Any) -> None:
        super().__init__(message, **keywords)
        self.left = tuple(left)

    def __str__(self) -> str:
        lines = [super().__str__(), *(f"  still in place: {thing}" for thing in self.left)]
        return "\n".join(lines)


def add_failure(error: BaseException, failure: XenError) -> None:
    """Note on an error that taking back what was done failed on top of it."""
    error.add_note(str(failure))
    if isinstance(failure, LeftoverError):
        vars(error)["left"] = (*(left_in_place(error) or ()), *failure.left)


def left_in_place(error: BaseException) -> tuple[str, ...] | None:
    """Return what could not be undone, in words; None where everything was.

    It is told by a :class:`LeftoverError`, and by any other error that ended a ``with`` block whose
    handle could not be closed then.
    """
    left: tuple[str, ...] | None = vars(error).get("left")
    return left


class PlacementWarning(UserWarning):
    """A breakpoint may be inside an instruction; an int3 there would corrupt the guest."""


class LibraryMismatchWarning(UserWarning):
    """The library and the running hypervisor are of different releases."""


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
    'the domain was created without altp2m: add altp2m="external" to its xl.cfg and create it anew'
)
_MODE_FIXED = (
    "altp2m is set when a domain is created (read-only from Xen 4.19, once before): "
    'altp2m="external" in its xl.cfg'
)
_NO_COUNT = "the domain has no views (Xen 4.21 and later): add altp2m_count=10 to its xl.cfg"
_PRIVILEGE = "the caller may not control this domain: run as root in dom0"
_POLICY = (
    "the domain's mode or the XSM policy forbids it: external mode serves the control domain only"
)
_SKEW = (
    "the library's release is not the hypervisor's: install the one that matches, "
    "or name it in XENALTP2M_LIBXENCTRL"
)
_NO_DOMAIN = "the domain has gone: it was destroyed or shut down"
_BAD_VIEW = "no such view: it was destroyed, never created, or altp2m was switched off since"
_BAD_ACCESS = "an access this release does not know: r_pw needs Xen 4.20"
_NO_POOL = "the domain's p2m pool is exhausted: raise shadow_memory in its xl.cfg, or destroy views"
_NO_RING = "no monitor is enabled on the domain: open one first (domain.monitor())"
_HOLE = (
    "the gfn is not ordinary RAM in the host p2m: a hole, MMIO, log-dirty (a watched screen), "
    "or shared"
)
_LAZY = "the view has no entry of its own for the gfn yet: it fills from the host p2m on first use"
_OLD_XEN = "this Xen is older than the operation"
_NO_VM_EVENT = "the hypervisor was built without CONFIG_VM_EVENT (Xen 4.22)"
_NO_VCPU = "no such vCPU"
_NO_XEN = (
    "this kernel is not running as a Xen control domain (no /dev/xen/privcmd): boot Xen, or use "
    'the mock backend, connect("mock"); xenaltp2m doctor tells more'
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
        "a vCPU is in the view: switch every vCPU to another first",
        "no such view (Xen says EBUSY for that too)",
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
        "an access this release does not know; the gfns before it were changed",
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
        "a value or parameter Xen does not know, or the domain has nested virtualisation",
        _NOT_HVM,
    ),
    ("hvm_get_mem_type", _errno.EINVAL): (_NOT_HVM,),
    ("domain_get_pod_target", _errno.EINVAL): (_NOT_HVM,),
    ("domain_get_pod_target", _errno.EPERM): (
        "the domain has gone (Xen 4.16 and older say EPERM for that, too)",
        _PRIVILEGE,
    ),
    ("hvm_param_get", _errno.EINVAL): ("a parameter Xen does not know", _NOT_HVM),
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
        "vCPUs wait for room in the ring: answer the requests in it first",
    ),
    ("monitor_resume", _errno.ENODEV): (_NO_RING,),
    ("monitor", _errno.EEXIST): ("the event is already switched that way",),
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
        "this Xen is newer than this package knows: domctls have another version",
        _PRIVILEGE,
    ),
    ("monitor_control_registers", _errno.EOPNOTSUPP): (_NO_VM_EVENT,),
    ("set_mem_access", _errno.ENODEV): (_NO_RING,),
    ("set_mem_access", _errno.EINVAL): (
        "no gfns, gfns beyond the domain's maximum gfn, or an access this release does not know",
        _NOT_HVM,
    ),
    ("set_mem_access", _errno.ENOSYS): (_NO_VM_EVENT,),
    ("set_mem_access_multi", _errno.ENODEV): (_NO_RING,),
    ("set_mem_access_multi", _errno.EINVAL): (
        "an access this release does not know, or a gfn of 2^36 or more; those before it were set",
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
        "a gfn is a hole, or direct MMIO; those before it were taken back",
        _NO_DOMAIN,
    ),
    ("domain_unpause", _errno.EINVAL): ("the domain is not paused, or not by a toolstack",),
    ("domain_debug_control", _errno.EINVAL): (_NO_VCPU, _NOT_HVM),
    ("vcpu_getinfo", _errno.EINVAL): (_NO_VCPU,),
    ("vcpu_getinfo", _errno.ENOENT): (_NO_VCPU,),
    ("hvm_inject_trap", _errno.EINVAL): (
        _NO_VCPU,
        "the domain is PV: only HVM and PVH guests can be injected into",
    ),
    ("hvm_inject_trap", _errno.EBUSY): (
        "another event waits for the vCPU to run: let it run, then inject again",
    ),
    ("domain_hvm_getcontext", _errno.EINVAL): (_NOT_HVM,),
    ("domain_hvm_getcontext_partial", _errno.EINVAL): ("Xen saves no such record", _NOT_HVM),
    ("domain_hvm_getcontext_partial", _errno.ENOENT): (_NO_VCPU,),
    ("domain_hvm_setcontext", _errno.EINVAL): (
        "a record that Xen does not know, or of the wrong size, or for a vCPU that is not there",
        _NOT_HVM,
    ),
    ("domain_hvm_setcontext", _errno.ENODATA): ("the stream is cut short",),
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
        "this process has as many files open as it may: close some, or raise `ulimit -n`",
    ),
}
"""Causes, likeliest first, by (operation, errno); then by family (``altp2m``, ``monitor``), then
``*``. Checked against the hypervisor's own refusals in ``tests/unit/test_errors.py``."""


def missing_symbol(op: str, symbol: str, since: tuple[int, int]) -> UnsupportedError:
    """Make the error for a C function that the loaded library does not have."""
    release = f"{since[0]}.{since[1]}"
    return UnsupportedError(
        f"{op}: the loaded library has no {symbol}, which came with Xen {release}",
        op=op,
        hint=(f"the library is older than Xen {release}: install the hypervisor's own",),
    )


def hint(op: str, errno: int) -> tuple[str, ...]:
    """Return the likely causes of an operation's errno, likeliest first; empty if none is known."""
    for key in (op, op.partition("_")[0], "*"):
        if (causes := HINTS.get((key, errno))) is not None:
            return causes
    return ()


def not_known(what: str, number: int, op: str, domid: int | None = None) -> UnsupportedError:
    """Make the error for a number that a newer Xen has a meaning for."""
    return UnsupportedError(
        f"{op}: Xen says that {what} is {number}, which this version of xenaltp2m does not know",
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
    """Make the error for a call that failed: the one place that chooses its class."""
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
    if name == "ENOTSUP":  # errorcode knows one name for the number; Xen's is the other
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
