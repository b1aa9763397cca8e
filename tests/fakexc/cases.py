# SPDX-License-Identifier: LGPL-2.1-or-later
"""For every C function the backend calls: how to make it call, and what must come of it.

The numbers are such that a lost bit, a swapped or a truncated argument shows.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xenaltp2m.backend.libxc import LibxcBackend

DOMID = 0x7EDC
VIEW = 0xFEDC
GFN = 0xFEDC_BA98_7654_3210
OTHER = 0x8000_0000_0000_0001
ALL = (1 << 64) - 1
VCPU = 0x8765_4321
PORT = 0xFEDC_BA98
WIDE = 0xF0E1_D2C3_B4A5_9687

ACCESSES = bytes(range(7))
GFNS = array("Q", [ALL, 0, GFN, OTHER, 1 << 63, 1, 0x1_0000_0000])
NR = len(GFNS)


@dataclass(frozen=True)
class Case:
    """One C function."""

    function: str
    call: Callable[[LibxcBackend], object]
    args: tuple[int, ...]
    """What C must see, without the handle."""
    result: int = 0
    """What C returns."""
    outs: tuple[int, int] = (0, 0)
    value: object = None
    """What the method must return."""
    data: bytes = b""
    """The arrays C must see."""
    about: tuple[tuple[str, int], ...] = (("domid", DOMID),)
    """What an error must carry besides op and errno."""
    op: str = ""

    @property
    def operation(self) -> str:
        return self.op or self.function.removeprefix("xc_").removeprefix("xen")

    def __str__(self) -> str:
        return self.function


def about(**context: int) -> tuple[tuple[str, int], ...]:
    return tuple({"domid": DOMID, **context}.items())


def on_channel(method: str, *args: Any) -> Callable[[LibxcBackend], object]:
    """A call on the only channel that is open: see test_calls."""
    return lambda backend: getattr(backend, method)(max(backend._channels), *args)


XENCTRL = [
    Case(
        "xc_vm_event_get_version",
        lambda b: b.vm_event_get_version(),
        (),
        result=7,
        value=7,
        about=(),
    ),
    Case("xc_domain_pause", lambda b: b.domain_pause(DOMID), (DOMID,)),
    Case("xc_domain_unpause", lambda b: b.domain_unpause(DOMID), (DOMID,)),
    Case(
        "xc_domain_maximum_gpfn",
        lambda b: b.domain_maximum_gpfn(DOMID),
        (DOMID,),
        outs=(GFN, 0),
        value=GFN,
    ),
    Case("xc_domain_setmaxmem", lambda b: b.domain_setmaxmem(DOMID, ALL), (DOMID, ALL)),
    Case(
        "xc_domain_populate_physmap_exact",
        lambda b: b.domain_populate_physmap_exact(DOMID, GFNS, order=9),
        (DOMID, NR, 9, 0),
        data=GFNS.tobytes(),
    ),
    Case(
        "xc_domain_decrease_reservation_exact",
        lambda b: b.domain_decrease_reservation_exact(DOMID, memoryview(GFNS)),
        (DOMID, NR, 0),
        data=GFNS.tobytes(),
    ),
    Case(
        "xc_hvm_param_get",
        lambda b: b.hvm_param_get(DOMID, 0xFEDC_BA98),
        (DOMID, 0xFEDC_BA98),
        outs=(WIDE, 0),
        value=WIDE,
    ),
    Case(
        "xc_hvm_param_set",
        lambda b: b.hvm_param_set(DOMID, 35, WIDE),
        (DOMID, 35, WIDE),
    ),
    Case(
        "xc_domain_hvm_setcontext",
        lambda b: b.domain_hvm_setcontext(DOMID, ACCESSES),
        (DOMID, 7),
        data=ACCESSES,
    ),
    Case(
        "xc_domain_debug_control",
        lambda b: b.domain_debug_control(DOMID, 0xFEDC_BA98, VCPU),
        (DOMID, 0xFEDC_BA98, VCPU),
        about=about(vcpu=VCPU),
    ),
    Case(
        "xc_hvm_inject_trap",
        lambda b: b.hvm_inject_trap(DOMID, VCPU, 0xFE, 0xDC, 0xFFFF_FFFF, 0xBA, WIDE),
        (DOMID, VCPU, 0xFE, 0xDC, 0xFFFF_FFFF, 0xBA, WIDE),
        about=about(vcpu=VCPU),
    ),
    Case(
        "xc_get_paging_mempool_size",
        lambda b: b.get_paging_mempool_size(DOMID),
        (DOMID,),
        outs=(WIDE, 0),
        value=WIDE,
    ),
    Case(
        "xc_set_paging_mempool_size",
        lambda b: b.set_paging_mempool_size(DOMID, WIDE),
        (DOMID, WIDE),
    ),
    Case(
        "xc_shadow_control",
        lambda b: b.shadow_get_allocation(DOMID),
        (DOMID, 30, 1, 0),
        outs=(0xFEDC_BA98, 0),
        value=0xFEDC_BA98,
        op="shadow_get_allocation",
    ),
    Case(
        "xc_set_mem_access",
        lambda b: b.set_mem_access(DOMID, 0xFE, ALL, 0xFEDC_BA98),
        (DOMID, 0xFE, ALL, 0xFEDC_BA98),
        about=about(gfn=ALL),
    ),
    Case(
        "xc_set_mem_access_multi",
        lambda b: b.set_mem_access_multi(DOMID, ACCESSES, GFNS),
        (DOMID, NR),
        data=ACCESSES + GFNS.tobytes(),
    ),
    Case(
        "xc_get_mem_access",
        lambda b: b.get_mem_access(DOMID, GFN),
        (DOMID, GFN),
        outs=(0x8000_0005, 0),
        value=0x8000_0005,
        about=about(gfn=GFN),
    ),
    Case(
        "xc_domain_set_access_required",
        lambda b: b.domain_set_access_required(DOMID, True),
        (DOMID, 1),
    ),
    Case(
        "xc_altp2m_get_domain_state",
        lambda b: b.altp2m_get_domain_state(DOMID),
        (DOMID,),
        outs=(1, 0),
        value=True,
    ),
    Case(
        "xc_altp2m_set_domain_state",
        lambda b: b.altp2m_set_domain_state(DOMID, True),
        (DOMID, 1),
    ),
    Case(
        "xc_altp2m_set_vcpu_enable_notify",
        lambda b: b.altp2m_set_vcpu_enable_notify(DOMID, VCPU, GFN),
        (DOMID, VCPU, GFN),
        about=about(vcpu=VCPU, gfn=GFN),
    ),
    Case(
        "xc_altp2m_set_vcpu_disable_notify",
        lambda b: b.altp2m_set_vcpu_disable_notify(DOMID, VCPU),
        (DOMID, VCPU),
        about=about(vcpu=VCPU),
    ),
    Case(
        "xc_altp2m_create_view",
        lambda b: b.altp2m_create_view(DOMID, 0xFEDC),
        (DOMID, 0xFEDC),
        outs=(VIEW, 0),
        value=VIEW,
    ),
    Case(
        "xc_altp2m_destroy_view",
        lambda b: b.altp2m_destroy_view(DOMID, VIEW),
        (DOMID, VIEW),
        about=about(view=VIEW),
    ),
    Case(
        "xc_altp2m_switch_to_view",
        lambda b: b.altp2m_switch_to_view(DOMID, VIEW),
        (DOMID, VIEW),
        about=about(view=VIEW),
    ),
    Case(
        "xc_altp2m_set_mem_access",
        lambda b: b.altp2m_set_mem_access(DOMID, VIEW, ALL, 0xFEDC),
        (DOMID, VIEW, ALL, 0xFEDC),
        about=about(view=VIEW, gfn=ALL),
    ),
    Case(
        "xc_altp2m_set_mem_access_multi",
        lambda b: b.altp2m_set_mem_access_multi(DOMID, VIEW, ACCESSES, GFNS),
        (DOMID, VIEW, NR),
        data=ACCESSES + GFNS.tobytes(),
        about=about(view=VIEW),
    ),
    Case(
        "xc_altp2m_get_mem_access",
        lambda b: b.altp2m_get_mem_access(DOMID, VIEW, GFN),
        (DOMID, VIEW, GFN),
        outs=(0x8000_0005, 0),
        value=0x8000_0005,
        about=about(view=VIEW, gfn=GFN),
    ),
    Case(
        "xc_altp2m_change_gfn",
        lambda b: b.altp2m_change_gfn(DOMID, VIEW, GFN, ALL),
        (DOMID, VIEW, GFN, ALL),
        about=about(view=VIEW, gfn=GFN),
    ),
    Case(
        "xc_altp2m_set_suppress_ve",
        lambda b: b.altp2m_set_suppress_ve(DOMID, VIEW, GFN, True),
        (DOMID, VIEW, GFN, 1),
        about=about(view=VIEW, gfn=GFN),
    ),
    Case(
        "xc_altp2m_set_supress_ve_multi",
        lambda b: b.altp2m_set_suppress_ve_multi(DOMID, VIEW, GFN, ALL, True),
        (DOMID, VIEW, GFN, ALL, 1),
        outs=(OTHER, -3),
        value=(OTHER, 3),
        about=about(view=VIEW, gfn=GFN),
        op="altp2m_set_suppress_ve_multi",
    ),
    Case(
        "xc_altp2m_get_suppress_ve",
        lambda b: b.altp2m_get_suppress_ve(DOMID, VIEW, GFN),
        (DOMID, VIEW, GFN),
        outs=(1, 0),
        value=True,
        about=about(view=VIEW, gfn=GFN),
    ),
    Case(
        "xc_altp2m_get_vcpu_p2m_idx",
        lambda b: b.altp2m_get_vcpu_p2m_idx(DOMID, VCPU),
        (DOMID, VCPU),
        outs=(VIEW, 0),
        value=VIEW,
        about=about(vcpu=VCPU),
    ),
    Case(
        "xc_altp2m_set_visibility",
        lambda b: b.altp2m_set_visibility(DOMID, VIEW, True),
        (DOMID, VIEW, 1),
        about=about(view=VIEW),
    ),
    Case("xc_monitor_disable", lambda b: b.monitor_disable(DOMID), (DOMID,)),
    Case("xc_monitor_resume", lambda b: b.monitor_resume(DOMID), (DOMID,)),
    Case(
        "xc_monitor_get_capabilities",
        lambda b: b.monitor_get_capabilities(DOMID),
        (DOMID,),
        outs=(0xFEDC_BA98, 0),
        value=0xFEDC_BA98,
    ),
    # Each flag differs from its neighbours in one of two calls, so that no swap goes unseen.
    Case(
        "xc_monitor_write_ctrlreg",
        lambda b: b.monitor_write_ctrlreg(DOMID, 0xFE, True, False, WIDE, True),
        (DOMID, 0xFE, 1, 0, WIDE, 1),
    ),
    Case(
        "xc_monitor_write_ctrlreg",
        lambda b: b.monitor_write_ctrlreg(DOMID, 0xFE, False, True, WIDE, True),
        (DOMID, 0xFE, 0, 1, WIDE, 1),
    ),
    Case(
        "xc_monitor_mov_to_msr",
        lambda b: b.monitor_mov_to_msr(DOMID, 0xFEDC_BA98, True, False),
        (DOMID, 0xFEDC_BA98, 1, 0),
    ),
    Case("xc_monitor_singlestep", lambda b: b.monitor_singlestep(DOMID, True), (DOMID, 1)),
    Case(
        "xc_monitor_software_breakpoint",
        lambda b: b.monitor_software_breakpoint(DOMID, True),
        (DOMID, 1),
    ),
    Case(
        "xc_monitor_descriptor_access",
        lambda b: b.monitor_descriptor_access(DOMID, True),
        (DOMID, 1),
    ),
    Case(
        "xc_monitor_guest_request",
        lambda b: b.monitor_guest_request(DOMID, True, False, False),
        (DOMID, 1, 0, 0),
    ),
    Case(
        "xc_monitor_guest_request",
        lambda b: b.monitor_guest_request(DOMID, False, True, False),
        (DOMID, 0, 1, 0),
    ),
    Case(
        "xc_monitor_inguest_pagefault",
        lambda b: b.monitor_inguest_pagefault(DOMID, True),
        (DOMID, 1),
    ),
    Case(
        "xc_monitor_debug_exceptions",
        lambda b: b.monitor_debug_exceptions(DOMID, True, False),
        (DOMID, 1, 0),
    ),
    Case("xc_monitor_cpuid", lambda b: b.monitor_cpuid(DOMID, True), (DOMID, 1)),
    Case(
        "xc_monitor_privileged_call",
        lambda b: b.monitor_privileged_call(DOMID, True),
        (DOMID, 1),
    ),
    Case(
        "xc_monitor_emul_unimplemented",
        lambda b: b.monitor_emul_unimplemented(DOMID, True),
        (DOMID, 1),
    ),
    Case("xc_monitor_vmexit", lambda b: b.monitor_vmexit(DOMID, True, False), (DOMID, 1, 0)),
    Case("xc_monitor_io", lambda b: b.monitor_io(DOMID, True), (DOMID, 1)),
    Case(
        "xc_monitor_emulate_each_rep",
        lambda b: b.monitor_emulate_each_rep(DOMID, True),
        (DOMID, 1),
    ),
]

EVTCHN = [
    Case("xenevtchn_fd", on_channel("evtchn_fd"), (), result=57, value=57, about=()),
    Case(
        "xenevtchn_bind_interdomain",
        on_channel("evtchn_bind_interdomain", DOMID, PORT),
        (DOMID, PORT),
        result=0x7EDC_BA98,
        value=0x7EDC_BA98,
    ),
    Case("xenevtchn_pending", on_channel("evtchn_pending"), (), result=43, value=43, about=()),
    Case("xenevtchn_unmask", on_channel("evtchn_unmask", PORT), (PORT,), about=()),
    Case("xenevtchn_notify", on_channel("evtchn_notify", PORT), (PORT,), about=()),
    Case("xenevtchn_close", on_channel("evtchn_close"), (), about=()),
]

CASES = XENCTRL + EVTCHN

ELSEWHERE = {
    "xc_interface_open",
    "xc_interface_close",
    "xc_version",
    "xc_domain_getinfolist",
    "xc_domain_hvm_getcontext",
    "xc_domain_hvm_getcontext_partial",
    "xc_vcpu_getinfo",
    "xc_domain_get_pod_target",
    "xc_logdirty_control",
    "xc_monitor_enable",
    "xencall_open",
    "xencall_close",
    "xencall_alloc_buffer",
    "xencall_free_buffer",
    "xencall1",
    "xencall2",
    "xenevtchn_open",
    "xenforeignmemory_open",
    "xenforeignmemory_close",
    "xenforeignmemory_map",
    "xenforeignmemory_unmap",
    "xs_open",
    "xs_close",
    "xs_read",
    "xtl_createlogger_stdiostream",
    "xtl_logger_destroy",
    "libxl_ctx_alloc",
    "libxl_ctx_free",
    "libxl_userdata_retrieve",
}
"""Functions whose shape is their own: the other test files have them by name."""
