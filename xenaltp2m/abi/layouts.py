# SPDX-License-Identifier: LGPL-2.1-or-later
"""Structure layouts that the FFI does not carry, or that must be known without it.

Every number was taken from the releases' own public headers, compiled with gcc on x86-64, and
``tests/abi`` compiles this table against whatever headers are at hand, and compares it with the
FFI where both know a structure. All fields are little-endian.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

__all__ = [
    "ALTP2M_OP",
    "DOMAIN_INFO",
    "DOMCTL",
    "GET_MEM_TYPE",
    "HVM_CPU",
    "HVM_CPU_TYPECODE",
    "HVM_DESCRIPTOR",
    "VCPU_INFO",
    "VM_EVENT",
    "VM_EVENT_RING",
    "DomainFlag",
    "Field",
    "Layout",
    "Steps",
    "save_records",
    "shutdown_reason",
]

T = TypeVar("T")
Version: TypeAlias = tuple[int, int]
Buffer: TypeAlias = bytes | bytearray | memoryview


class Field(NamedTuple):
    """Where a field lies in its structure, in bytes."""

    offset: int
    width: int


class Layout(NamedTuple):
    """A C structure: its size, and its fields by the path C would write (``u.io.port``)."""

    size: int
    fields: Mapping[str, Field]

    def number(self, buffer: Buffer, name: str, base: int = 0) -> int:
        """Read an unsigned field of the structure that starts at ``base``."""
        return int.from_bytes(self.raw(buffer, name, base), "little")

    def raw(self, buffer: Buffer, name: str, base: int = 0) -> bytes:
        """Read a field's bytes.

        Raises:
            ValueError: The buffer ends before the field does.
        """
        offset, width = self.fields[name]
        start = base + offset
        if start < 0 or start + width > len(buffer):
            raise ValueError(f"{name} is not in a buffer of {len(buffer)} bytes")
        return bytes(buffer[start : start + width])

    def filled(self, values: Mapping[str, int]) -> bytearray:
        """Make the structure with these unsigned values; the rest is zeros."""
        made = bytearray(self.size)
        for name, value in values.items():
            self.put(made, name, value)
        return made

    def put(self, buffer: bytearray, name: str, value: int, base: int = 0) -> None:
        """Write an unsigned field of the structure that starts at ``base``."""
        offset, width = self.fields[name]
        buffer[base + offset : base + offset + width] = value.to_bytes(width, "little")


class Steps(Generic[T]):
    """A fact that changes with releases: each step holds until the next one."""

    def __init__(self, *steps: tuple[Version, T]) -> None:
        self._steps = tuple(sorted(steps, key=lambda step: step[0]))

    def __iter__(self) -> Iterator[tuple[Version, T]]:
        return iter(self._steps)

    def at(self, version: Version) -> T:
        """Return what holds in a release; in one newer than any known, what held last.

        Raises:
            LookupError: The release is older than the first step.
        """
        for since, value in reversed(self._steps):
            if version >= since:
                return value
        raise LookupError(f"nothing known of Xen {version[0]}.{version[1]}")


def _run(start: int, width: int, names: str, prefix: str = "") -> dict[str, Field]:
    """Return equally wide fields, each directly after the one before."""
    return {
        prefix + name: Field(start + index * width, width)
        for index, name in enumerate(names.split())
    }


# --- domains -------------------------------------------------------------------------------

_DOMAIN_INFO_FIELDS: Final = {
    "domain": Field(0, 2),
    "flags": Field(4, 4),
    **_run(8, 8, "tot_pages max_pages outstanding_pages shr_pages paged_pages"),
    **_run(48, 8, "shared_info_frame cpu_time"),
    **_run(64, 4, "nr_online_vcpus max_vcpu_id ssidref"),
    "handle": Field(76, 16),
    "cpupool": Field(92, 4),
}

#: ``struct xen_domctl_getdomaininfo`` (public/domctl.h), the element of ``xc_domain_getinfolist``.
#: The library's release decides, for it is the library that strides through the caller's buffer.
#: 4.16 put gpaddr_bits in front of arch_config (1e6706b0d1); nothing before it ever moved.
DOMAIN_INFO: Final = Steps(
    ((4, 14), Layout(104, MappingProxyType(_DOMAIN_INFO_FIELDS))),
    ((4, 16), Layout(112, MappingProxyType({**_DOMAIN_INFO_FIELDS, "gpaddr_bits": Field(96, 1)}))),
)


#: ``struct xen_domctl_getvcpuinfo`` (public/domctl.h), unchanged 4.14 .. 4.22.
VCPU_INFO: Final = Layout(
    24,
    MappingProxyType(
        {
            "vcpu": Field(0, 4),
            **_run(4, 1, "online blocked running"),
            "cpu_time": Field(8, 8),
            "cpu": Field(16, 4),
        }
    ),
)

#: ``struct xen_domctl`` (public/domctl.h) with a monitor's op in it, unchanged 4.14 .. 4.22.
DOMCTL: Final = Layout(
    144,
    MappingProxyType(
        {
            **_run(0, 4, "cmd interface_version"),
            "domain": Field(8, 2),
            **_run(16, 4, "op event", "u.monitor_op."),
        }
    ),
)

#: ``struct xen_hvm_altp2m_op`` (public/hvm/hvm_op.h) with a bulk access in it, unchanged 4.14 ..
#: 4.22.
ALTP2M_OP: Final = Layout(
    80,
    MappingProxyType(
        {
            **_run(0, 4, "version cmd"),
            "domain": Field(8, 2),
            "u.set_mem_access_multi.view": Field(16, 2),
            "u.set_mem_access_multi.nr": Field(20, 4),
            **_run(24, 8, "opaque pfn_list access_list", "u.set_mem_access_multi."),
        }
    ),
)


#: ``struct xen_hvm_get_mem_type`` (public/hvm/hvm_op.h), unchanged 4.14 .. 4.22.
GET_MEM_TYPE: Final = Layout(
    16, MappingProxyType({**_run(0, 2, "domid mem_type"), "pfn": Field(8, 8)})
)


class DomainFlag(enum.IntFlag):
    """``XEN_DOMINF_*``, the ``flags`` of a domain's info; the same in every release."""

    DYING = 1 << 0
    HVM_GUEST = 1 << 1
    SHUTDOWN = 1 << 2
    PAUSED = 1 << 3
    BLOCKED = 1 << 4
    RUNNING = 1 << 5
    DEBUGGED = 1 << 6
    XS_DOMAIN = 1 << 7
    HAP = 1 << 8


_SHUTDOWN_SHIFT: Final = 16
_SHUTDOWN_MASK: Final = 255


def shutdown_reason(flags: int) -> int | None:
    """Return the ``SHUTDOWN_*`` code in a domain's flags, or None while it has not shut down."""
    if not flags & DomainFlag.SHUTDOWN:
        return None
    return flags >> _SHUTDOWN_SHIFT & _SHUTDOWN_MASK


# --- saved HVM state -----------------------------------------------------------------------

#: What precedes each record in the stream of ``xc_domain_hvm_getcontext``. The partial call
#: strips it (``hvm_save_one``, xen/arch/x86/hvm/save.c).
HVM_DESCRIPTOR: Final = Layout(
    8,
    MappingProxyType(
        {"typecode": Field(0, 2), "instance": Field(2, 2), "length": Field(4, 4)},
    ),
)


def save_records(stream: Buffer) -> Iterator[tuple[int, int, int, int]]:
    """Yield (typecode, instance, where it starts, length) of each record; it may go beyond."""
    head, start = HVM_DESCRIPTOR, 0
    while start + head.size <= len(stream):
        kind, number, length = (
            head.number(stream, name, start) for name in ("typecode", "instance", "length")
        )
        start += head.size
        yield kind, number, start, length
        start += length


#: ``HVM_SAVE_CODE(CPU)``; the instance is the vCPU.
HVM_CPU_TYPECODE: Final = 2

#: ``struct hvm_hw_cpu`` (public/arch-x86/hvm/save.h), unchanged 4.14 .. 4.22.
HVM_CPU: Final = Layout(
    1032,
    MappingProxyType(
        {
            "fpu_regs": Field(0, 512),
            **_run(512, 8, "rax rbx rcx rdx rbp rsi rdi rsp r8 r9 r10 r11 r12 r13 r14 r15"),
            **_run(640, 8, "rip rflags cr0 cr2 cr3 cr4 dr0 dr1 dr2 dr3 dr6 dr7"),
            **_run(736, 4, "cs_sel ds_sel es_sel fs_sel gs_sel ss_sel tr_sel ldtr_sel"),
            **_run(768, 4, "cs_limit ds_limit es_limit fs_limit gs_limit ss_limit tr_limit"),
            **_run(796, 4, "ldtr_limit idtr_limit gdtr_limit"),
            **_run(808, 8, "cs_base ds_base es_base fs_base gs_base ss_base tr_base ldtr_base"),
            **_run(872, 8, "idtr_base gdtr_base"),
            **_run(888, 4, "cs_arbytes ds_arbytes es_arbytes fs_arbytes gs_arbytes ss_arbytes"),
            **_run(912, 4, "tr_arbytes ldtr_arbytes"),
            **_run(920, 8, "sysenter_cs sysenter_esp sysenter_eip shadow_gs msr_flags"),
            **_run(960, 8, "msr_lstar msr_star msr_cstar msr_syscall_mask msr_efer msr_tsc_aux"),
            "tsc": Field(1008, 8),
            **_run(1016, 4, "pending_event error_code flags"),
        }
    ),
)


# --- vm_event ------------------------------------------------------------------------------

#: ``struct vm_event_sring`` up to its entries (public/io/ring.h).
VM_EVENT_RING: Final = Layout(
    64, MappingProxyType(_run(0, 4, "req_prod req_event rsp_prod rsp_event"))
)


def _vm_event(size: int, registers: Mapping[str, Field]) -> Layout:
    """Return the parts that all versions share, followed by the version's registers."""
    return Layout(
        size,
        MappingProxyType(
            {
                **_run(0, 4, "version flags reason vcpu_id"),
                "altp2m_idx": Field(16, 2),
                "u": Field(24, 32),
                "u.mem_paging.gfn": Field(24, 8),
                **_run(32, 4, "p2mt flags", "u.mem_paging."),
                "u.mem_sharing.gfn": Field(24, 8),
                "u.mem_sharing.p2mt": Field(32, 4),
                **_run(24, 8, "gfn offset gla", "u.mem_access."),
                "u.mem_access.flags": Field(48, 4),
                "u.write_ctrlreg.index": Field(24, 4),
                **_run(32, 8, "new_value old_value", "u.write_ctrlreg."),
                **_run(24, 8, "msr new_value old_value", "u.mov_to_msr."),
                "u.desc_access.arch.vmx.instr_info": Field(24, 4),
                "u.desc_access.arch.vmx.exit_qualification": Field(32, 8),
                **_run(40, 1, "descriptor is_write", "u.desc_access."),
                "u.singlestep.gfn": Field(24, 8),
                "u.fast_singlestep.p2midx": Field(24, 2),
                **_run(24, 8, "gfn pending_dbg", "u.software_breakpoint."),
                "u.software_breakpoint.insn_length": Field(40, 4),
                "u.software_breakpoint.type": Field(44, 1),
                **_run(24, 8, "gfn pending_dbg", "u.debug_exception."),
                "u.debug_exception.insn_length": Field(40, 4),
                "u.debug_exception.type": Field(44, 1),
                **_run(24, 4, "insn_length leaf subleaf", "u.cpuid."),
                **_run(24, 4, "vector type error_code", "u.interrupt.x86."),
                "u.interrupt.x86.cr2": Field(40, 8),
                "data": Field(56, size - 56),
                "data.emul.read.size": Field(56, 4),
                "data.emul.read.data": Field(60, size - 60),
                "data.emul.insn.data": Field(56, 16),
                **{f"data.regs.x86.{name}": field for name, field in registers.items()},
            }
        ),
    )


def _registers(tail: int, new: str = "") -> dict[str, Field]:
    """``struct vm_event_regs_x86``: ``new`` follows gdtr_base, the segments start at ``tail``."""
    return {
        **_run(56, 8, "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15"),
        **_run(184, 8, "rflags dr6 dr7 rip cr0 cr2 cr3 cr4"),
        **_run(248, 8, "sysenter_cs sysenter_esp sysenter_eip msr_efer msr_star msr_lstar"),
        **_run(296, 8, f"gdtr_base {new}"),
        **_run(tail, 4, "cs_base ss_base ds_base es_base"),
        **_run(tail + 16, 8, "fs_base gs_base"),
        # The hidden parts: limit in the low 20 bits, access rights in the high 12.
        **_run(tail + 32, 4, "cs ss ds es fs gs"),
        "shadow_gs": Field(tail + 56, 8),
        **_run(tail + 64, 2, "gdtr_limit cs_sel ss_sel ds_sel es_sel fs_sel gs_sel"),
    }


_VM_EVENT_7: Final = _vm_event(400, _registers(320, "npt_base vmtrace_pos"))

#: ``struct vm_event_st`` by interface version. Version 7 got the last fields without a new number:
#: vmexit with 4.17, io with 4.18.
VM_EVENT: Final[Mapping[int, Layout]] = MappingProxyType(
    {
        6: _vm_event(384, _registers(304)),
        7: _VM_EVENT_7._replace(
            fields=MappingProxyType(
                {
                    **_VM_EVENT_7.fields,
                    **_run(24, 8, "reason qualification", "u.vmexit.arch.vmx."),
                    "u.io.bytes": Field(24, 4),
                    "u.io.port": Field(28, 2),
                    **_run(30, 1, "in str", "u.io."),
                }
            )
        ),
    }
)
