# SPDX-License-Identifier: LGPL-2.1-or-later
"""A vCPU that executes, and what Xen makes of it when it leaves guest mode.

What executes, a script or machine code, is a subclass's. Xen's part is restated here: the exit
handlers of ``vmx.c``, ``hvm/monitor.c``, ``hvm_do_resume``.

What decides between a step and none: an instruction that leaves guest mode and is completed by
Xen causes no monitor trap, its successor does; so it is on the CPU, too.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import math
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from random import Random
from typing import ClassVar, TypeAlias

from xenaltp2m.abi.vm_event import Flag, Reason
from xenaltp2m.abi.x86 import BP, CR0_ET, CR0_PE, CR0_PG, DB, GP, NO_ERROR_CODE, OF, UD, VE
from xenaltp2m.backend.mock.guest import Outcome, drive, vm_exit
from xenaltp2m.backend.mock.machine import Livelock
from xenaltp2m.backend.mock.monitor import CR0, CR3, CR4, XCR0, Monitor
from xenaltp2m.backend.mock.p2m import Lookup, P2m, PageType
from xenaltp2m.backend.mock.vcpu import (
    DR6_DEFAULT,
    EXTERNAL_INTERRUPT,
    HARDWARE_EXCEPTION,
    MSR_REGISTERS,
    NMI,
    SOFTWARE_EXCEPTION,
    Trap,
    Vcpu,
    Waits,
)
from xenaltp2m.types import PAGE_SIZE

# EXIT_REASON_* (asm/hvm/vmx/vmx.h).
_EXCEPTION, _CPUID, EXIT_HLT, EXIT_VMCALL, _CR_ACCESS, _IO = 0, 10, 12, 18, 28, 30
EXIT_MSR_READ, _MSR_WRITE = 31, 32
_MONITOR_TRAP, _GDTR_OR_IDTR, _LDTR_OR_TR, _XSETBV, EXIT_VMFUNC = 37, 46, 47, 55, 59

_SLICE = 1000
"""Instructions of machine code in a turn, at most."""
_NANOSECONDS = 1000
"""What an attempt to execute an instruction takes."""
_OF_A_FAULT = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
_SIGNALS = set(map(int, signal.valid_signals() - _OF_A_FAULT))

_CR0_BITS = 0xE005003F
"""All but ``HVM_CR0_GUEST_RESERVED_BITS``."""
_CR4_BITS = 0x770FFF & ~(1 << 12)
_CR4_HOST_MASK = ~_CR4_BITS | 1 << 5 | 1 << 6 | 1 << 13 | 1 << 4 | 1 << 20 | 1 << 21 | 1 << 22
"""Which bits exit (``vmx_update_guest_cr``): PAE, MCE, VMXE, PKE, and while paging is off PSE,
SMEP and SMAP; and all that the guest may not set."""
DR6_STEP = 1 << 14

DIRECT_MSRS = {0x174, 0x175, 0x176, 0x277, 0xC0000100, 0xC0000101, 0xC0000102}
"""Written without an exit until they are monitored (``construct_vmcs``)."""


@dataclass(frozen=True)
class SetRegisters:
    """Load registers; ``rip`` is a jump."""

    values: Mapping[str, int]


@dataclass(frozen=True)
class WriteControlRegister:
    """MOV to CR0 (index 0), CR3 (1), CR4 (2), or XSETBV of XCR0 (3)."""

    index: int
    value: int


@dataclass(frozen=True)
class WriteMsr:
    """WRMSR."""

    msr: int
    value: int


@dataclass(frozen=True)
class Cpuid:
    """CPUID of what is in eax and ecx, with the results for eax, ebx, ecx and edx."""

    results: tuple[int, int, int, int] = (0xD, 0x756E6547, 0x6C65746E, 0x49656E69)

    @property
    def registers(self) -> dict[str, int]:
        """The results by their registers."""
        return dict(zip(("rax", "rbx", "rcx", "rdx"), self.results, strict=True))


@dataclass(frozen=True)
class DescriptorAccess:
    """SIDT (descriptor 1), SGDT (2), SLDT (3), STR (4), or where it is a write LIDT to LTR."""

    descriptor: int
    is_write: bool = False
    instr_info: int = 0
    exit_qualification: int = 0


@dataclass(frozen=True)
class PortIo:
    """IN or OUT; what comes in goes to rax."""

    port: int
    size: int = 1
    is_in: bool = False
    is_string: bool = False
    value: int = 0


@dataclass(frozen=True)
class GuestRequest:
    """VMCALL of ``HVMOP_guest_request_vm_event``."""


@dataclass(frozen=True)
class DebugException:
    """A #DB: of kind 3 after the instruction, as of the trap flag; of kind 5 INT1 itself."""

    kind: int = HARDWARE_EXCEPTION


@dataclass(frozen=True)
class Halt:
    """HLT: the vCPU waits until ``Vcpu.halted`` is False again."""


Effect: TypeAlias = (
    SetRegisters
    | WriteControlRegister
    | WriteMsr
    | Cpuid
    | DescriptorAccess
    | PortIo
    | GuestRequest
    | DebugException
    | Halt
)


class Done(Enum):
    """How far an instruction came."""

    NATIVE = auto()
    """The CPU completed it."""
    EXITED = auto()
    """Xen completed it, after an exit."""
    HELD = auto()
    """It is not completed, and comes again."""


@dataclass(eq=False)
class Processor(ABC):
    """A vCPU and what it executes."""

    executes_code: ClassVar[bool] = False
    """Whether it is machine code; it then goes on by itself while an agent waits."""

    monitor: Monitor
    vcpu: Vcpu

    def close(self) -> None:  # noqa: B027 - most have nothing
        """Give back what it took; it executes nothing any more."""

    @property
    def written(self) -> bytes:
        """What the domain wrote to its console."""
        return b""

    @property
    @abstractmethod
    def _has_work(self) -> bool:
        """Whether there is an instruction to execute."""

    @abstractmethod
    def _execute(self, limit: int) -> Waits[tuple[Done, int]]:
        """Execute up to ``limit`` instructions; tell how far the last came, and how many."""

    @abstractmethod
    def _advance(self, length: int) -> None:
        """``update_guest_eip``: the instruction at rip is done."""

    @abstractmethod
    def _deliver(self, trap: Trap) -> Waits[bool]:
        """Have the guest's handler get an exception; False where memory keeps it from that."""

    @abstractmethod
    def _emulate(self, kind: Flag, data: bytes) -> Waits[None]:
        """``hvm_emulate_one_vm_event``: the instruction at rip, in the host p2m."""

    @property
    def idle(self) -> bool:
        """Whether the vCPU may run and has nothing to do."""
        return self.monitor.domain.runs(self.vcpu) and not self.ready

    @property
    def ready(self) -> bool:
        """Whether the vCPU may run and has something to do."""
        vcpu = self.vcpu
        if not self.monitor.domain.runs(vcpu):
            return False
        deferred = vcpu.deferred
        return bool(
            vcpu.waiting is not None
            or vcpu.injected
            or vcpu.pending
            or (deferred is not None and deferred.waits)
            or self._has_work
        )

    def step(self, limit: int = 1) -> int:
        """Let the vCPU run until it has executed ``limit`` instructions, or is kept from it.

        With a limit of 0 machine code runs on until it is kept from it.

        Returns:
            How many it has executed.
        """
        vcpu = self.vcpu
        vcpu.cpu_time += _NANOSECONDS
        code, vcpu.waiting = vcpu.waiting, None
        # A handler that raises would leave the vCPU half way; and Unicorn calls back from C, where
        # what it raises is lost. signal's own function would make an enum of each.
        blocked = _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
        try:
            executed = drive(vcpu, self._step(limit) if code is None else code)
        except Livelock:
            return 0  # it faults for ever, and burns its time
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, blocked)
        return executed if isinstance(executed, int) else 0

    def _step(self, limit: int) -> Waits[int]:
        vcpu = self.vcpu
        yield from self._do_resume()
        if not self._runs():
            return 0
        if vcpu.single_step:  # vmx_intr_assist
            vcpu.monitor_trap_flag = True
        steps, vcpu.step_pending = vcpu.step_pending, False
        if vcpu.pending is not None:  # an injected event, with which a pending trap is lost
            if (yield from self._deliver(vcpu.pending)) and vcpu.monitor_trap_flag:
                yield from self._monitor_trap()
            return 0
        if steps:
            yield from self._debug_exception(HARDWARE_EXCEPTION, 0, was_pending=True)
            return 0
        done, executed = yield from self._execute(1 if vcpu.monitor_trap_flag else limit)
        if done is Done.NATIVE and vcpu.monitor_trap_flag:
            yield from self._monitor_trap()
        return executed

    def _runs(self) -> bool:
        return self.monitor.domain.runs(self.vcpu)

    def _do_resume(self) -> Waits[None]:
        """``hvm_do_resume`` and ``hvm_vm_event_do_resume``."""
        vcpu, deferred = self.vcpu, self.vcpu.deferred
        if vcpu.map_cache_stale:  # vcpu_ioreq_handle_completion: all else waits for the next time
            vcpu.map_cache_stale = False
            return
        if deferred is not None:
            if deferred.registers is not None:
                vcpu.set_registers(deferred.registers)
                deferred.registers = None
            if deferred.emulate_flags:
                kind = _emulation_kind(deferred.emulate_flags)
                yield from self._emulate(kind, deferred.emulation_data)
                deferred.emulate_flags = 0
            for index in (CR0, CR4, CR3):
                if index in deferred.control_registers:
                    self._set_control_register(index, deferred.control_registers.pop(index))
            if deferred.msr is not None:
                self._write_msr(*deferred.msr)
                deferred.msr = None
        if vcpu.injected is not None:
            if vcpu.pending is None:
                vcpu.raise_trap(vcpu.injected)
            vcpu.injected = None
        trap = vcpu.pending
        if vcpu.deferred is not None and vcpu.next_interrupt and trap is not None:
            fields = {
                "interrupt.x86.vector": trap.vector,
                "interrupt.x86.type": trap.kind,
                "interrupt.x86.error_code": trap.error_code,
                "interrupt.x86.cr2": trap.cr2,
            }
            yield from self.monitor.traps(vcpu, Reason.INTERRUPT, fields)
            vcpu.next_interrupt = False

    def _fault(self, vector: int) -> None:
        """``hvm_inject_hw_exception``."""
        error_code = 0 if vector == GP else NO_ERROR_CODE
        self.vcpu.raise_trap(Trap(vector, HARDWARE_EXCEPTION, error_code, 0, 0))

    def _monitor_trap(self) -> Waits[None]:
        """``EXIT_REASON_MONITOR_TRAP_FLAG`` and ``hvm_monitor_debug``."""
        vcpu, monitor = self.vcpu, self.monitor
        if (yield from vm_exit(monitor, vcpu, _MONITOR_TRAP)):
            return
        vcpu.monitor_trap_flag = False
        if not vcpu.single_step:
            return
        heard = "singlestep" in monitor.switches
        if vcpu.fast_step_view is not None and (
            heard or monitor.domain.release.fast_singlestep_alone
        ):
            monitor.domain.switch_vcpu(vcpu, vcpu.fast_step_view)
            vcpu.single_step = False
            vcpu.fast_step_view = None
        elif heard:
            yield from monitor.traps(vcpu, Reason.SINGLESTEP, {"singlestep.gfn": self._gfn()})

    def _gfn(self) -> int:
        """``gfn_of_rip``."""
        return (self.vcpu.register("cs_base") + self.vcpu.register("rip")) // PAGE_SIZE

    # Execution by the CPU, in the vCPU's view.

    def _held(self, outcome: Outcome) -> Done:
        if outcome is Outcome.VIRTUALISATION_EXCEPTION:
            self._fault(VE)
        return Done.HELD

    def _breakpoint(self, length: int = 1) -> Waits[Done]:
        """``X86_EXC_BP`` in ``vmx_vmexit_handler``, where it exits (``vmx_do_resume``)."""
        vcpu, monitor = self.vcpu, self.monitor
        trap = Trap(BP, SOFTWARE_EXCEPTION, NO_ERROR_CODE, length, 0)
        if not monitor.switches.keys() & {"software_breakpoint", "singlestep"}:
            return (yield from self._deliver_natively(trap))
        if (yield from vm_exit(monitor, vcpu, _EXCEPTION)):
            return Done.HELD
        event = "software_breakpoint"
        fields = {
            f"{event}.gfn": self._gfn(),
            f"{event}.insn_length": length,
            f"{event}.type": SOFTWARE_EXCEPTION,
        }
        if not (yield from monitor.report(event, vcpu, Reason.SOFTWARE_BREAKPOINT, fields)):
            vcpu.raise_trap(trap)
        return Done.HELD

    def _deliver_natively(self, trap: Trap) -> Waits[Done]:
        """Deliver what the CPU raises, or have it delivered when memory that it needs is there."""
        self.vcpu.raise_trap(trap)
        return Done.NATIVE if (yield from self._deliver(trap)) else Done.HELD

    def _apply(self, effect: Effect | None, length: int) -> Waits[Done]:
        """The effect of the instruction at rip, and Xen's part in it."""
        vcpu, monitor = self.vcpu, self.monitor
        done = Done.EXITED
        match effect:
            case None:
                done = Done.NATIVE
            case SetRegisters(values):
                vcpu.set_registers(values)
                done = Done.NATIVE
            case WriteControlRegister(index, value):
                done = yield from self._move_to_control_register(index, value)
            case WriteMsr(msr, value):
                if msr in DIRECT_MSRS - monitor.intercepted_msrs:
                    self._write_msr(msr, value)
                    done = Done.NATIVE
                elif (yield from vm_exit(monitor, vcpu, _MSR_WRITE)):
                    done = Done.HELD
                else:
                    yield from self._intercept_msr(msr, value)
            case Cpuid():
                if (yield from vm_exit(monitor, vcpu, _CPUID)):
                    return Done.HELD
                fields = {
                    "cpuid.insn_length": length,
                    "cpuid.leaf": vcpu.register("rax") & 0xFFFF_FFFF,
                    "cpuid.subleaf": vcpu.register("rcx") & 0xFFFF_FFFF,
                }
                vcpu.set_registers(effect.registers)
                if (yield from monitor.report("cpuid", vcpu, Reason.CPUID, fields)):
                    done = Done.HELD
            case DescriptorAccess():
                done = yield from self._access_descriptor(effect)
            case PortIo():
                done = yield from self._port_io(effect)
            case GuestRequest():
                if (yield from vm_exit(monitor, vcpu, EXIT_VMCALL)):
                    return Done.HELD
                yield from monitor.report("guest_request", vcpu, Reason.GUEST_REQUEST, {})
                vcpu.set_register("rax", 0)
            case DebugException(kind):
                done = yield from self._debug_exception(kind, length)
            case Halt():
                if (yield from vm_exit(monitor, vcpu, EXIT_HLT)):
                    return Done.HELD
                vcpu.halted = True
        return done

    def _move_to_control_register(self, index: int, value: int) -> Waits[Done]:
        """``vmx_cr_access`` and ``EXIT_REASON_XSETBV``, where the CPU exits for the write."""
        if not self._exits(index, value):
            self._set_control_register(index, value)
            return Done.NATIVE
        vcpu, monitor = self.vcpu, self.monitor
        reason = _XSETBV if index == XCR0 else _CR_ACCESS
        number = {CR0: 0, CR3: 3, CR4: 4, XCR0: 0}[index]
        if (yield from vm_exit(monitor, vcpu, reason, number)):
            return Done.HELD
        if index == XCR0:  # hvm_handle_xsetbv tells of it and writes it, whatever the answer
            yield from self._monitor_control_register(index, value)
            written = self._write_control_register(index, value)
        else:
            written = yield from self._try_control_register(index, value)
        if not written:
            self._fault(GP)
        return Done.EXITED if written else Done.HELD

    def _exits(self, index: int, value: int) -> bool:
        """Whether a write leaves guest mode (``vmx_update_guest_cr``)."""
        if index == CR3:
            return "ctrlreg 1" in self.monitor.switches
        if index == XCR0:
            return True
        mask = ~0
        if index == CR4:
            mask = _CR4_HOST_MASK
            options = self.monitor.switches.get("ctrlreg 2")
            if options is not None:
                mask |= ~options["bitmask"]
        return bool((value ^ self._control_register(index)) & mask)

    def _control_register(self, index: int) -> int:
        if index == XCR0:
            return self.vcpu.xcr0
        return self.vcpu.register(("cr0", "cr3", "cr4")[index])

    def _set_control_register(self, index: int, value: int) -> None:
        if index == XCR0:
            self.vcpu.xcr0 = value
        else:
            self.vcpu.set_register(("cr0", "cr3", "cr4")[index], value)

    def _valid_control_register(self, index: int, value: int) -> int | None:
        """What ``hvm_set_cr0``, ``hvm_set_cr3``, ``hvm_set_cr4`` write; None for a #GP."""
        if index == CR0:
            if value >> 32:
                return None
            value = (value & _CR0_BITS) | CR0_ET
            return None if value & (CR0_PE | CR0_PG) == CR0_PG else value
        if index == CR3:
            bits = self.monitor.domain.machine.physical_address_bits
            return None if value >> bits else value
        if index == CR4:
            return None if value & ~_CR4_BITS else value
        return value if value & 1 else None

    def _write_control_register(self, index: int, value: int) -> bool:
        """Write one; False for a #GP."""
        valid = self._valid_control_register(index, value)
        if valid is None:
            return False
        self._set_control_register(index, valid)
        return True

    def _try_control_register(self, index: int, value: int) -> Waits[bool]:
        """``hvm_set_cr*`` with ``may_defer``: False for a #GP."""
        valid = self._valid_control_register(index, value)
        if valid is None:
            return False
        defers = yield from self._monitor_control_register(index, valid)
        if defers and self.vcpu.deferred is not None:
            self.vcpu.deferred.control_registers[index] = valid
        else:
            self._set_control_register(index, valid)
        return True

    def _monitor_control_register(self, index: int, value: int) -> Waits[bool]:
        """``hvm_monitor_cr``: True if the write waits for the vCPU to run again."""
        monitor, old = self.monitor, self._control_register(index)
        options = monitor.switches.get(f"ctrlreg {index}")
        if (
            options is None
            or (options["onchangeonly"] and value == old)
            or not (value ^ old) & ~options["bitmask"]
        ):
            return False
        fields = {
            "write_ctrlreg.index": index,
            "write_ctrlreg.new_value": value,
            "write_ctrlreg.old_value": old,
        }
        yield from monitor.traps(
            self.vcpu, Reason.WRITE_CTRLREG, fields, sync=bool(options["sync"])
        )
        return monitor.gates_writes

    def _read_msr(self, msr: int) -> int:
        name = MSR_REGISTERS.get(msr)
        return self.vcpu.register(name) if name else self.vcpu.msrs.get(msr, 0)

    def _write_msr(self, msr: int, value: int) -> None:
        name = MSR_REGISTERS.get(msr)
        if name:
            self.vcpu.set_register(name, value)
        else:
            self.vcpu.msrs[msr] = value

    def _intercept_msr(self, msr: int, value: int) -> Waits[None]:
        """``hvm_msr_write_intercept`` with ``may_defer``, and ``hvm_monitor_msr``."""
        monitor, old = self.monitor, self._read_msr(msr)
        options = monitor.switches.get(f"msr {msr:#x}")
        if options is not None and not (options["onchangeonly"] and value == old):
            fields = {
                "mov_to_msr.msr": msr,
                "mov_to_msr.new_value": value,
                "mov_to_msr.old_value": old,
            }
            yield from monitor.traps(self.vcpu, Reason.MOV_TO_MSR, fields)
            if monitor.gates_writes and self.vcpu.deferred is not None:
                self.vcpu.deferred.msr = msr, value
                return
        self._write_msr(msr, value)

    def _access_descriptor(self, effect: DescriptorAccess) -> Waits[Done]:
        """``hvm_descriptor_access_intercept``: left to the response, which can have it emulated."""
        monitor, vcpu = self.monitor, self.vcpu
        if "descriptor_access" not in monitor.switches:
            return Done.NATIVE
        reason = _GDTR_OR_IDTR if effect.descriptor in (1, 2) else _LDTR_OR_TR
        if not (yield from vm_exit(monitor, vcpu, reason, effect.exit_qualification)):
            fields = {
                "desc_access.arch.vmx.instr_info": effect.instr_info,
                "desc_access.arch.vmx.exit_qualification": effect.exit_qualification,
                "desc_access.descriptor": effect.descriptor,
                "desc_access.is_write": effect.is_write,
            }
            yield from monitor.traps(vcpu, Reason.DESCRIPTOR_ACCESS, fields)
        return Done.HELD

    def _port_io(self, effect: PortIo) -> Waits[Done]:
        """``EXIT_REASON_IO_INSTRUCTION``."""
        monitor, vcpu = self.monitor, self.vcpu
        qualification = (
            (effect.size - 1) | effect.is_in << 3 | effect.is_string << 4 | effect.port << 16
        )
        if (yield from vm_exit(monitor, vcpu, _IO, qualification)):
            return Done.HELD
        fields = {
            "io.bytes": effect.size,
            "io.port": effect.port,
            "io.in": effect.is_in,
            "io.str": effect.is_string,
        }
        if (yield from monitor.report("io", vcpu, Reason.IO_INSTRUCTION, fields)):
            return Done.HELD
        self._complete_io(effect)
        return Done.EXITED

    def _complete_io(self, effect: PortIo) -> None:
        if effect.is_in:
            self.vcpu.set_register("rax", effect.value)

    def _debug_exception(self, kind: int, length: int, *, was_pending: bool = False) -> Waits[Done]:
        """``X86_EXC_DB`` in ``vmx_vmexit_handler``."""
        vcpu, monitor = self.vcpu, self.monitor
        traps = kind == HARDWARE_EXCEPTION
        if traps:
            if length:
                self._advance(length)
            length = 0
            if vcpu.monitor_trap_flag and not was_pending:  # its exit comes first (SDM 3C, 26.5.2)
                vcpu.step_pending = True
                return Done.NATIVE
        done = Done.EXITED if traps else Done.HELD  # INT1 comes again, a trap does not
        if (yield from vm_exit(monitor, vcpu, _EXCEPTION, DR6_STEP if traps else 0)):
            return done
        vcpu.set_register("dr6", DR6_DEFAULT | (DR6_STEP if traps else 0))
        fields = {
            "debug_exception.gfn": self._gfn(),
            "debug_exception.insn_length": length,
            "debug_exception.type": kind,
        }
        event = "debug_exceptions"
        if not (yield from monitor.report(event, vcpu, Reason.DEBUG_EXCEPTION, fields)):
            vcpu.raise_trap(Trap(DB, kind, NO_ERROR_CODE, length, 0))
        return done

    # Execution by Xen's emulator, in the host p2m.

    def _cannot_emulate(self, *, answered: bool) -> Waits[None]:
        """What comes of an instruction that the emulator does not know."""
        if not answered:  # hvm_emulate_one_insn: it comes again, and nobody is told
            return
        event = "emul_unimplemented"
        if not (yield from self.monitor.report(event, self.vcpu, Reason.EMUL_UNIMPLEMENTED, {})):
            self._fault(UD)

    def _emulate_effect(self, effect: Effect | None, length: int) -> Waits[bool]:
        """False where an exception takes its place; few effects are heard of here."""
        vcpu = self.vcpu
        match effect:
            case SetRegisters(values):
                vcpu.set_registers(values)
            case WriteControlRegister(index, value):
                if index == XCR0:
                    written = self._write_control_register(index, value)
                else:
                    written = yield from self._try_control_register(index, value)
                if not written:
                    self._fault(GP)
                return written
            case WriteMsr(msr, value):
                yield from self._intercept_msr(msr, value)
            case Cpuid():
                vcpu.set_registers(effect.registers)
            case PortIo():
                self._complete_io(effect)
            case DebugException(kind) if kind == HARDWARE_EXCEPTION:
                self._advance(length)
                self._fault(DB)
            case DebugException(kind):
                vcpu.raise_trap(Trap(DB, kind, NO_ERROR_CODE, length, 0))
                return False
            case Halt():
                vcpu.halted = True
            case _:
                pass
        return True

    # Memory.

    @property
    def _table(self) -> P2m:
        """That of the view the vCPU is in."""
        domain = self.monitor.domain
        return domain.views[self.vcpu.view].table if domain.active else domain.host

    def _find_in_view(self, gfn: int) -> Lookup:
        return self._table.lookup(gfn)

    def _bytes_in_view(self, address: int, size: int) -> bytes:
        parts = (self._frame(self._find_in_view(gfn)) for gfn in _gfns(address, size))
        return _cut(b"".join(parts), address, size)

    def _store_in_view(self, address: int, data: bytes) -> None:
        domain = self.monitor.domain
        for offset, one in enumerate(data):
            gfn, at = divmod(address + offset, PAGE_SIZE)
            domain.machine.frames.page(self._find_in_view(gfn).mfn)[at] = one

    def _bytes_in_host(self, address: int, size: int) -> bytes:
        domain = self.monitor.domain
        parts = (
            self._frame(domain.host_lookup(gfn, populate=True)) for gfn in _gfns(address, size)
        )
        return _cut(b"".join(parts), address, size)

    def _store_in_host(self, address: int, data: bytes) -> None:
        """``hvm_copy_to_guest_phys``: dropped where the page is read-only or none."""
        domain = self.monitor.domain
        for offset, one in enumerate(data):
            gfn, at = divmod(address + offset, PAGE_SIZE)
            found = domain.host_lookup(gfn, populate=True, unshare=True)
            if found.valid and found.type not in WRITES_DROPPED:
                domain.machine.frames.page(found.mfn)[at] = one

    def _frame(self, found: Lookup) -> bytes:
        """A page's contents; of no memory, what a bus that nobody answers on gives."""
        if not found.valid:
            return b"\xff" * PAGE_SIZE
        return bytes(self.monitor.domain.machine.frames.page(found.mfn))


WRITES_DROPPED = {PageType.RAM_RO, PageType.GRANT_MAP_RO}


def run(
    processors: Sequence[Processor], steps: int | None, chance: Random, turns: float = math.inf
) -> int:
    """Let vCPUs run in turn, until none can or there were so many steps (None: however many).

    A step is an instruction, or an attempt of one that executes none. A turn of machine code has
    several; where several vCPUs can run, how many is a matter of chance. Where one can, and steps
    are not counted, it goes on without an end: it is then several times as fast. What leaves guest
    mode ends a turn and takes as long as a thousand instructions: so turns have a limit, too.

    Returns:
        How many instructions were executed, of those that were counted.
    """
    executed = 0
    left = math.inf if steps is None else steps
    while left > 0 and turns > 0:
        ready = [processor for processor in processors if processor.ready]
        if not ready:
            break
        for processor in ready:
            if left <= 0 or not processor.ready:
                continue
            limit = _SLICE if len(ready) == 1 else chance.randint(1, _SLICE)
            alone = steps is None and len(ready) == 1
            count = processor.step(0 if alone else int(min(limit, left)))
            executed += count
            left -= max(count, 1)
        turns -= len(ready)
    return executed


def needs_reinjection(trap: Trap) -> bool:
    """``hvm_event_needs_reinjection``: not if an instruction raises it again."""
    if trap.kind == HARDWARE_EXCEPTION:
        return trap.vector not in (BP, OF)
    return trap.kind in (EXTERNAL_INTERRUPT, NMI)


def moves_itself(effect: Effect | None) -> bool:
    """Whether an effect has set rip, or left it to Xen."""
    if isinstance(effect, SetRegisters):
        return "rip" in effect.values
    return isinstance(effect, DebugException) and effect.kind == HARDWARE_EXCEPTION


def _emulation_kind(flags: int) -> Flag:
    """``hvm_emulate_one_vm_event``: the first that is asked for counts."""
    kinds = Flag.SET_EMUL_READ_DATA, Flag.EMULATE_NOWRITE, Flag.SET_EMUL_INSN_DATA
    return next((kind for kind in kinds if flags & kind), Flag(0))


def pages(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield what of a range is in each page: its first address and its size."""
    end = address + size
    while True:
        count = min(PAGE_SIZE - address % PAGE_SIZE, end - address)
        yield address, count
        address += count
        if address >= end:
            return


def _gfns(address: int, size: int) -> range:
    return range(address // PAGE_SIZE, (address + max(size, 1) - 1) // PAGE_SIZE + 1)


def _cut(pages: bytes, address: int, size: int) -> bytes:
    start = address % PAGE_SIZE
    return pages[start : start + size]
