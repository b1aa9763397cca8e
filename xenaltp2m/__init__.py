# SPDX-License-Identifier: LGPL-2.1-or-later
"""Python for Xen's altp2m: alternate views of a guest's physical memory.

Importing this package opens no Xen library and makes no hypercall; :func:`connect` does.
"""

import logging
import typing as _typing
from importlib import import_module as _import_module

from xenaltp2m.abi.vm_event import AccessFlag, Flag, Reason
from xenaltp2m.errors import (
    AccessDeniedError,
    AlreadyError,
    BusyError,
    ClosedError,
    DomainNotFoundError,
    HazardError,
    InvalidArgumentError,
    JournalError,
    LeftoverError,
    LibraryError,
    LibraryMismatchWarning,
    NotMappedError,
    OutOfMemoryError,
    PlacementWarning,
    RecordingError,
    ReplayError,
    RingError,
    StateError,
    SymbolError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.handles.altp2m import Altp2m, DecorativeDefaultWarning, SuperpageDefaultWarning
from xenaltp2m.handles.domain import Domain
from xenaltp2m.handles.memory import AddressSpace, Memory, Translation
from xenaltp2m.handles.monitor import Monitor
from xenaltp2m.handles.vcpu import Vcpu
from xenaltp2m.handles.view import HoleWarning, Mismatch, View
from xenaltp2m.handles.view_resets import ViewReset
from xenaltp2m.handles.xen import Xen, connect
from xenaltp2m.tools.breakpoints.hooks import (
    Breakpoint,
    Hit,
    Patch,
    VirtualBreakpoint,
    Watchpoint,
    WatchpointHit,
)
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.types import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Access,
    Altp2mMode,
    DomainInfo,
    DomId,
    Gfn,
    MemoryType,
    PodTarget,
    SuppressVeFailure,
    VcpuId,
    VcpuInfo,
    ViewId,
    ViewInfo,
)
from xenaltp2m.values.events import (
    ControlRegister,
    Cpuid,
    DebugException,
    Descriptor,
    DescriptorAccess,
    DomainEnded,
    EmulateEachRep,
    EmulUnimplemented,
    Event,
    GuestRequest,
    InguestPagefault,
    Interrupt,
    Io,
    MemAccess,
    MemPaging,
    MemSharing,
    MovToMsr,
    PrivilegedCall,
    Registers,
    Singlestep,
    SoftwareBreakpoint,
    Subscription,
    TrapType,
    UnknownEvent,
    VmExit,
    WriteCtrlreg,
)
from xenaltp2m.values.responses import Action, Response
from xenaltp2m.values.view_model import Difference

if _typing.TYPE_CHECKING:
    from xenaltp2m.tools.migration import Migration
    from xenaltp2m.tools.state.capture import capture, restore
    from xenaltp2m.tools.tracing import Trace
    from xenaltp2m.values.state import State

__version__ = "0.1.0"

_LATER = {
    "Migration": "tools.migration",
    "State": "values.state",
    "Trace": "tools.tracing",
    "capture": "tools.state.capture",
    "restore": "tools.state.capture",
}
"""Names that are imported on first use, because most programs do not need them."""


def __getattr__(name: str) -> _typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(_import_module(f"{__name__}.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


logging.getLogger(__name__).addHandler(logging.NullHandler())  # else warnings go to stderr

__all__ = [
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "Access",
    "AccessDeniedError",
    "AccessFlag",
    "Action",
    "AddressSpace",
    "AlreadyError",
    "Altp2m",
    "Altp2mMode",
    "Breakpoint",
    "Breakpoints",
    "BusyError",
    "ClosedError",
    "ControlRegister",
    "Cpuid",
    "DebugException",
    "DecorativeDefaultWarning",
    "Descriptor",
    "DescriptorAccess",
    "Difference",
    "DomId",
    "Domain",
    "DomainEnded",
    "DomainInfo",
    "DomainNotFoundError",
    "EmulUnimplemented",
    "EmulateEachRep",
    "Event",
    "Flag",
    "Gfn",
    "GuestRequest",
    "HazardError",
    "Hit",
    "HoleWarning",
    "InguestPagefault",
    "Interrupt",
    "InvalidArgumentError",
    "Io",
    "JournalError",
    "LeftoverError",
    "LibraryError",
    "LibraryMismatchWarning",
    "MemAccess",
    "MemPaging",
    "MemSharing",
    "Memory",
    "MemoryType",
    "Migration",
    "Mismatch",
    "Monitor",
    "MovToMsr",
    "NotMappedError",
    "OutOfMemoryError",
    "Patch",
    "PlacementWarning",
    "PodTarget",
    "PrivilegedCall",
    "Reason",
    "RecordingError",
    "Registers",
    "ReplayError",
    "Response",
    "RingError",
    "Singlestep",
    "SoftwareBreakpoint",
    "State",
    "StateError",
    "Subscription",
    "SuperpageDefaultWarning",
    "SuppressVeFailure",
    "SymbolError",
    "Trace",
    "Translation",
    "TrapType",
    "UnknownEvent",
    "UnsupportedError",
    "Vcpu",
    "VcpuId",
    "VcpuInfo",
    "View",
    "ViewId",
    "ViewInfo",
    "ViewReset",
    "VirtualBreakpoint",
    "VmExit",
    "Watchpoint",
    "WatchpointHit",
    "WriteCtrlreg",
    "Xen",
    "XenError",
    "capture",
    "connect",
    "restore",
]
