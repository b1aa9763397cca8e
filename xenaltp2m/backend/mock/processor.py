# SPDX-License-Identifier: LGPL-2.1-or-later
"""A vCPU that executes, and what Xen makes of it when it leaves guest mode.

What executes, a script or machine code, is a subclass's. Xen's part is restated here: the exit
handlers of ``vmx.c``, ``hvm/monitor.c``, ``hvm_do_resume``.

What decides between a step and none: an instruction that leaves guest mode and is completed by
Xen causes no monitor trap, its successor does; so it is on the CPU, too.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import signal
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from xenaltp2m.abi.vm_event import Flag, Reason
from xenaltp2m.abi.x86 import BP, DB, GP, NO_ERROR_CODE, OF, UD, VE
from xenaltp2m.backend.mock.effects import (
    Cpuid,
    DebugException,
    DescriptorAccess,
    Done,
    Effect,
    GuestRequest,
    Halt,
    PortIo,
    SetRegisters,
    WriteControlRegister,
    WriteMsr,
)
from xenaltp2m.backend.mock.guest import Outcome, drive, vm_exit
from xenaltp2m.backend.mock.machine import Livelock
from xenaltp2m.backend.mock.monitor import CR0, CR3, CR4, XCR0, Monitor
from xenaltp2m.backend.mock.physical_memory import PhysicalMemory
from xenaltp2m.backend.mock.system_registers import SystemRegisters
from xenaltp2m.backend.mock.vcpu import (
    DR6_DEFAULT,
    EXTERNAL_INTERRUPT,
    HARDWARE_EXCEPTION,
    NMI,
    SOFTWARE_EXCEPTION,
    Deferred,
    Trap,
    Vcpu,
    Waits,
)
from xenaltp2m.types import PAGE_SIZE

# EXIT_REASON_* (asm/hvm/vmx/vmx.h).
_EXCEPTION, _CPUID, EXIT_HLT, EXIT_VMCALL, _CR_ACCESS, _IO = 0, 10, 12, 18, 28, 30
EXIT_MSR_READ, _MSR_WRITE = 31, 32
_MONITOR_TRAP, _GDTR_OR_IDTR, _LDTR_OR_TR, _XSETBV, EXIT_VMFUNC = 37, 46, 47, 55, 59

_NANOSECONDS = 1000
"""What an attempt to execute an instruction takes."""
_OF_A_FAULT = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
_SIGNALS = set(map(int, signal.valid_signals() - _OF_A_FAULT))

DR6_STEP = 1 << 14

DIRECT_MSRS = {0x174, 0x175, 0x176, 0x277, 0xC0000100, 0xC0000101, 0xC0000102}
"""Written without an exit until they are monitored (``construct_vmcs``)."""


@dataclass(eq=False)
class Processor(ABC):
    """A vCPU and what it executes."""

    executes_code: ClassVar[bool] = False
    """Whether it is machine code; it then goes on by itself while an agent waits."""

    monitor: Monitor
    vcpu: Vcpu
    _memory: PhysicalMemory = field(init=False)
    _registers: SystemRegisters = field(init=False)

    def __post_init__(self) -> None:
        self._memory = PhysicalMemory(self.monitor.domain, self.vcpu)
        self._registers = SystemRegisters(self.monitor, self.vcpu)

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
            yield from self._apply_deferred(deferred)
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

    def _apply_deferred(self, deferred: Deferred) -> Waits[None]:
        """Apply what responses asked for (``hvm_vm_event_do_resume``)."""
        if deferred.registers is not None:
            self.vcpu.set_registers(deferred.registers)
            deferred.registers = None
        if deferred.emulate_flags:
            kind = _emulation_kind(deferred.emulate_flags)
            yield from self._emulate(kind, deferred.emulation_data)
            deferred.emulate_flags = 0
        for index in (CR0, CR4, CR3):
            if index in deferred.control_registers:
                self._registers.set_control(index, deferred.control_registers.pop(index))
        if deferred.msr is not None:
            self._registers.write_msr(*deferred.msr)
            deferred.msr = None

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
        """Apply the effect of the instruction at rip, and Xen's part in it."""
        if effect is None:
            return Done.NATIVE
        if isinstance(effect, SetRegisters):
            self.vcpu.set_registers(effect.values)
            return Done.NATIVE
        return (yield from self._apply_exiting(effect, length))

    def _apply_exiting(self, effect: Effect, length: int) -> Waits[Done]:
        """Apply an effect that leaves guest mode, always or where a monitor asks for it."""
        done = Done.EXITED
        match effect:
            case WriteControlRegister(index, value):
                done = yield from self._move_to_control_register(index, value)
            case WriteMsr(msr, value):
                done = yield from self._move_to_msr(msr, value)
            case Cpuid():
                done = yield from self._identify(effect, length)
            case DescriptorAccess():
                done = yield from self._access_descriptor(effect)
            case PortIo():
                done = yield from self._port_io(effect)
            case GuestRequest():
                done = yield from self._request()
            case DebugException(kind):
                done = yield from self._debug_exception(kind, length)
            case Halt():
                if (yield from vm_exit(self.monitor, self.vcpu, EXIT_HLT)):
                    return Done.HELD
                self.vcpu.halted = True
        return done

    def _move_to_msr(self, msr: int, value: int) -> Waits[Done]:
        """``EXIT_REASON_MSR_WRITE``, where the CPU exits for the write."""
        monitor = self.monitor
        if msr in DIRECT_MSRS - monitor.intercepted_msrs:
            self._registers.write_msr(msr, value)
            return Done.NATIVE
        if (yield from vm_exit(monitor, self.vcpu, _MSR_WRITE)):
            return Done.HELD
        yield from self._registers.intercept_msr(msr, value)
        return Done.EXITED

    def _identify(self, effect: Cpuid, length: int) -> Waits[Done]:
        """``EXIT_REASON_CPUID``."""
        vcpu, monitor = self.vcpu, self.monitor
        if (yield from vm_exit(monitor, vcpu, _CPUID)):
            return Done.HELD
        fields = {
            "cpuid.insn_length": length,
            "cpuid.leaf": vcpu.register("rax") & 0xFFFF_FFFF,
            "cpuid.subleaf": vcpu.register("rcx") & 0xFFFF_FFFF,
        }
        vcpu.set_registers(effect.registers)
        paused = yield from monitor.report("cpuid", vcpu, Reason.CPUID, fields)
        return Done.HELD if paused else Done.EXITED

    def _request(self) -> Waits[Done]:
        """``HVMOP_guest_request_vm_event``."""
        vcpu, monitor = self.vcpu, self.monitor
        if (yield from vm_exit(monitor, vcpu, EXIT_VMCALL)):
            return Done.HELD
        yield from monitor.report("guest_request", vcpu, Reason.GUEST_REQUEST, {})
        vcpu.set_register("rax", 0)
        return Done.EXITED

    def _move_to_control_register(self, index: int, value: int) -> Waits[Done]:
        """``vmx_cr_access`` and ``EXIT_REASON_XSETBV``, where the CPU exits for the write."""
        if not self._registers.exits(index, value):
            self._registers.set_control(index, value)
            return Done.NATIVE
        vcpu, monitor = self.vcpu, self.monitor
        reason = _XSETBV if index == XCR0 else _CR_ACCESS
        number = {CR0: 0, CR3: 3, CR4: 4, XCR0: 0}[index]
        if (yield from vm_exit(monitor, vcpu, reason, number)):
            return Done.HELD
        if index == XCR0:  # hvm_handle_xsetbv reports and writes it, whatever the answer
            yield from self._registers.report_control(index, value)
            written = self._registers.write_control(index, value)
        else:
            written = yield from self._registers.try_control(index, value)
        if not written:
            self._fault(GP)
        return Done.EXITED if written else Done.HELD

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
        """Report an instruction that the emulator does not know, or raise #UD."""
        if not answered:  # hvm_emulate_one_insn: it comes again, and no event reports it
            return
        event = "emul_unimplemented"
        if not (yield from self.monitor.report(event, self.vcpu, Reason.EMUL_UNIMPLEMENTED, {})):
            self._fault(UD)

    def _emulate_effect(self, effect: Effect | None, length: int) -> Waits[bool]:
        """Apply an effect; False where an exception takes its place. Few effects cause events."""
        vcpu = self.vcpu
        match effect:
            case SetRegisters(values):
                vcpu.set_registers(values)
            case WriteControlRegister(index, value):
                return (yield from self._emulate_control_write(index, value))
            case WriteMsr(msr, value):
                yield from self._registers.intercept_msr(msr, value)
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

    def _emulate_control_write(self, index: int, value: int) -> Waits[bool]:
        """Write a control register as the emulator does; False where a #GP takes its place."""
        if index == XCR0:
            written = self._registers.write_control(index, value)
        else:
            written = yield from self._registers.try_control(index, value)
        if not written:
            self._fault(GP)
        return written


def needs_reinjection(trap: Trap) -> bool:
    """``hvm_event_needs_reinjection``: not if an instruction raises it again."""
    if trap.kind == HARDWARE_EXCEPTION:
        return trap.vector not in (BP, OF)
    return trap.kind in (EXTERNAL_INTERRUPT, NMI)


def _emulation_kind(flags: int) -> Flag:
    """``hvm_emulate_one_vm_event``: the first that is asked for counts."""
    kinds = Flag.SET_EMUL_READ_DATA, Flag.EMULATE_NOWRITE, Flag.SET_EMUL_INSN_DATA
    return next((kind for kind in kinds if flags & kind), Flag(0))
