# SPDX-License-Identifier: LGPL-2.1-or-later
"""Instructions that exit, and those that Unicorn leaves out: what each does to a vCPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from xenaltp2m.abi.x86 import (
    CR0_PE,
    CR4_DE,
    CR4_TSD,
    EFER_SCE,
    FLAG_IF,
    FLAG_RF,
    FLAG_VM,
    GP,
    SYSCALL,
    UD,
    Decoded,
    Fault,
    Segment,
)
from xenaltp2m.backend.mock.cpu_mode import CpuMode
from xenaltp2m.backend.mock.effects import (
    Cpuid,
    DebugException,
    DescriptorAccess,
    Effect,
    Halt,
    PortIo,
    SetRegisters,
    WriteControlRegister,
    WriteMsr,
)
from xenaltp2m.backend.mock.monitor import CR0, CR3, CR4, XCR0
from xenaltp2m.backend.mock.vcpu import (
    DR6_DEFAULT,
    DR7_DEFAULT,
    FLAT_CODE,
    FLAT_CODE_64,
    FLAT_DATA,
    FLAT_LIMIT,
    GENERAL_REGISTERS,
    PRIVILEGED_EXCEPTION,
    Vcpu,
)

INT3, INT_N, INTO, ICEBP = 0xCC, 0xCD, 0xCE, 0xF1
FROM_DEBUG, TO_DEBUG, RDMSR = 0x0F21, 0x0F23, 0x0F32
VMCALL, VMFUNC = (0x0F01, 0xC1), (0x0F01, 0xD4)
"""Opcode and ModRM byte."""
_XSETBV, _RDTSCP = 0xD1, 0xF9
"""ModRM bytes of 0x0f01."""
_U16, _U32, _U64 = 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1
_DEBUG_BITS = {"dr6": (0xE00F, DR6_DEFAULT), "dr7": (0xFFFF_23FF, DR7_DEFAULT)}
"""For a debug register with reserved bits: those that can be set, and those that are set."""
_TICKS = 2
"""Ticks of the time stamp counter in a nanosecond."""
_VENDOR = (0x756E6547, 0x6C65746E, 0x49656E69)
_LEAVES = {
    0: (0xD, *_VENDOR),
    1: (0x306C3, 0, 0x8000_0000, 0x1789_A17F),
    0x4000_0000: (0x4000_0005, 0x566E_6558, 0x65584D4D, 0x4D4D_566E),
    0x8000_0000: (0x8000_0008, 0, 0, 0),
    0x8000_0001: (0, 0, 1, 0x2810_0800),
    0x8000_0008: (0x3027, 0, 0, 0),
}
"""The CPUID leaves that are not all zero."""


def effect_of(vcpu: Vcpu, mode: CpuMode, found: Decoded) -> Effect | None:
    """Return the effect of an instruction; None if the core can execute it."""
    effect = _EFFECTS.get(found.opcode)
    return None if effect is None else effect(vcpu, mode, found)


def _move_to_control(vcpu: Vcpu, mode: CpuMode, found: Decoded) -> Effect | None:
    number = (found.modrm >> 3 & 7) + (8 if found.rex & 4 else 0)
    operand = (found.modrm & 7) + (8 if found.rex & 1 else 0)
    index = {0: CR0, 3: CR3, 4: CR4}.get(number)
    if index is None:
        return None
    return WriteControlRegister(index, vcpu.register(GENERAL_REGISTERS[operand]) & mode.mask)


def _clear_task_switched(vcpu: Vcpu, _mode: CpuMode, _found: Decoded) -> Effect:
    return WriteControlRegister(CR0, vcpu.register("cr0") & ~8)


def _wide(vcpu: Vcpu) -> int:
    return vcpu.register("rax") & _U32 | (vcpu.register("rdx") & _U32) << 32


def _write_msr(vcpu: Vcpu, _mode: CpuMode, _found: Decoded) -> Effect:
    return WriteMsr(vcpu.register("rcx") & _U32, _wide(vcpu))


def _read_time(vcpu: Vcpu, mode: CpuMode, found: Decoded) -> Effect | None:
    """RDTSC, RDTSCP: the vCPU's own time, because the core would give the host's."""
    if mode.privilege and vcpu.register("cr4") & CR4_TSD:
        return None
    time = vcpu.cpu_time * _TICKS
    values = {"rax": time & _U32, "rdx": time >> 32 & _U32}
    if found.opcode == 0x0F01:
        values["rcx"] = vcpu.register("msr_tsc_aux") & _U32
    return SetRegisters(values)


def _identify(vcpu: Vcpu, _mode: CpuMode, _found: Decoded) -> Effect:
    return Cpuid(_LEAVES.get(vcpu.register("rax") & _U32, (0, 0, 0, 0)))


def _port_io(vcpu: Vcpu, _mode: CpuMode, found: Decoded) -> Effect:
    opcode = found.opcode
    port = found.immediate if opcode < 0xE8 else vcpu.register("rdx") & _U16
    size = 1 if not opcode & 1 else min(found.operand_size, 4)
    value = vcpu.register("rax") & ((1 << 8 * size) - 1)
    return PortIo(port, size, is_in=not opcode & 2, value=value)


def _group_7(vcpu: Vcpu, mode: CpuMode, found: Decoded) -> Effect | None:
    """XSETBV, RDTSCP, SGDT, SIDT, LGDT, LIDT."""
    if found.modrm == _XSETBV:
        return WriteControlRegister(XCR0, _wide(vcpu))
    if found.modrm == _RDTSCP:
        return _read_time(vcpu, mode, found)
    kind = found.modrm >> 3 & 7
    if kind < 4 and found.modrm < 0xC0:
        return DescriptorAccess((2, 1)[kind & 1], kind >= 2)
    return None


def _group_6(_vcpu: Vcpu, _mode: CpuMode, found: Decoded) -> Effect | None:
    """SLDT, STR, LLDT, LTR."""
    kind = found.modrm >> 3 & 7
    return DescriptorAccess((3, 4)[kind & 1], kind >= 2) if kind < 4 else None


_EffectOf: TypeAlias = Callable[[Vcpu, CpuMode, Decoded], Effect | None]
_EFFECTS: dict[int, _EffectOf] = {
    0x0F00: _group_6,
    0x0F01: _group_7,
    0x0F06: _clear_task_switched,
    0x0F22: _move_to_control,
    0x0F30: _write_msr,
    0x0F31: _read_time,
    0x0FA2: _identify,
    ICEBP: lambda *_: DebugException(PRIVILEGED_EXCEPTION),
    0xF4: lambda *_: Halt(),
    **dict.fromkeys((0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF), _port_io),
}
"""By opcode."""


def call_system(vcpu: Vcpu, mode: CpuMode, found: Decoded) -> None:
    """Execute SYSCALL or SYSENTER (SDM 2B), which Unicorn leaves out.

    Raises:
        Fault: The guest has not enabled it.
    """
    register, long = vcpu.register, mode.long_mode
    flags = register("rflags") & ~FLAG_RF
    if found.opcode == SYSCALL:
        if not mode.is_64_bit or not register("msr_efer") & EFER_SCE:
            raise Fault(UD)
        code = register("msr_star") >> 32
        vcpu.set_registers({"rcx": register("rip") + found.length, "r11": flags})
        flags &= ~register("msr_syscall_mask")
        target = {"rip": register("msr_lstar")}
    else:
        code = register("sysenter_cs")
        if not register("cr0") & CR0_PE or not code & 0xFFFC:
            raise Fault(GP, 0)
        flags &= ~(FLAG_VM | FLAG_IF)
        mask = _U64 if long else _U32
        target = {"rip": register("sysenter_eip"), "rsp": register("sysenter_esp")}
        target = {name: value & mask for name, value in target.items()}
    vcpu.set_registers({"rflags": flags | 2, **target})
    vcpu.set_registers({"cs_sel": code & 0xFFFC, "ss_sel": (code & 0xFFFC) + 8})
    vcpu.set_segment("cs", Segment(0, FLAT_LIMIT, FLAT_CODE_64 if long else FLAT_CODE))
    vcpu.set_segment("ss", Segment(0, FLAT_LIMIT, FLAT_DATA))


def move_debug_register(vcpu: Vcpu, mode: CpuMode, found: Decoded) -> None:
    """Execute MOV from or to DR0 to DR7 (SDM 2B; 3B, 18.2); no breakpoint in them triggers.

    Raises:
        Fault: There is no such register, or the value is too large.
    """
    number = found.modrm >> 3 & 7
    if found.rex & 4 or (number in (4, 5) and vcpu.register("cr4") & CR4_DE):
        raise Fault(UD)
    debug = f"dr{number + 2 if number in (4, 5) else number}"
    general = GENERAL_REGISTERS[(found.modrm & 7) + 8 * (found.rex & 1)]
    if found.opcode == FROM_DEBUG:
        vcpu.set_register(general, vcpu.register(debug) & mode.mask)
        return
    value = vcpu.register(general) & mode.mask
    if debug in _DEBUG_BITS:
        if value > _U32:
            raise Fault(GP, 0)
        settable, fixed = _DEBUG_BITS[debug]
        value = value & settable | fixed
    vcpu.set_register(debug, value)
