# SPDX-License-Identifier: LGPL-2.1-or-later
"""The seam: one Protocol of plain ints and bytes that the real and the mock hypervisor speak.

Methods bear the C names without ``xc_``. A backend neither interprets nor remembers: it passes
arguments on, and turns a failed call into an :class:`~xenaltp2m.errors.XenError` with its errno.
Access arguments and results are ``xenmem_access_t`` numbers *of the running release*
(:attr:`xenaltp2m.abi.releases.Release.access_numbers`), so that a number Xen would refuse can
be put to Xen. A domid, view or gfn that C would truncate is an
:class:`~xenaltp2m.errors.InvalidArgumentError` before C sees it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from xenaltp2m.abi.releases import Release
from xenaltp2m.backend.clock import Clock
from xenaltp2m.types import DomainInfo, MemoryType, PodTarget, VcpuInfo

Bytes: TypeAlias = "bytes | bytearray | memoryview"
"""Bytes that are only read."""
Gfns: TypeAlias = "array[int] | memoryview"
"""Native unsigned 64-bit integers: ``array("Q", ...)`` or a memoryview of format ``Q``."""


class PortCalls(NamedTuple):
    """An event channel's port as three calls without arguments."""

    pending: Callable[[], object]
    """Waits until it fires, and takes that; raises OSError on failure."""
    unmask: Callable[[], object]
    """Lets it fire again; raises OSError on failure."""
    notify: Callable[[], int]
    """Signals the other end; negative on failure, where the method of that name tells why."""


class Backend(Protocol):
    """Everything handles ask of a hypervisor.

    Errors raised by every method: :class:`~xenaltp2m.errors.XenError` for a refusal by Xen,
    :class:`~xenaltp2m.errors.UnsupportedError` where the library lacks the function,
    :class:`~xenaltp2m.errors.ClosedError` after :meth:`close` or in a forked child.
    """

    @property
    def name(self) -> str:
        """``"libxc"``, ``"mock"`` or ``"replay"``."""

    @property
    def release(self) -> Release:
        """The running hypervisor's release."""

    @property
    def clock(self) -> Clock:
        """The time that decisions go by, which a replay has from its recording."""

    def supports(self, function: str) -> bool:
        """Tell whether C's ``function``, by its whole name, can be called: its library has it."""

    def close(self) -> None:
        """Give back every library handle; again is harmless."""

    # The host.

    def xen_extraversion(self) -> str:
        """``xc_version(XENVER_extraversion)``: what follows major.minor, such as ``.7``."""

    def xen_commandline(self) -> str:
        """``xc_version(XENVER_commandline)``: the hypervisor's boot options."""

    def vm_event_get_version(self) -> int:
        """``xc_vm_event_get_version``: the hypervisor's event interface version."""

    # Domains.

    def domain_getinfolist(self, first_domid: int, limit: int) -> list[DomainInfo]:
        """``xc_domain_getinfolist``: up to ``limit`` domains from ``first_domid`` on, by domid."""

    def name_to_domid(self, name: str) -> int | None:
        """The domid of a name, or None, found as ``libxl_name_to_domid`` does.

        Raises:
            InvalidArgumentError: Several domains have it.
        """

    def domid_to_name(self, domid: int) -> str | None:
        """A domain's name in xenstore, or None: the read ``libxl_domid_to_name`` makes."""

    def domain_config_json(self, domid: int) -> str:
        """``libxl_userdata_retrieve`` of ``libxl-json``: the configuration, a JSON object."""

    def xs_read(self, path: str) -> bytes | None:
        """``xs_read``: what xenstore has at a path, or None where it has nothing."""

    def domain_pause(self, domid: int) -> None:
        """``xc_domain_pause``: add one to the domain's pause count."""

    def domain_unpause(self, domid: int) -> None:
        """``xc_domain_unpause``: take one from the domain's pause count."""

    def domain_maximum_gpfn(self, domid: int) -> int:
        """``xc_domain_maximum_gpfn``: the highest gfn ever mapped in the host p2m."""

    def domain_get_pod_target(self, domid: int) -> PodTarget:
        """``xc_domain_get_pod_target``: how much of the domain is populated on demand.

        With a library up to 4.16 every refusal is EPERM.
        """

    def hvm_get_mem_type(self, domid: int, gfn: int) -> MemoryType:
        """``HVMOP_get_mem_type``, for which libxenctrl has no function: changes nothing."""

    def domain_setmaxmem(self, domid: int, max_kib: int) -> None:
        """``xc_domain_setmaxmem``: bound the domain's memory, in KiB."""

    def domain_populate_physmap_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        """``xc_domain_populate_physmap_exact``: give the domain 2^order pages at each gfn."""

    def domain_decrease_reservation_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        """``xc_domain_decrease_reservation_exact``: take back 2^order pages at each gfn."""

    def hvm_param_get(self, domid: int, param: int) -> int:
        """``xc_hvm_param_get``."""

    def hvm_param_set(self, domid: int, param: int, value: int) -> None:
        """``xc_hvm_param_set``."""

    def domain_hvm_getcontext(self, domid: int) -> bytes:
        """``xc_domain_hvm_getcontext``: the whole HVM save stream."""

    def domain_hvm_getcontext_partial(self, domid: int, typecode: int, instance: int) -> bytes:
        """``xc_domain_hvm_getcontext_partial``: one record, such as a vCPU's registers."""

    def domain_hvm_setcontext(self, domid: int, stream: Bytes) -> None:
        """``xc_domain_hvm_setcontext``: load a whole HVM save stream."""

    def domain_debug_control(self, domid: int, op: int, vcpu: int) -> None:
        """``xc_domain_debug_control``: such as single-step on or off for one vCPU."""

    def vcpu_getinfo(self, domid: int, vcpu: int) -> VcpuInfo:
        """``xc_vcpu_getinfo``: whether a vCPU runs, and how long it has."""

    def hvm_inject_trap(
        self, domid: int, vcpu: int, vector: int, kind: int, error_code: int, length: int, cr2: int
    ) -> None:
        """``xc_hvm_inject_trap``: an exception or interrupt for when the vCPU runs next.

        ``kind`` is ``X86_EVENTTYPE_*``, ``length`` the instruction's, ``error_code`` ~0 for none.
        """

    def get_paging_mempool_size(self, domid: int) -> int:
        """``xc_get_paging_mempool_size`` (4.17): the p2m pool, in bytes."""

    def set_paging_mempool_size(self, domid: int, size: int) -> None:
        """``xc_set_paging_mempool_size`` (4.17): resize the p2m pool, in bytes."""

    def shadow_get_allocation(self, domid: int) -> int:
        """``xc_shadow_control`` with ``GET_ALLOCATION``: the p2m pool, in MiB, rounded up."""

    # Host memory access.

    def set_mem_access(self, domid: int, access: int, first_gfn: int, count: int) -> None:
        """``xc_set_mem_access``: ``count`` gfns of the host p2m; ``~0`` sets its default."""

    def set_mem_access_multi(self, domid: int, accesses: Bytes, gfns: Gfns) -> None:
        """``xc_set_mem_access_multi``: one access byte for each gfn of the host p2m."""

    def get_mem_access(self, domid: int, gfn: int) -> int:
        """``xc_get_mem_access``: a gfn's access in the host p2m; ``~0`` asks for its default."""

    def domain_set_access_required(self, domid: int, required: bool) -> None:
        """``xc_domain_set_access_required``: crash the domain on a violation without a listener."""

    # altp2m.

    def altp2m_get_domain_state(self, domid: int) -> bool:
        """``xc_altp2m_get_domain_state``."""

    def altp2m_set_domain_state(self, domid: int, state: bool) -> None:
        """``xc_altp2m_set_domain_state``."""

    def altp2m_set_vcpu_enable_notify(self, domid: int, vcpu: int, gfn: int) -> None:
        """``xc_altp2m_set_vcpu_enable_notify``: name a vCPU's #VE information page."""

    def altp2m_set_vcpu_disable_notify(self, domid: int, vcpu: int) -> None:
        """``xc_altp2m_set_vcpu_disable_notify``."""

    def altp2m_create_view(self, domid: int, default_access: int) -> int:
        """``xc_altp2m_create_view``: the new view's number."""

    def altp2m_destroy_view(self, domid: int, view: int) -> None:
        """``xc_altp2m_destroy_view``."""

    def altp2m_switch_to_view(self, domid: int, view: int) -> None:
        """``xc_altp2m_switch_to_view``: move every vCPU."""

    def altp2m_set_mem_access(self, domid: int, view: int, gfn: int, access: int) -> None:
        """``xc_altp2m_set_mem_access``."""

    def altp2m_set_mem_access_multi(
        self, domid: int, view: int, accesses: Bytes, gfns: Gfns
    ) -> None:
        """``xc_altp2m_set_mem_access_multi``: one access byte for each gfn."""

    def altp2m_get_mem_access(self, domid: int, view: int, gfn: int) -> int:
        """``xc_altp2m_get_mem_access``."""

    def altp2m_change_gfn(self, domid: int, view: int, old_gfn: int, new_gfn: int) -> None:
        """``xc_altp2m_change_gfn``: remap, or revert where ``new_gfn`` is ``~0``."""

    def altp2m_set_suppress_ve(self, domid: int, view: int, gfn: int, suppress: bool) -> None:
        """``xc_altp2m_set_suppress_ve``."""

    def altp2m_set_suppress_ve_multi(
        self, domid: int, view: int, first_gfn: int, last_gfn: int, suppress: bool
    ) -> tuple[int, int] | None:
        """``xc_altp2m_set_supress_ve_multi`` (so spelt): first failure as (gfn, errno), or None."""

    def altp2m_get_suppress_ve(self, domid: int, view: int, gfn: int) -> bool:
        """``xc_altp2m_get_suppress_ve``."""

    def altp2m_get_vcpu_p2m_idx(self, domid: int, vcpu: int) -> int:
        """``xc_altp2m_get_vcpu_p2m_idx``: the view a vCPU is in."""

    def altp2m_set_visibility(self, domid: int, view: int, visible: bool) -> None:
        """``xc_altp2m_set_visibility``."""

    # Monitor.

    def monitor_enable(self, domid: int) -> tuple[int, memoryview]:
        """``xc_monitor_enable``: (event channel port of the domain, the ring's page)."""

    def monitor_unmap_ring(self, ring: memoryview) -> None:
        """``munmap`` of the page that :meth:`monitor_enable` gave; the view is dead after it.

        Slices and casts of it must be released before (:class:`~xenaltp2m.errors.BusyError`).
        """

    def monitor_disable(self, domid: int) -> None:
        """``xc_monitor_disable``."""

    def monitor_resume(self, domid: int) -> None:
        """``xc_monitor_resume``: have Xen take the responses in the ring."""

    def monitor_get_capabilities(self, domid: int) -> int:
        """``xc_monitor_get_capabilities``: a bit for each event the hypervisor can send."""

    def monitor_write_ctrlreg(
        self, domid: int, index: int, enable: bool, sync: bool, bitmask: int, onchangeonly: bool
    ) -> None:
        """``xc_monitor_write_ctrlreg``."""

    def monitor_mov_to_msr(self, domid: int, msr: int, enable: bool, onchangeonly: bool) -> None:
        """``xc_monitor_mov_to_msr``."""

    def monitor_singlestep(self, domid: int, enable: bool) -> None:
        """``xc_monitor_singlestep``."""

    def monitor_software_breakpoint(self, domid: int, enable: bool) -> None:
        """``xc_monitor_software_breakpoint``."""

    def monitor_descriptor_access(self, domid: int, enable: bool) -> None:
        """``xc_monitor_descriptor_access``."""

    def monitor_guest_request(
        self, domid: int, enable: bool, sync: bool, allow_userspace: bool
    ) -> None:
        """``xc_monitor_guest_request``."""

    def monitor_inguest_pagefault(self, domid: int, disable: bool) -> None:
        """``xc_monitor_inguest_pagefault``: ``disable`` stops events for faults in page walks."""

    def monitor_debug_exceptions(self, domid: int, enable: bool, sync: bool) -> None:
        """``xc_monitor_debug_exceptions``."""

    def monitor_cpuid(self, domid: int, enable: bool) -> None:
        """``xc_monitor_cpuid``."""

    def monitor_privileged_call(self, domid: int, enable: bool) -> None:
        """``xc_monitor_privileged_call`` (Arm; EOPNOTSUPP on x86)."""

    def monitor_emul_unimplemented(self, domid: int, enable: bool) -> None:
        """``xc_monitor_emul_unimplemented``."""

    def monitor_vmexit(self, domid: int, enable: bool, sync: bool) -> None:
        """``xc_monitor_vmexit`` (4.17)."""

    def monitor_io(self, domid: int, enable: bool) -> None:
        """``xc_monitor_io`` (4.18)."""

    def monitor_emulate_each_rep(self, domid: int, enable: bool) -> None:
        """``xc_monitor_emulate_each_rep``."""

    def monitor_control_registers(self, domid: int) -> None:
        """``XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS``, for which libxenctrl has no function.

        Has Xen wait with register writes until the agent has answered; until
        :meth:`monitor_disable`.
        """

    # Event channels: a channel handle is an opaque int of this backend.

    def evtchn_open(self) -> int:
        """``xenevtchn_open``: a new handle."""

    def evtchn_close(self, channel: int) -> None:
        """``xenevtchn_close``: give a handle back, with everything bound to it."""

    def evtchn_fd(self, channel: int) -> int:
        """``xenevtchn_fd``: a file descriptor to poll for reading."""

    def evtchn_bind_interdomain(self, channel: int, domid: int, remote_port: int) -> int:
        """``xenevtchn_bind_interdomain``: the local port."""

    def evtchn_pending(self, channel: int) -> int:
        """``xenevtchn_pending``: the next port with an event; blocks, so poll the fd first."""

    def evtchn_unmask(self, channel: int, port: int) -> None:
        """``xenevtchn_unmask``: let the port fire again."""

    def evtchn_notify(self, channel: int, port: int) -> None:
        """``xenevtchn_notify``: Xen takes the responses of that ring before this returns."""

    def evtchn_calls(self, channel: int, port: int) -> PortCalls:
        """Return one port's ``evtchn_pending``, ``evtchn_unmask`` and ``evtchn_notify``.

        For a loop in which each microsecond counts; good until the channel is closed.
        """

    # Memory.

    def foreignmemory_map(
        self, domid: int, writable: bool, gfns: Sequence[int]
    ) -> list[memoryview]:
        """``xenforeignmemory_map``: a view of each gfn's page in the host p2m, all or none."""

    def foreignmemory_unmap(self, pages: list[memoryview]) -> None:
        """``xenforeignmemory_unmap``: takes the very list that the map call gave.

        Every view in it is released, so that a later touch is a ValueError, not a fault. Slices
        and casts must be released before (:class:`~xenaltp2m.errors.BusyError`).
        """
