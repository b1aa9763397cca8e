# SPDX-License-Identifier: LGPL-2.1-or-later
"""Python for Xen's altp2m: alternate views of a guest's physical memory.

Importing this opens no library and touches no hypervisor; :func:`connect` does.
"""

from xenaltp2m.altp2m import Altp2m, DecorativeDefaultWarning, SuperpageDefaultWarning
from xenaltp2m.domain import Domain, Memory
from xenaltp2m.errors import (
    AccessDeniedError,
    AlreadyError,
    BusyError,
    ClosedError,
    DomainNotFoundError,
    InvalidArgumentError,
    LeftoverError,
    LibraryError,
    LibraryMismatchWarning,
    NotMappedError,
    OutOfMemoryError,
    SymbolError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.types import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Access,
    Altp2mMode,
    DomainInfo,
    DomId,
    Gfn,
    SuppressVeFailure,
    VcpuId,
    ViewId,
)
from xenaltp2m.view import Difference, Mismatch, View
from xenaltp2m.xen import Xen, connect

__version__ = "0.1.0"

__all__ = [
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "Access",
    "AccessDeniedError",
    "AlreadyError",
    "Altp2m",
    "Altp2mMode",
    "BusyError",
    "ClosedError",
    "DecorativeDefaultWarning",
    "Difference",
    "DomId",
    "Domain",
    "DomainInfo",
    "DomainNotFoundError",
    "Gfn",
    "InvalidArgumentError",
    "LeftoverError",
    "LibraryError",
    "LibraryMismatchWarning",
    "Memory",
    "Mismatch",
    "NotMappedError",
    "OutOfMemoryError",
    "SuperpageDefaultWarning",
    "SuppressVeFailure",
    "SymbolError",
    "UnsupportedError",
    "VcpuId",
    "View",
    "ViewId",
    "Xen",
    "XenError",
    "connect",
]
