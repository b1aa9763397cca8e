# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Backend Protocol over the model of a host: each operation answers as the release does."""

from __future__ import annotations

import functools
import json
import math
import struct
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import (
    EACCES,
    EBADF,
    EBUSY,
    EINVAL,
    ENODATA,
    ENODEV,
    ENOENT,
    ENOSYS,
    ENOTCONN,
    EOPNOTSUPP,
    EPERM,
)
from random import Random
from typing import Concatenate, ParamSpec, TypeVar

from xenaltp2m import errors
from xenaltp2m.abi import layouts, releases
from xenaltp2m.abi.releases import Release
from xenaltp2m.abi.x86 import CR0_ET, CR0_PE, CR0_PG
from xenaltp2m.backend import Bytes, Gfns, PortCalls, arguments
from xenaltp2m.backend.clock import CLOCK, Clock
from xenaltp2m.backend.mapping import Mapping
from xenaltp2m.backend.mock.evtchn import Channel, Port
from xenaltp2m.backend.mock.machine import Domain, Machine, Refused
from xenaltp2m.backend.mock.monitor import Monitor
from xenaltp2m.backend.mock.p2m import ANY_RAM_TYPES
from xenaltp2m.backend.mock.processor import Processor, run
from xenaltp2m.backend.mock.script import Script
from xenaltp2m.backend.mock.vcpu import Trap
from xenaltp2m.types import (
    ALL_GFNS,
    PAGE_SIZE,
    Altp2mMode,
    DomainInfo,
    DomId,
    MemoryType,
    PodTarget,
    VcpuInfo,
)

_P = ParamSpec("_P")
_R = TypeVar("_R")

_MIB = 1 << 20
_LOG_LENGTH = 100_000
_LOGGED_ITEMS = 64
_MAX_PAGES = (1 << 32) - 1
_STEPS_AT_ONCE, _STEPS_OF_CODE_AT_ONCE, _TURNS_AT_ONCE = 256, 250_000, 256
_HEADER_TYPECODE = 1
_SAVE_HEADER = struct.pack("<IIQII", 0x54381286, 1, 0, 0x306C3, 2_000_000)
"""``struct hvm_save_header``: magic, version, changeset, cpuid, TSC's kHz."""
_ABOUT = {
    "domid": "domid",
    "view": "view",
    "vcpu": "vcpu",
    "gfn": "gfn",
    "old_gfn": "gfn",
    "first_gfn": "gfn",
}
"""Which parameters an error tells of, and as what."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that reached the hypervisor, as the log keeps it; ``errno`` 0 is success."""

    op: str
    arguments: tuple[object, ...]
    errno: int


@dataclass(slots=True)
class InjectedFault:
    """A failure to come: of the call that ends the countdown, of any operation where it is None."""

    op: str | None
    countdown: int
    errno: int


def _operation(
    method: Callable[Concatenate[ModelBackend, _P], _R],
) -> Callable[Concatenate[ModelBackend, _P], _R]:
    """Make a Protocol method: arguments checked, faults injected, call logged, refusals raised."""
    op = method.__name__
    parameters = arguments.Parameters(method)

    @functools.wraps(method)
    def call(self: ModelBackend, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        self._check_open()
        named = parameters.bind(args, kwargs)
        arguments.check(op, named)
        logged = tuple(map(_logged, named.values()))
        try:
            self._inject(op)
            result = method(self, *args, **kwargs)
        except Refused as refused:
            self.calls.append(Call(op, logged, refused.errno))
            about = {_ABOUT[key]: named[key] for key in _ABOUT if key in named}
            raise errors.from_errno(op, refused.errno, **about) from None
        self.calls.append(Call(op, logged, 0))
        return result

    return call


def _logged(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview | array):
        if len(value) > _LOGGED_ITEMS:
            return f"<{len(value)} items>"
        return tuple(value)
    return value


class ModelBackend:
    """A modelled host behind the Protocol. See :class:`xenaltp2m.backend.Backend`."""

    name = "mock"
    clock: Clock = CLOCK

    def __init__(self, machine: Machine, seed: int) -> None:
        """Answer for a host; ``seed`` is that of how vCPUs take turns."""
        self.machine = machine
        self.calls: deque[Call] = deque(maxlen=_LOG_LENGTH)
        self._faults: list[InjectedFault] = []
        self._chance = Random(seed)  # noqa: S311 - chance, not secrets
        self.steps_at_once: int | None = _STEPS_AT_ONCE
        self._monitors: dict[int, Monitor] = {}
        self._processors: dict[int, list[Processor]] = {}
        self._channels: dict[int, Channel] = {}
        self._mappings: dict[int, tuple[Mapping, Domain]] = {}
        self._closed = False

    @property
    def release(self) -> Release:
        """The modelled hypervisor's release."""
        return self.machine.release

    def supports(self, function: str) -> bool:
        """Tell whether the modelled library has ``function``."""
        return releases.since(function) <= self.machine.library.version

    def close(self) -> None:
        """Give everything back, whatever fails; the first failure has the others in its notes."""
        if self._closed:
            return
        self._closed = True
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        failures = []
        for key in [*self._mappings]:
            try:
                self._give_back("close", key)
            except errors.BusyError as error:
                failures.append(error)
        if failures:
            first, *others = failures
            for other in others:
                first.add_note(f"then: {other}")
            raise first

    def _check_open(self) -> None:
        if self._closed:
            raise errors.ClosedError("the backend is closed")

    def _inject(self, op: str) -> None:
        counting = [fault for fault in self._faults if fault.op in (None, op)]
        for fault in counting:
            fault.countdown -= 1
        due = [fault for fault in counting if not fault.countdown]
        if due:
            self._faults = [fault for fault in self._faults if fault.countdown]
            raise Refused(due[0].errno)

    def _check_skew(self) -> None:
        """Refuse a domctl from a library of another release."""
        if self.machine.library.domctl_version != self.release.domctl_version:
            raise Refused(EACCES)

    def _domctl(self, domid: int) -> Domain:
        """Return the domain of a domctl."""
        self._check_skew()
        return self.machine.controlled(domid)

    def _monitor(self, domid: int) -> Monitor:
        self._check_skew()
        return self._monitor_through_any_library(domid)

    def _monitor_through_any_library(self, domid: int) -> Monitor:
        self.machine.controlled(domid)
        if not self.machine.vm_event:
            raise Refused(EOPNOTSUPP)
        return self._monitor_of(domid)

    def _require(self, op: str) -> None:
        symbol = f"xc_{op}"
        if not self.supports(symbol):
            raise errors.missing_symbol(op, symbol, releases.since(symbol))

    @_operation
    def xen_extraversion(self) -> str:
        return ".0-mock"

    @_operation
    def xen_commandline(self) -> str:
        return "altp2m=1" if self.machine.altp2m_supported else ""

    @_operation
    def vm_event_get_version(self) -> int:
        self._check_skew()
        if not self.machine.vm_event:
            raise Refused(EOPNOTSUPP)
        return self.release.vm_event_version

    @_operation
    def domain_getinfolist(self, first_domid: int, limit: int) -> list[DomainInfo]:
        if self.machine.library.sysctl_version != self.release.sysctl_version:
            raise Refused(EACCES)
        if not self.machine.privileged:
            raise Refused(EPERM)
        found = sorted(domid for domid in self.machine.domains if domid >= first_domid)
        return [_info(self.machine.domains[domid]) for domid in found[:limit]]

    @_operation
    def name_to_domid(self, name: str) -> int | None:
        found = [
            domid
            for domid, domain in self.machine.domains.items()
            if domain.name == name and not domain.dying
        ]
        return arguments.only_domid(name, found)

    @_operation
    def domid_to_name(self, domid: int) -> str | None:
        domain = self.machine.domains.get(domid)
        return None if domain is None or domain.dying else domain.name

    @_operation
    def domain_config_json(self, domid: int) -> str:
        domain = self.machine.domain(domid)
        build: dict[str, object] = {
            "max_vcpus": len(domain.vcpus),
            "avail_vcpus": list(range(len(domain.vcpus))),
            "max_memkb": domain.max_kib,
            "target_memkb": domain.target_kib,
            f"type.{domain.kind}": {},
        }
        if domain.nested:
            build["nested_hvm"] = "True"
        if domain.mode:
            build["altp2m"] = Altp2mMode(domain.mode).name.lower()
            if self.release.view_count_is_setting:
                build["altp2m_count"] = len(domain.views)
        return json.dumps(
            {
                "c_info": {"type": domain.kind, "name": domain.name, "uuid": str(domain.uuid)},
                "b_info": build,
            }
        )

    @_operation
    def xs_read(self, path: str) -> bytes | None:
        for domain in self.machine.domains.values():
            if not domain.dying and (found := domain.store().get(path)) is not None:
                return found.encode()
        return None

    @_operation
    def domain_pause(self, domid: int) -> None:
        self._domctl(domid).pauses += 1

    @_operation
    def domain_unpause(self, domid: int) -> None:
        domain = self._domctl(domid)
        domain.unpause()
        if not domain.pauses:
            self._go_on(domid)

    @_operation
    def domain_maximum_gpfn(self, domid: int) -> int:
        return self.machine.controlled(domid).host.max_mapped

    @_operation
    def domain_get_pod_target(self, domid: int) -> PodTarget:
        told = self.machine.library.version >= (4, 17)  # xc_domain_pod_target
        try:
            domain = self.machine.controlled(domid)
        except Refused as refused:
            raise Refused(refused.errno if told else EPERM) from None
        if not domain.hvm and self.release.version >= (4, 17):
            raise Refused(EINVAL if told else EPERM)
        return PodTarget(domain.pages, 0, domain.pod_entries)

    @_operation
    def hvm_get_mem_type(self, domid: int, gfn: int) -> MemoryType:
        return self.machine.controlled(domid).mem_type(gfn)

    @_operation
    def domain_setmaxmem(self, domid: int, max_kib: int) -> None:
        self._domctl(domid).max_pages = min(max_kib // (PAGE_SIZE // 1024), _MAX_PAGES)

    @_operation
    def domain_populate_physmap_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        domain = self._own_memory(domid)
        if domain is None or not all(domain.add_page(gfn, order) for gfn in gfns):
            raise Refused(EBUSY)

    @_operation
    def domain_decrease_reservation_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        domain = self._own_memory(domid)
        pages = (gfn + offset for gfn in gfns for offset in range(1 << order))
        if domain is None or not all(domain.remove_page(gfn) for gfn in pages):
            raise Refused(EINVAL)

    def _own_memory(self, domid: int) -> Domain | None:
        """Whose memory a reservation call changes; Xen does nothing where it may not."""
        return self.machine.domains.get(domid) if self.machine.privileged else None

    @_operation
    def hvm_param_get(self, domid: int, param: int) -> int:
        return self.machine.controlled(domid).get_param(param)

    @_operation
    def hvm_param_set(self, domid: int, param: int, value: int) -> None:
        self.machine.controlled(domid).set_param(param, value)

    def _hvm_domctl(self, domid: int) -> Domain:
        domain = self._domctl(domid)
        if not domain.hvm:
            raise Refused(EINVAL)
        return domain

    @_operation
    def domain_hvm_getcontext(self, domid: int) -> bytes:
        domain = self._hvm_domctl(domid)
        records = [_record(_HEADER_TYPECODE, 0, _SAVE_HEADER)]
        records += [
            _record(layouts.HVM_CPU_TYPECODE, vcpu.number, bytes(vcpu.context))
            for vcpu in domain.vcpus
            if vcpu.online  # hvm_save_cpu_ctxt passes the others
        ]
        return b"".join(records) + _record(0, 0, b"")

    @_operation
    def domain_hvm_getcontext_partial(self, domid: int, typecode: int, instance: int) -> bytes:
        domain = self._hvm_domctl(domid)
        if domain.dying or typecode != layouts.HVM_CPU_TYPECODE:
            raise Refused(EINVAL)  # the header, too, has no handler of its own (hvm_save_one)
        if instance >= len(domain.vcpus):
            raise Refused(ENOENT)
        if not domain.vcpus[instance].online:
            raise Refused(ENODATA)
        return bytes(domain.vcpus[instance].context)

    @_operation
    def domain_hvm_setcontext(self, domid: int, stream: Bytes) -> None:
        domain = self._hvm_domctl(domid)
        contexts: dict[int, bytes] = {}
        rest = bytes(stream)
        head = layouts.HVM_DESCRIPTOR
        if not rest.startswith(_record(_HEADER_TYPECODE, 0, _SAVE_HEADER)):
            raise Refused(ENODATA)  # hvm_load: it comes first
        while True:
            if len(rest) < head.size:
                raise Refused(ENODATA)  # hvm_load: there was no end marker
            kind, number, length = (
                head.number(rest, name) for name in ("typecode", "instance", "length")
            )
            body, rest = rest[head.size : head.size + length], rest[head.size + length :]
            if not kind:
                break
            if kind == layouts.HVM_CPU_TYPECODE:
                if number >= len(domain.vcpus) or len(body) != layouts.HVM_CPU.size:
                    raise Refused(EINVAL)
                contexts[number] = body
        for vcpu in domain.vcpus:
            vcpu.online = False  # hvm_load: until its record is loaded
        for number, body in contexts.items():
            cr0 = layouts.HVM_CPU.number(body, "cr0")
            if cr0 >> 32 or not cr0 & CR0_ET or cr0 & (CR0_PG | CR0_PE) == CR0_PG:
                raise Refused(EINVAL)  # hvm_load_cpu_ctxt
            domain.vcpus[number].context[:] = body
            domain.vcpus[number].online = True

    @_operation
    def domain_debug_control(self, domid: int, op: int, vcpu: int) -> None:
        domain = self._domctl(domid)
        target = domain.vcpu(vcpu)
        if not domain.hvm:
            raise Refused(EINVAL)
        if op not in (0, 1):  # XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF, _ON
            raise Refused(ENOSYS)
        target.single_step = op == 1
        if not op and self.release.version >= (4, 17):  # 897def94b5, in 4.17.4 and 4.18.1, too
            target.fast_step_view = None

    @_operation
    def vcpu_getinfo(self, domid: int, vcpu: int) -> VcpuInfo:
        domain = self._domctl(domid)
        if self.release.version >= (4, 22) and vcpu >= len(domain.vcpus):
            raise Refused(ENOENT)
        target = domain.vcpu(vcpu)
        processors = self._processors_of(domid)
        idle = processors[vcpu].idle
        info = VcpuInfo(
            online=target.online,
            blocked=target.halted or idle,
            running=domain.runs(target) and not idle,
            cpu_time=target.cpu_time,
        )
        # Time passes for those who wait for it to pass.
        run(processors, len(processors), self._chance)
        return info

    @_operation
    def hvm_inject_trap(
        self, domid: int, vcpu: int, vector: int, kind: int, error_code: int, length: int, cr2: int
    ) -> None:
        domain = self.machine.domain(domid)
        if not domain.hvm:
            raise Refused(EINVAL)
        if not self.machine.privileged:
            raise Refused(EPERM)
        target = domain.vcpu(vcpu)
        if target.injected is not None:
            raise Refused(EBUSY)
        target.injected = Trap(vector, kind, error_code, length, cr2)

    @_operation
    def get_paging_mempool_size(self, domid: int) -> int:
        self._require("get_paging_mempool_size")
        return self._domctl(domid).pool.pages * PAGE_SIZE

    @_operation
    def set_paging_mempool_size(self, domid: int, size: int) -> None:
        self._require("set_paging_mempool_size")
        pool = self._domctl(domid).pool
        if size % PAGE_SIZE:
            raise Refused(EINVAL)
        pool.pages = max(size // PAGE_SIZE, pool.used)

    @_operation
    def shadow_get_allocation(self, domid: int) -> int:
        return -(-self._domctl(domid).pool.pages * PAGE_SIZE // _MIB)

    @_operation
    def set_mem_access(self, domid: int, access: int, first_gfn: int, count: int) -> None:
        domain = self._memory_event_domain(domid)
        if first_gfn == ALL_GFNS:
            domain.set_mem_access(0, first_gfn, access)
            return
        if not count or first_gfn + count - 1 > domain.host.max_mapped:
            raise Refused(EINVAL)
        for gfn in range(first_gfn, first_gfn + count):
            domain.set_mem_access(0, gfn, access)

    @_operation
    def set_mem_access_multi(self, domid: int, accesses: Bytes, gfns: Gfns) -> None:
        self._memory_event_domain(domid).set_mem_access_multi(0, bytes(accesses), gfns)

    @_operation
    def get_mem_access(self, domid: int, gfn: int) -> int:
        domain = self._memory_event_domain(domid)
        if domain.host.max_mapped < gfn < ALL_GFNS:
            raise Refused(EINVAL)
        return domain.get_mem_access(0, gfn)

    def _memory_event_domain(self, domid: int) -> Domain:
        """``mem_access_memop``: needs a monitor's ring, unlike the altp2m calls."""
        domain = self.machine.domain(domid)
        if not self.machine.vm_event:
            raise Refused(ENOSYS)
        if not domain.hvm:
            raise Refused(EINVAL)
        if not self.machine.privileged:
            raise Refused(EPERM)
        if not domain.listened:
            raise Refused(ENODEV)
        return domain

    @_operation
    def domain_set_access_required(self, domid: int, required: bool) -> None:
        domain = self._domctl(domid)
        if not self.machine.vm_event:
            raise Refused(ENOSYS)
        domain.access_required = required
        if domain.active:
            for view in domain.views:
                view.access_required = required

    @_operation
    def altp2m_get_domain_state(self, domid: int) -> bool:
        return self.machine.altp2m(domid, needs_active=False).active

    @_operation
    def altp2m_set_domain_state(self, domid: int, state: bool) -> None:
        self.machine.altp2m(domid, needs_active=False).set_active(state)

    @_operation
    def altp2m_set_vcpu_enable_notify(self, domid: int, vcpu: int, gfn: int) -> None:
        self.machine.altp2m(domid).enable_notify(vcpu, gfn)

    @_operation
    def altp2m_set_vcpu_disable_notify(self, domid: int, vcpu: int) -> None:
        self.machine.altp2m(domid).disable_notify(vcpu)

    @_operation
    def altp2m_create_view(self, domid: int, default_access: int) -> int:
        return self.machine.altp2m(domid).create_view(default_access)

    @_operation
    def altp2m_destroy_view(self, domid: int, view: int) -> None:
        self.machine.altp2m(domid).destroy_view(view)

    @_operation
    def altp2m_switch_to_view(self, domid: int, view: int) -> None:
        self.machine.altp2m(domid).switch_to_view(view)

    @_operation
    def altp2m_set_mem_access(self, domid: int, view: int, gfn: int, access: int) -> None:
        self._access_altp2m(domid).set_mem_access(view, gfn, access)

    @_operation
    def altp2m_set_mem_access_multi(
        self, domid: int, view: int, accesses: Bytes, gfns: Gfns
    ) -> None:
        self._access_altp2m(domid).set_mem_access_multi(view, bytes(accesses), gfns)

    @_operation
    def altp2m_get_mem_access(self, domid: int, view: int, gfn: int) -> int:
        return self._access_altp2m(domid).get_mem_access(view, gfn)

    def _access_altp2m(self, domid: int) -> Domain:
        """The gate of the access calls, which 4.22 may be built without."""
        domain = self.machine.altp2m(domid)
        if not self.machine.vm_event:
            raise Refused(EOPNOTSUPP)
        return domain

    @_operation
    def altp2m_change_gfn(self, domid: int, view: int, old_gfn: int, new_gfn: int) -> None:
        self.machine.altp2m(domid).change_gfn(view, old_gfn, new_gfn)

    @_operation
    def altp2m_set_suppress_ve(self, domid: int, view: int, gfn: int, suppress: bool) -> None:
        arguments.refuse_livelock("altp2m_set_suppress_ve", gfn)
        self.machine.altp2m(domid).set_suppress_ve(view, gfn, suppress)

    @_operation
    def altp2m_set_suppress_ve_multi(
        self, domid: int, view: int, first_gfn: int, last_gfn: int, suppress: bool
    ) -> tuple[int, int] | None:
        domain = self.machine.altp2m(domid)
        return domain.set_suppress_ve_multi(view, first_gfn, last_gfn, suppress)

    @_operation
    def altp2m_get_suppress_ve(self, domid: int, view: int, gfn: int) -> bool:
        return self.machine.altp2m(domid).get_suppress_ve(view, gfn)

    @_operation
    def altp2m_get_vcpu_p2m_idx(self, domid: int, vcpu: int) -> int:
        return self.machine.altp2m(domid).vcpu_view(vcpu)

    @_operation
    def altp2m_set_visibility(self, domid: int, view: int, visible: bool) -> None:
        self.machine.altp2m(domid).set_visibility(view, visible)

    @_operation
    def monitor_enable(self, domid: int) -> tuple[int, memoryview]:
        monitor = self._monitor(domid)
        mapping = self._map([monitor.enable()], writable=True)
        self._mappings[id(mapping.whole)] = mapping, monitor.domain
        return monitor.port, mapping.whole

    @_operation
    def monitor_unmap_ring(self, ring: memoryview) -> None:
        self._unmap("monitor_unmap_ring", ring)

    @_operation
    def monitor_disable(self, domid: int) -> None:
        self._monitor(domid).disable()
        self._go_on(domid)

    @_operation
    def monitor_resume(self, domid: int) -> None:
        self._monitor(domid).resume()
        self._go_on(domid)

    @_operation
    def monitor_get_capabilities(self, domid: int) -> int:
        return self._monitor(domid).capabilities()

    @_operation
    def monitor_write_ctrlreg(
        self, domid: int, index: int, enable: bool, sync: bool, bitmask: int, onchangeonly: bool
    ) -> None:
        self._monitor(domid).switch_ctrlreg(
            index, enable, sync=sync, bitmask=bitmask, onchangeonly=onchangeonly
        )

    @_operation
    def monitor_mov_to_msr(self, domid: int, msr: int, enable: bool, onchangeonly: bool) -> None:
        self._monitor(domid).switch_msr(msr, enable, onchangeonly=onchangeonly)

    @_operation
    def monitor_singlestep(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("singlestep", enable)

    @_operation
    def monitor_software_breakpoint(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("software_breakpoint", enable)

    @_operation
    def monitor_descriptor_access(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("descriptor_access", enable)

    @_operation
    def monitor_guest_request(
        self, domid: int, enable: bool, sync: bool, allow_userspace: bool
    ) -> None:
        self._monitor(domid).switch(
            "guest_request", enable, sync=sync, allow_userspace=allow_userspace
        )

    @_operation
    def monitor_inguest_pagefault(self, domid: int, disable: bool) -> None:
        self._monitor(domid).switch("inguest_pagefault", disable)

    @_operation
    def monitor_debug_exceptions(self, domid: int, enable: bool, sync: bool) -> None:
        self._monitor(domid).switch("debug_exceptions", enable, sync=sync)

    @_operation
    def monitor_cpuid(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("cpuid", enable)

    @_operation
    def monitor_privileged_call(self, domid: int, enable: bool) -> None:
        del enable
        self._monitor(domid)
        raise Refused(EOPNOTSUPP)  # not among x86's capabilities, either way

    @_operation
    def monitor_emul_unimplemented(self, domid: int, enable: bool) -> None:
        self._monitor(domid).switch("emul_unimplemented", enable)

    @_operation
    def monitor_vmexit(self, domid: int, enable: bool, sync: bool) -> None:
        self._require("monitor_vmexit")
        self._monitor(domid).switch("vmexit", enable, sync=sync)

    @_operation
    def monitor_io(self, domid: int, enable: bool) -> None:
        self._require("monitor_io")
        self._monitor(domid).switch("io", enable)

    @_operation
    def monitor_emulate_each_rep(self, domid: int, enable: bool) -> None:
        self._monitor(domid).emulate_each_rep(enable)

    @_operation
    def monitor_control_registers(self, domid: int) -> None:
        self._monitor_through_any_library(domid).gates_writes = True

    @_operation
    def evtchn_open(self) -> int:
        channel = Channel()
        self._channels[channel.fd] = channel
        return channel.fd

    @_operation
    def evtchn_close(self, channel: int) -> None:
        self._channel(channel).close()
        del self._channels[channel]

    @_operation
    def evtchn_fd(self, channel: int) -> int:
        return self._channel(channel).fd

    @_operation
    def evtchn_bind_interdomain(self, channel: int, domid: int, remote_port: int) -> int:
        bound = self._channel(channel)
        monitor = self._monitors.get(domid)
        if monitor is None or not monitor.enabled or remote_port != monitor.port or monitor.signal:
            raise Refused(EINVAL)
        return bound.bind(monitor)

    @_operation
    def evtchn_pending(self, channel: int) -> int:
        return self._channel(channel).pending()

    @_operation
    def evtchn_unmask(self, channel: int, port: int) -> None:
        self._channel(channel).unmask(port)
        bound = self._channel(channel).ports.get(port)
        if bound is not None and self._simulates(domid := bound.monitor.domain.domid):
            self._go_on(domid)

    @_operation
    def evtchn_notify(self, channel: int, port: int) -> None:
        bound = self._port(channel, port)
        if bound.remote == bound.monitor.port:
            bound.monitor.resume()
            self._go_on(bound.monitor.domain.domid)

    def evtchn_calls(self, channel: int, port: int) -> PortCalls:
        """One port's calls, each of which is logged as the method of that name."""
        arguments.check("evtchn_calls", {"channel": channel, "port": port})

        def notify() -> int:
            self.evtchn_notify(channel, port)
            return 0

        self._check_open()
        return PortCalls(
            functools.partial(self.evtchn_pending, channel),
            functools.partial(self.evtchn_unmask, channel, port),
            notify,
        )

    def _channel(self, channel: int) -> Channel:
        if channel not in self._channels:
            raise Refused(EBADF)
        return self._channels[channel]

    def _port(self, channel: int, port: int) -> Port:
        bound = self._channel(channel).ports.get(port)
        if bound is None:
            raise Refused(ENOTCONN)
        return bound

    @_operation
    def foreignmemory_map(
        self, domid: int, writable: bool, gfns: Sequence[int]
    ) -> list[memoryview]:
        domain = self.machine.controlled(domid)
        frames = []
        if not gfns:
            raise Refused(EINVAL)
        for gfn in gfns:
            found = domain.host_lookup(gfn, populate=True, unshare=writable)
            if not found.valid or found.type not in ANY_RAM_TYPES:  # get_page_from_gfn
                raise Refused(EINVAL)
            frames.append(found.mfn)
        mapping = self._map(frames, writable=writable)
        self._mappings[id(mapping.pages)] = mapping, domain
        return mapping.pages

    @_operation
    def foreignmemory_unmap(self, pages: list[memoryview]) -> None:
        self._unmap("foreignmemory_unmap", pages)

    def _map(self, frames: list[int], *, writable: bool) -> Mapping:
        pool = self.machine.frames
        for frame in frames:
            pool.pin(frame)

        def unmap() -> None:
            for frame in frames:
                pool.unpin(frame)

        return Mapping(*map(pool.page, frames), writable=writable, unmap=unmap)

    def _unmap(self, op: str, handed: object) -> None:
        if id(handed) not in self._mappings:
            raise arguments.unknown_mapping(op)
        self._give_back(op, id(handed))

    def _give_back(self, op: str, key: int) -> None:
        mapping, domain = self._mappings[key]
        mapping.close(op)
        del self._mappings[key]
        self._bury(domain)

    # The model.

    def _bury(self, domain: Domain) -> None:
        """Forget a domain that is dead and that nobody holds on to."""
        held = any(owner is domain for _, owner in self._mappings.values())
        if domain.dying and not held and self.machine.domains.get(domain.domid) is domain:
            for table in (self.machine.domains, self._monitors):
                table.pop(domain.domid, None)
            for processor in self._processors.pop(domain.domid, []):
                processor.close()

    def _monitor_of(self, domid: int) -> Monitor:
        monitor = self._monitors.get(domid)
        if monitor is None:
            monitor = self._monitors[domid] = Monitor(self.machine.domains[domid])
        return monitor

    def _processors_of(self, domid: int) -> list[Processor]:
        if domid not in self._processors:
            monitor = self._monitor_of(domid)
            self._processors[domid] = [Script(monitor, vcpu) for vcpu in monitor.domain.vcpus]
        return self._processors[domid]

    def _go_on(self, domid: int) -> None:
        """Let the vCPUs run for a while, now that something let them."""
        processors = self._processors_of(domid)
        steps, turns = self.steps_at_once, math.inf
        if steps is not None and self._simulates(domid):
            turns = _TURNS_AT_ONCE
            if steps == _STEPS_AT_ONCE:
                steps = _STEPS_OF_CODE_AT_ONCE
        run(processors, steps, self._chance, turns)
        if self._simulates(domid) and any(one.ready for one in processors):
            self._monitor_of(domid).wake()  # so that it goes on when the agent looks

    def _simulate(self, domid: int, processors: list[Processor]) -> None:
        """Have a domain's vCPUs execute machine code."""
        self._processors[domid] = processors

    def _simulates(self, domid: int) -> bool:
        """Whether a domain executes machine code."""
        return self._processors_of(domid)[0].executes_code


def _info(domain: Domain) -> DomainInfo:
    return DomainInfo(
        domid=DomId(domain.domid),
        uuid=domain.uuid,
        hvm=domain.hvm,
        paused=domain.pauses > 0,
        dying=domain.dying,
        shutdown=domain.shutdown_code is not None,
        shutdown_reason=domain.shutdown_code or 0,
        pages=domain.pages,
        max_pages=domain.max_pages,
        vcpus=domain.online_vcpus,
        max_vcpu_id=len(domain.vcpus) - 1,
        shared_pages=domain.shared_pages,
        paged_pages=domain.paged_pages,
    )


def _record(typecode: int, instance: int, body: bytes) -> bytes:
    """One record of an HVM save stream."""
    head = (typecode, 2), (instance, 2), (len(body), 4)
    return b"".join(value.to_bytes(width, "little") for value, width in head) + body
