# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handle of a virtual CPU: its registers, its view, and its run state."""

from __future__ import annotations

import errno
from typing import TypedDict, Unpack, cast

from xenaltp2m.abi.layouts import HVM_CPU, HVM_CPU_TYPECODE, save_records
from xenaltp2m.abi.x86 import CR0_ET
from xenaltp2m.errors import InvalidArgumentError, XenError
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.types import VcpuId, VcpuInfo, ViewId
from xenaltp2m.values.arguments import check_number
from xenaltp2m.values.events import Registers, shutdown_words
from xenaltp2m.values.registers import registers_at

_REGISTERS = registers_at(HVM_CPU.fields)
VcpuRegisterValues = TypedDict(  # noqa: UP013 - a class would have 80 lines
    "VcpuRegisterValues",
    {
        "fpu_regs": int, "rax": int, "rbx": int, "rcx": int, "rdx": int, "rbp": int, "rsi": int,
        "rdi": int, "rsp": int, "r8": int, "r9": int, "r10": int, "r11": int, "r12": int,
        "r13": int, "r14": int, "r15": int, "rip": int, "rflags": int, "cr0": int, "cr2": int,
        "cr3": int, "cr4": int, "dr0": int, "dr1": int, "dr2": int, "dr3": int, "dr6": int,
        "dr7": int, "cs_sel": int, "ds_sel": int, "es_sel": int, "fs_sel": int, "gs_sel": int,
        "ss_sel": int, "tr_sel": int, "ldtr_sel": int, "cs_limit": int, "ds_limit": int,
        "es_limit": int, "fs_limit": int, "gs_limit": int, "ss_limit": int, "tr_limit": int,
        "ldtr_limit": int, "idtr_limit": int, "gdtr_limit": int, "cs_base": int, "ds_base": int,
        "es_base": int, "fs_base": int, "gs_base": int, "ss_base": int, "tr_base": int,
        "ldtr_base": int, "idtr_base": int, "gdtr_base": int, "cs_arbytes": int,
        "ds_arbytes": int, "es_arbytes": int, "fs_arbytes": int, "gs_arbytes": int,
        "ss_arbytes": int, "tr_arbytes": int, "ldtr_arbytes": int, "sysenter_cs": int,
        "sysenter_esp": int, "sysenter_eip": int, "shadow_gs": int, "msr_flags": int,
        "msr_lstar": int, "msr_star": int, "msr_cstar": int, "msr_syscall_mask": int,
        "msr_efer": int, "msr_tsc_aux": int, "tsc": int, "pending_event": int, "error_code": int,
        "flags": int,
    },
    total=False,
)  # fmt: skip
"""The keyword arguments of :meth:`Vcpu.set_registers`, for type checkers."""


class Vcpu:
    """A vCPU of a domain. Made by :meth:`xenaltp2m.handles.domain.Domain.vcpu`.

    Attributes:
        number: Its number.
    """

    def __init__(self, context: DomainContext, number: int) -> None:
        self._context = context
        self.number = VcpuId(number)
        self._backend = context.backend

    def __repr__(self) -> str:
        return f"<Vcpu {self.number} of domain {self._context.domid}>"

    def info(self) -> VcpuInfo:
        """Read its run state and CPU time. ``xc_vcpu_getinfo``."""
        self._context.check_open()
        return self._backend.vcpu_getinfo(int(self._context.domid), int(self.number))

    @property
    def view(self) -> ViewId:
        """The number of the view that it is in. ``xc_altp2m_get_vcpu_p2m_idx``."""
        self._context.check_open()
        return ViewId(
            self._backend.altp2m_get_vcpu_p2m_idx(int(self._context.domid), int(self.number))
        )

    def registers(self) -> Registers:
        """Read its registers (``struct hvm_hw_cpu``); a running vCPU's are those of some moment.

        ``xc_domain_hvm_getcontext_partial``.
        """
        return _REGISTERS(self._record())

    def set_registers(self, **values: Unpack[VcpuRegisterValues]) -> None:
        """Set registers by name, while the domain is paused.

        If the vCPU waits for a response that sets registers itself, those of the response are used:
        call :meth:`Response.with_registers` then.

        Raises:
            InvalidArgumentError: There is no such register, or the value does not fit into it, or
                Xen refuses it, such as a reserved bit of a control register; nothing is changed.

        ``xc_domain_hvm_getcontext``, ``xc_domain_hvm_setcontext``.
        """
        for name, value in values.items():
            place = HVM_CPU.fields.get(name)
            if place is None:
                raise InvalidArgumentError(f"there is no register {name!r}")
            what = f"{name}, of {place.width} bytes,"
            check_number(what, value, most=(1 << 8 * place.width) - 1)
        domid = int(self._context.domid)
        with self._context.paused():
            # The whole stream: Xen takes every vCPU offline that is not in it (hvm_load).
            stream = bytearray(self._backend.domain_hvm_getcontext(domid))
            starts = _vcpus_in(stream)
            for start in starts.values():
                # Xen refuses a vCPU without ET, but lets a guest start one without it
                # (VCPUOP_initialise). On the CPU the bit is always set.
                stream[start + HVM_CPU.fields["cr0"].offset] |= CR0_ET
            before = bytes(stream)
            if int(self.number) not in starts:
                raise InvalidArgumentError(
                    f"{self!r} has no registers: it has not been started", domid=domid
                )
            start = starts[int(self.number)]
            for name, value in cast("dict[str, int]", values).items():
                HVM_CPU.put(stream, name, value, start)
            try:
                self._backend.domain_hvm_setcontext(domid, stream)
            except InvalidArgumentError:
                # Xen has taken every vCPU offline (hvm_load).
                self._backend.domain_hvm_setcontext(domid, before)
                raise

    def _record(self) -> bytes:
        self._context.check_open()
        return self._backend.domain_hvm_getcontext_partial(
            int(self._context.domid), HVM_CPU_TYPECODE, int(self.number)
        )


def vcpus_of(context: DomainContext) -> list[Vcpu]:
    """List a domain's vCPUs."""
    return [Vcpu(context, number) for number in range(context.info().max_vcpu_id + 1)]


def registers_of(context: DomainContext) -> Registers:
    """Read the registers of the first vCPU that is online: see :meth:`Domain.registers`."""
    info = context.info()
    for number in range(info.max_vcpu_id + 1):
        try:
            return Vcpu(context, number).registers()
        except XenError as error:
            if error.errno != errno.ENODATA:  # hvm_save_one: VPF_down
                raise
    why = f"it {shutdown_words(info.shutdown_reason)}" if info.shutdown else "all are offline"
    raise XenError(
        f"domain {context.domid} has no vCPU that is online: {why}",
        op="domain_hvm_getcontext_partial",
        errno=errno.ENODATA,
        domid=context.domid,
        hint=("start the guest, or bring a vCPU online, and try again",),
    )


def _vcpus_in(stream: bytearray) -> dict[int, int]:
    """Return the offset of each vCPU's registers in a save stream, by vCPU."""
    return {
        number: start
        for kind, number, start, _ in save_records(stream)
        if kind == HVM_CPU_TYPECODE and start + HVM_CPU.size <= len(stream)
    }
