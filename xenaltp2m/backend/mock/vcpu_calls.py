# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls about vCPUs of the modelled host: saved state, scheduling, injected traps."""

from __future__ import annotations

import struct
from errno import EBUSY, EINVAL, ENODATA, ENOENT, ENOSYS, EPERM

from xenaltp2m.abi import layouts
from xenaltp2m.abi.x86 import CR0_ET, CR0_PE, CR0_PG
from xenaltp2m.backend.mock.calls import operation
from xenaltp2m.backend.mock.machine import HypercallError
from xenaltp2m.backend.mock.scheduler import Scheduler, run
from xenaltp2m.backend.mock.vcpu import Trap
from xenaltp2m.backend.protocol import Bytes
from xenaltp2m.types import VcpuInfo

_HEADER_TYPECODE = 1
_SAVE_HEADER = struct.pack("<IIQII", 0x54381286, 1, 0, 0x306C3, 2_000_000)
"""``struct hvm_save_header``: magic, version, changeset, cpuid, TSC's kHz."""


class VcpuCalls(Scheduler):
    """Calls about vCPUs, and the HVM save stream that holds their registers."""

    @operation
    def domain_hvm_getcontext(self, domid: int) -> bytes:
        domain = self._hvm_domctl(domid)
        records = [_record(_HEADER_TYPECODE, 0, _SAVE_HEADER)]
        records += [
            _record(layouts.HVM_CPU_TYPECODE, vcpu.number, bytes(vcpu.context))
            for vcpu in domain.vcpus
            if vcpu.online  # hvm_save_cpu_ctxt passes the others
        ]
        return b"".join(records) + _record(0, 0, b"")

    @operation
    def domain_hvm_getcontext_partial(self, domid: int, typecode: int, instance: int) -> bytes:
        domain = self._hvm_domctl(domid)
        if domain.dying or typecode != layouts.HVM_CPU_TYPECODE:
            raise HypercallError(
                EINVAL
            )  # the header, too, has no handler of its own (hvm_save_one)
        if instance >= len(domain.vcpus):
            raise HypercallError(ENOENT)
        if not domain.vcpus[instance].online:
            raise HypercallError(ENODATA)
        return bytes(domain.vcpus[instance].context)

    @operation
    def domain_hvm_setcontext(self, domid: int, stream: Bytes) -> None:
        domain = self._hvm_domctl(domid)
        contexts = _contexts_of(bytes(stream), len(domain.vcpus))
        for vcpu in domain.vcpus:
            vcpu.online = False  # hvm_load: until its record is loaded
        for number, body in contexts.items():
            cr0 = layouts.HVM_CPU.number(body, "cr0")
            if cr0 >> 32 or not cr0 & CR0_ET or cr0 & (CR0_PG | CR0_PE) == CR0_PG:
                raise HypercallError(EINVAL)  # hvm_load_cpu_ctxt
            domain.vcpus[number].context[:] = body
            domain.vcpus[number].online = True

    @operation
    def domain_debug_control(self, domid: int, op: int, vcpu: int) -> None:
        domain = self._domctl(domid)
        target = domain.vcpu(vcpu)
        if not domain.hvm:
            raise HypercallError(EINVAL)
        if op not in (0, 1):  # XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF, _ON
            raise HypercallError(ENOSYS)
        target.single_step = op == 1
        if not op and self.release.version >= (4, 17):  # 897def94b5, in 4.17.4 and 4.18.1, too
            target.fast_step_view = None

    @operation
    def vcpu_getinfo(self, domid: int, vcpu: int) -> VcpuInfo:
        domain = self._domctl(domid)
        if self.release.version >= (4, 22) and vcpu >= len(domain.vcpus):
            raise HypercallError(ENOENT)
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

    @operation
    def hvm_inject_trap(
        self, domid: int, vcpu: int, vector: int, kind: int, error_code: int, length: int, cr2: int
    ) -> None:
        domain = self.machine.domain(domid)
        if not domain.hvm:
            raise HypercallError(EINVAL)
        if not self.machine.privileged:
            raise HypercallError(EPERM)
        target = domain.vcpu(vcpu)
        if target.injected is not None:
            raise HypercallError(EBUSY)
        target.injected = Trap(vector, kind, error_code, length, cr2)


def _record(typecode: int, instance: int, body: bytes) -> bytes:
    """One record of an HVM save stream."""
    head = (typecode, 2), (instance, 2), (len(body), 4)
    return b"".join(value.to_bytes(width, "little") for value, width in head) + body


def _contexts_of(stream: bytes, vcpus: int) -> dict[int, bytes]:
    """Read the vCPUs' records of an HVM save stream, as ``hvm_load`` does up to the end marker."""
    contexts: dict[int, bytes] = {}
    if not stream.startswith(_record(_HEADER_TYPECODE, 0, _SAVE_HEADER)):
        raise HypercallError(ENODATA)  # hvm_load: it comes first
    for kind, number, start, length in layouts.save_records(stream):
        if not kind:
            return contexts
        if kind == layouts.HVM_CPU_TYPECODE:
            body = stream[start : start + length]
            if number >= vcpus or len(body) != layouts.HVM_CPU.size:
                raise HypercallError(EINVAL)
            contexts[number] = body
    raise HypercallError(ENODATA)  # hvm_load: there was no end marker
