# SPDX-License-Identifier: LGPL-2.1-or-later
"""The monitor's calls: its ring, and which events it reports."""

from __future__ import annotations

from functools import partial

from xenaltp2m.abi import layouts
from xenaltp2m.backend.libxc import clib
from xenaltp2m.backend.libxc.checks import as_domid, as_flag, as_number
from xenaltp2m.backend.libxc.clib import NULL, checked, constant, ffi, new, refusal
from xenaltp2m.backend.libxc.mapped_pages import MappedPages
from xenaltp2m.backend.mapping import Mapping
from xenaltp2m.types import PAGE_SIZE

_NARROW_INDEX = 1 << 8
"""``mov_to_cr.index`` is a byte in the hypercall (domctl.h), a uint16_t in C's prototype."""


class MonitorCalls(MappedPages):
    """The monitor's calls, with its mapped ring."""

    def monitor_enable(self, domid: int) -> tuple[int, memoryview]:
        """``xc_monitor_enable``.

        On an error a note says which of its six steps failed (``xc_vm_event_enable``).
        """
        port = new(clib.UINT32)
        enable = self._c.xc_monitor_enable
        self._log.take()
        page = enable(self._xch, as_domid(domid), port)
        if page == NULL:
            raise self._log.annotate(refusal("xc_monitor_enable", domid=domid))
        unmap = partial(checked, "monitor_unmap_ring", self._libc.munmap, page, PAGE_SIZE)
        mapping = Mapping(ffi.buffer(page, PAGE_SIZE), writable=True, unmap=unmap)
        self._mappings[id(mapping.whole)] = mapping
        return int(port[0]), mapping.whole

    def monitor_unmap_ring(self, ring: memoryview) -> None:
        """``munmap`` of a ring's page.

        Raises:
            BusyError: Slices or casts of the ring are alive; release them and call again.
        """
        self._unmap("monitor_unmap_ring", ring)

    def monitor_disable(self, domid: int) -> None:
        self._call("xc_monitor_disable", as_domid(domid))

    def monitor_resume(self, domid: int) -> None:
        self._call("xc_monitor_resume", as_domid(domid))

    def monitor_get_capabilities(self, domid: int) -> int:
        capabilities = new(clib.UINT32)
        self._call("xc_monitor_get_capabilities", as_domid(domid), capabilities)
        return int(capabilities[0])

    def monitor_write_ctrlreg(
        self, domid: int, index: int, enable: bool, sync: bool, bitmask: int, onchangeonly: bool
    ) -> None:
        self._call(
            "xc_monitor_write_ctrlreg",
            as_domid(domid),
            as_number("index", index, _NARROW_INDEX),
            as_flag("enable", enable),
            as_flag("sync", sync),
            as_number("bitmask", bitmask),
            as_flag("onchangeonly", onchangeonly),
        )

    def monitor_mov_to_msr(self, domid: int, msr: int, enable: bool, onchangeonly: bool) -> None:
        flags = as_flag("enable", enable), as_flag("onchangeonly", onchangeonly)
        self._call("xc_monitor_mov_to_msr", as_domid(domid), as_number("msr", msr), *flags)

    def monitor_singlestep(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_singlestep", as_domid(domid), as_flag("enable", enable))

    def monitor_software_breakpoint(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_software_breakpoint", as_domid(domid), as_flag("enable", enable))

    def monitor_descriptor_access(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_descriptor_access", as_domid(domid), as_flag("enable", enable))

    def monitor_guest_request(
        self, domid: int, enable: bool, sync: bool, allow_userspace: bool
    ) -> None:
        flags = as_flag("enable", enable), as_flag("sync", sync)
        userspace = as_flag("allow_userspace", allow_userspace)
        self._call("xc_monitor_guest_request", as_domid(domid), *flags, userspace)

    def monitor_inguest_pagefault(self, domid: int, disable: bool) -> None:
        self._call("xc_monitor_inguest_pagefault", as_domid(domid), as_flag("disable", disable))

    def monitor_debug_exceptions(self, domid: int, enable: bool, sync: bool) -> None:
        flags = as_flag("enable", enable), as_flag("sync", sync)
        self._call("xc_monitor_debug_exceptions", as_domid(domid), *flags)

    def monitor_cpuid(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_cpuid", as_domid(domid), as_flag("enable", enable))

    def monitor_privileged_call(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_privileged_call", as_domid(domid), as_flag("enable", enable))

    def monitor_emul_unimplemented(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_emul_unimplemented", as_domid(domid), as_flag("enable", enable))

    def monitor_vmexit(self, domid: int, enable: bool, sync: bool) -> None:
        flags = as_flag("enable", enable), as_flag("sync", sync)
        self._call("xc_monitor_vmexit", as_domid(domid), *flags)

    def monitor_io(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_io", as_domid(domid), as_flag("enable", enable))

    def monitor_emulate_each_rep(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_emulate_each_rep", as_domid(domid), as_flag("enable", enable))

    def monitor_control_registers(self, domid: int) -> None:
        """``XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS``; whatever the library's release."""
        values = {
            "cmd": constant("XEN_DOMCTL_monitor_op"),
            "interface_version": self._release.domctl_version,
            "domain": as_domid(domid),
            "u.monitor_op.op": constant("XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS"),
        }
        asked = layouts.DOMCTL.filled(values)
        self._hypercall("monitor_control_registers", domid, ("__HYPERVISOR_domctl",), asked)
