# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Backend Protocol over libxenctrl and its companions: the only package that calls C.

Nothing is opened by importing it. :class:`LibxcBackend` opens libxenctrl; the other libraries are
opened when they are first needed. Each function is looked up once, at its first use, and an absent
one raises :class:`~xenaltp2m.errors.UnsupportedError`.

Every number is checked before C sees it, because C truncates: a domid to 16 bits
(``xc_altp2m.c``), a control register's index to 8 (``xc_monitor.c``); cffi minds only C's
prototype, and takes whatever has an ``__int__``.
"""

from __future__ import annotations

import warnings

from xenaltp2m import errors
from xenaltp2m.backend.clock import CLOCK
from xenaltp2m.backend.libxc.altp2m import Altp2mCalls
from xenaltp2m.backend.libxc.event_channels import EventChannels
from xenaltp2m.backend.libxc.foreign_memory import ForeignMemory
from xenaltp2m.backend.libxc.loader import Loader, mismatch
from xenaltp2m.backend.libxc.monitor import MonitorCalls
from xenaltp2m.backend.libxc.toolstack import ToolstackReads
from xenaltp2m.backend.libxc.vcpus import VcpuCalls

__all__ = ["LibxcBackend"]


class LibxcBackend(
    ToolstackReads, VcpuCalls, Altp2mCalls, MonitorCalls, EventChannels, ForeignMemory
):
    """A dom0's Xen, through its own libraries. See :class:`xenaltp2m.backend.Backend`.

    Threads: any number may call at a time. libxenctrl's handle is re-entrant unless asked not to
    be (``XC_OPENFLAG_NON_REENTRANT``, xenctrl.h; ``cache_lock``, ``tools/libs/call/buffer.c``) but
    for its last error, which is not used here; errno is the thread's own. The GIL is released
    while C runs. :meth:`close`, and unmapping pages, must wait until no other thread is in a call
    that uses them.

    Fork: the C handles are the parent's (``xc_interface_open``, xenctrl.h). In the child every
    call raises :class:`~xenaltp2m.errors.ClosedError`, and mapped pages are gone (privcmd maps
    with ``VM_DONTCOPY``), so their views are released.
    """

    name = "libxc"
    clock = CLOCK

    def __init__(self, loader: Loader | None = None) -> None:
        """Open libxenctrl and ask which Xen is running.

        Args:
            loader: Chooses the libraries; the default follows the environment and sysfs.

        Raises:
            LibraryError: No usable libxenctrl.
            UnsupportedError: The hypervisor is older than this package supports.
            XenError: This is not a Xen control domain, or the caller is not root.

        Warns:
            LibraryMismatchWarning: libxenctrl and the hypervisor are of different releases.
        """
        super().__init__(loader)
        if difference := mismatch(self._library.version, self._release.version):
            try:
                warnings.warn(difference, errors.LibraryMismatchWarning, stacklevel=2)
            except BaseException:  # warnings may be errors
                self.close()
                raise
