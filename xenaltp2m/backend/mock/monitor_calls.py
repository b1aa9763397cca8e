# SPDX-License-Identifier: LGPL-2.1-or-later
"""The monitor's calls of the modelled host: its ring, and which events it reports."""

from __future__ import annotations

from errno import EOPNOTSUPP

from xenaltp2m.backend.mock.calls import operation
from xenaltp2m.backend.mock.machine import HypercallError
from xenaltp2m.backend.mock.mapped_frames import MappedFrames
from xenaltp2m.backend.mock.monitor import Monitor


class MonitorCalls(MappedFrames):
    """The monitor's calls, with its mapped ring."""

    def _monitor(self, domid: int) -> Monitor:
        self._check_skew()
        return self._monitor_through_any_library(domid)

    def _monitor_through_any_library(self, domid: int) -> Monitor:
        self.machine.controlled(domid)
        if not self.machine.vm_event:
            raise HypercallError(EOPNOTSUPP)
        return self._monitor_of(domid)

    @operation
    def monitor_enable(self, domid: int) -> tuple[int, memoryview]:
        monitor = self._monitor(domid)
        mapping = self._map([monitor.enable()], writable=True)
        self._mappings[id(mapping.whole)] = mapping, monitor.domain
        return monitor.port, mapping.whole

    @operation
    def monitor_unmap_ring(self, ring: memoryview) -> None:
        self._unmap("monitor_unmap_ring", ring)

    @operation
    def monitor_disable(self, domid: int) -> None:
        self._monitor(domid).disable()
        self._go_on(domid)

    @operation
    def monitor_resume(self, domid: int) -> None:
        self._monitor(domid).resume()
        self._go_on(domid)

    @operation
    def monitor_get_capabilities(self, domid: int) -> int:
        return self._monitor(domid).capabilities()

    @operation
    def monitor_write_ctrlreg(
        self, domid: int, index: int, enable: bool, sync: bool, bitmask: int, onchangeonly: bool
    ) -> None:
        self._monitor(domid).switch_ctrlreg(
            index, enable, sync=sync, bitmask=bitmask, onchangeonly=onchangeonly
        )

    @operation
    def monitor_mov_to_msr(self, domid: int, msr: int, enable: bool, onchangeonly: bool) -> None:
        self._monitor(domid).switch_msr(msr, enable, onchangeonly=onchangeonly)

    @operation
    def monitor_singlestep(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("singlestep", enable)

    @operation
    def monitor_software_breakpoint(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("software_breakpoint", enable)

    @operation
    def monitor_descriptor_access(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("descriptor_access", enable)

    @operation
    def monitor_guest_request(
        self, domid: int, enable: bool, sync: bool, allow_userspace: bool
    ) -> None:
        self._monitor(domid).switch(
            "guest_request", enable, sync=sync, allow_userspace=allow_userspace
        )

    @operation
    def monitor_inguest_pagefault(self, domid: int, disable: bool) -> None:
        self._monitor(domid).switch("inguest_pagefault", disable)

    @operation
    def monitor_debug_exceptions(self, domid: int, enable: bool, sync: bool) -> None:
        self._monitor(domid).switch("debug_exceptions", enable, sync=sync)

    @operation
    def monitor_cpuid(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("cpuid", enable)

    @operation
    def monitor_privileged_call(self, domid: int, enable: bool) -> None:
        del enable
        self._monitor(domid)
        raise HypercallError(EOPNOTSUPP)  # not among x86's capabilities, either way

    @operation
    def monitor_emul_unimplemented(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("emul_unimplemented", enable)

    @operation
    def monitor_vmexit(self, domid: int, enable: bool, sync: bool) -> None:
        self._require("monitor_vmexit")
        self._monitor(domid).switch("vmexit", enable, sync=sync)

    @operation
    def monitor_io(self, domid: int, enable: bool) -> None:
        self._require("monitor_io")
        self._monitor(domid).switch("io", enable)

    @operation
    def monitor_emulate_each_rep(self, domid: int, enable: bool) -> None:
        self._monitor(domid).emulate_each_rep(enable)

    @operation
    def monitor_control_registers(self, domid: int) -> None:
        self._monitor_through_any_library(domid).gates_writes = True
