# SPDX-License-Identifier: LGPL-2.1-or-later
"""Simulator: vCPUs that execute machine code in the view they are in.

:mod:`~xenaltp2m.backend.mock.execution` has the core execute;
:mod:`~xenaltp2m.backend.mock.virtual_memory` gives it the frames that the domain's tables allow.
An access that they do not allow goes through :func:`~xenaltp2m.backend.mock.guest.access`, as Xen
would handle it, and all other exits through :class:`~xenaltp2m.backend.mock.processor.Processor`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from xenaltp2m.abi.vm_event import Flag
from xenaltp2m.abi.x86 import (
    BP,
    DB,
    DF,
    FLAG_IF,
    FLAG_OF,
    FLAG_RF,
    FLAG_TF,
    GP,
    NO_ERROR_CODE,
    OF,
    PF,
    SYSCALL,
    SYSENTER,
    UD,
    VE,
    Decoded,
    Fault,
    doubled,
    has_error_code,
    is_inc_or_dec,
    is_privileged,
)
from xenaltp2m.backend.mock.core import Core
from xenaltp2m.backend.mock.cpu_mode import CpuMode
from xenaltp2m.backend.mock.effects import (
    DescriptorAccess,
    Done,
    Effect,
    Halt,
    PortIo,
    moves_itself,
)
from xenaltp2m.backend.mock.emulator import Emulator
from xenaltp2m.backend.mock.engine import (
    LONGEST_INSTRUCTION,
    ReadsAhead,
    SoftwareInterrupt,
    WritesCode,
)
from xenaltp2m.backend.mock.execution import Execution, Stopped
from xenaltp2m.backend.mock.guest import AT_PAGE, Outcome, access, vm_exit
from xenaltp2m.backend.mock.hypercalls import hypercall
from xenaltp2m.backend.mock.instructions import (
    FROM_DEBUG,
    INT3,
    INT_N,
    INTO,
    RDMSR,
    TO_DEBUG,
    VMCALL,
    VMFUNC,
    call_system,
    effect_of,
    move_debug_register,
)
from xenaltp2m.backend.mock.interrupt_gates import InterruptGates
from xenaltp2m.backend.mock.machine import SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT
from xenaltp2m.backend.mock.monitor import Monitor
from xenaltp2m.backend.mock.processor import (
    DIRECT_MSRS,
    DR6_STEP,
    EXIT_HLT,
    EXIT_MSR_READ,
    EXIT_VMCALL,
    EXIT_VMFUNC,
    Processor,
    needs_reinjection,
)
from xenaltp2m.backend.mock.system_registers import LongModeRegisters
from xenaltp2m.backend.mock.vcpu import (
    EFER,
    HARDWARE_EXCEPTION,
    SOFTWARE_EXCEPTION,
    SOFTWARE_INTERRUPT,
    Trap,
    Waits,
)
from xenaltp2m.backend.mock.virtual_memory import Denied, VirtualMemory
from xenaltp2m.types import PAGE_SIZE

_U32, _U64 = 0xFFFF_FFFF, (1 << 64) - 1
_IRET, _EMULATED_PREFIXES = b"\xcf", b"\x48\x66"
_DEBUG_PORT = 0xE9
_VM_FUNCTIONS = 64
"""The first number of a VM function that raises #UD without an exit."""


class _AtExit(Enum):
    """The core has stopped where the instruction at rip may exit."""

    REACHED = auto()


@dataclass(eq=False)
class MachineCode(Processor):
    """A vCPU on a core."""

    executes_code = True

    core: Core
    console: bytearray
    """What was written to port 0xe9."""
    _mode: CpuMode = field(init=False)
    _virtual: VirtualMemory = field(init=False)
    _execution: Execution = field(init=False)
    _gates: InterruptGates = field(init=False)
    _emulator: Emulator = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        vcpu, monitor = self.vcpu, self.monitor
        self._registers = LongModeRegisters(monitor, vcpu)
        self._mode = mode = CpuMode(vcpu)
        self._virtual = VirtualMemory(monitor.domain, vcpu, mode, self.core, self._memory)
        self._execution = Execution(self.core, vcpu, mode, self._virtual)
        self._gates = InterruptGates(vcpu, mode, self._virtual)
        self._emulator = Emulator(monitor, vcpu, mode, self._virtual, self._execution)

    def close(self) -> None:
        """Give back the core's own memory."""
        self.core.close()

    @property
    def written(self) -> bytes:
        """What the domain wrote to port 0xe9."""
        return bytes(self.console)

    @property
    def _has_work(self) -> bool:
        return True

    # What a hypercall needs of its caller.

    @property
    def long(self) -> bool:
        """Whether it is in 64-bit mode."""
        return self._mode.is_64_bit

    @property
    def privilege(self) -> int:
        """The current privilege level."""
        return self._mode.privilege

    def copy_from(self, linear: int, size: int) -> bytes:
        """``copy_from_guest``: what the host p2m has, whatever the view."""
        return self._virtual.copy_from(linear, size)

    def copy_to(self, linear: int, data: bytes) -> None:
        """``copy_to_guest``."""
        self._virtual.copy_to(linear, data)

    def _gfn(self) -> int:
        """``gfn_of_rip``: by a walk that no view restricts."""
        mode = self._mode
        try:
            address = self._virtual.translate_in_host(mode.rip_va, "x", mode.privilege == 3)
        except Fault:
            return _U64
        return address // PAGE_SIZE

    # Execution by the CPU, in the vCPU's view.

    def _execute(self, limit: int) -> Waits[tuple[Done, int]]:
        execution = self._execution
        execution.executed = 0
        try:
            stopped = self._execute_on_core(limit)
            if stopped is _AtExit.REACHED:
                done = yield from self._execute_exiting()
                return done, int(done is not Done.HELD)
        except Fault as fault:
            stopped = fault
            if fault.vector == PF:
                execution.locate_fault(fault)
        except Denied as denied:
            done = yield from self._violate(denied)
            return done, execution.executed + (done is not Done.HELD)
        if stopped is not None:
            return (yield from self._interrupted(stopped)), execution.executed
        if not self.vcpu.monitor_trap_flag and not self.core.exits_at(self._mode.rip_va):
            self.core.stayed = True
        return Done.NATIVE, execution.executed

    def _execute_on_core(self, limit: int) -> Stopped | _AtExit:
        """Execute up to ``limit`` instructions that do not exit."""
        register, core, mode = self.vcpu.register, self.core, self._mode
        execution, virtual = self._execution, self._virtual
        code = b""
        if self.vcpu.monitor_trap_flag or register("rflags") & FLAG_TF:
            # The engine that executes one instruction does not stop where that exits.
            code = virtual.fetch(mode.rip_va)
        if core.exits_at(mode.rip_va):
            return _AtExit.REACHED
        if self.vcpu.monitor_trap_flag:
            return execution.step_natively(code)
        rip, count = register("rip"), register("rcx")
        try:
            stopped = execution.run(limit)
            execution.mark_repetition(rip, count, code)
        except (ReadsAhead, WritesCode):
            stopped = None
            if not core.exits_at(mode.rip_va):  # now that its page is known
                stopped = execution.step_natively(virtual.fetch(mode.rip_va))
        stayed = register("rip") == rip and not execution.executed and stopped is None
        if stayed and core.exits_at(mode.rip_va):  # as its page is known now
            return _AtExit.REACHED
        return stopped

    def _violate(self, denied: Denied) -> Waits[Done]:
        """``EXIT_REASON_EPT_VIOLATION``: Xen handles it, and the instruction comes again."""
        va, kind = self._execution.locate(denied.va, denied.wanted)
        if denied.flags == AT_PAGE:
            denied.kind = kind
        outcome = yield from self._access(denied, va)
        if outcome is Outcome.EMULATED:
            if denied.kind == "x":
                self._fault(GP)
            else:
                completed = yield from self._emulate_at_rip(Flag(0), b"", answered=False)
                return Done.EXITED if completed else Done.HELD
        if outcome is Outcome.VIRTUALISATION_EXCEPTION:
            return (yield from self._raise(Fault(VE)))
        return Done.HELD

    def _access(self, denied: Denied, va: int, delivered: Trap | None = None) -> Waits[Outcome]:
        """Leave guest mode for an access, now that its virtual address is known."""
        physical = denied.physical
        if denied.flags == AT_PAGE:
            physical = physical & ~(PAGE_SIZE - 1) | va % PAGE_SIZE
        if delivered is None or (delivered.vector, delivered.kind) != (DB, HARDWARE_EXCEPTION):
            self._mode.set_resume_flag()  # a trap's RF is pushed as it is (SDM 3C, 28.3.3)
        about = physical, denied.kind, va, denied.flags
        delivers = delivered is not None
        return (yield from access(self.monitor, self.vcpu, *about, delivers=delivers))

    # Exceptions.

    def _raise(self, fault: Fault) -> Waits[Done]:
        """Raise an exception that the CPU delivers by itself."""
        code = fault.error_code if has_error_code(fault.vector) else NO_ERROR_CODE
        trap = Trap(fault.vector, HARDWARE_EXCEPTION, code, 0, fault.address)
        if fault.vector == UD and self._virtual.fetch(self._mode.rip_va)[0] == INT3:
            return (yield from self._breakpoint())
        return (yield from self._deliver_natively(trap))

    def _interrupted(self, stopped: Fault | SoftwareInterrupt) -> Waits[Done]:
        """Raise what stopped the core: Unicorn reports exceptions with rip at the instruction."""
        if isinstance(stopped, Fault):
            return (yield from self._raise(stopped))
        if stopped.vector == DB:
            return (yield from self._apply_trap_flag())
        return (yield from self._raise(Fault(stopped.vector, 0)))

    def _apply_trap_flag(self) -> Waits[Done]:
        return (yield from self._debug_exception(HARDWARE_EXCEPTION, 0))

    def _deliver(self, trap: Trap) -> Waits[bool]:
        vcpu = self.vcpu
        while True:
            try:
                self._gates.enter(trap)
            except Denied as denied:  # vmx_idtv_reinject; other instructions come again
                vcpu.pending = trap if needs_reinjection(trap) else None
                outcome = yield from self._access(denied, denied.va, trap)
                if outcome is not Outcome.DONE or vcpu.pending is None:
                    return False
            except Fault as fault:
                if trap.vector == DF:
                    vcpu.pending = None
                    self.monitor.domain.shut_down(SHUTDOWN_REBOOT)  # hvm_triple_fault
                    return False
                double = doubled(trap.vector, fault.vector)
                vector = DF if double else fault.vector
                code = 0 if double else fault.error_code
                address = fault.address if vector == PF else 0
                trap = Trap(vector, HARDWARE_EXCEPTION, code, 0, address)
            else:
                vcpu.pending = None
                vcpu.delivered.append((trap.vector, trap.kind))
                return True

    # Instructions that exit.

    def _advance(self, length: int) -> None:
        vcpu = self.vcpu
        self._mode.advance(length)
        if vcpu.register("rflags") & FLAG_TF:  # vmx_inject_event sets dr6, too
            vcpu.set_register("dr6", vcpu.register("dr6") | DR6_STEP)
            vcpu.raise_trap(Trap(DB, HARDWARE_EXCEPTION, NO_ERROR_CODE, 0, 0))

    def _complete(self, length: int) -> Waits[Done]:
        """Complete the instruction at rip as the CPU itself does."""
        self._mode.advance(length)
        if self.vcpu.register("rflags") & FLAG_TF:
            return (yield from self._apply_trap_flag())
        return Done.NATIVE

    def _execute_exiting(self) -> Waits[Done]:
        """Execute an instruction that the core must not execute alone, or bytes that look so."""
        mode, fetch = self._mode, self._virtual.fetch
        va = mode.rip_va
        room = PAGE_SIZE - va % PAGE_SIZE
        code = fetch(va)
        found = mode.decode(code)
        if found is None and room < LONGEST_INSTRUCTION and not is_inc_or_dec(code, self.long):
            found = mode.decode(code + fetch(va + room))
        if found is None:
            return (yield from self._execute_alone())
        return (yield from self._dispatch(found))

    def _execute_alone(self) -> Waits[Done]:
        stopped = self._execution.step_natively(self._virtual.fetch(self._mode.rip_va))
        return Done.NATIVE if stopped is None else (yield from self._interrupted(stopped))

    def _dispatch(self, found: Decoded) -> Waits[Done]:
        self.vcpu.set_register("rflags", self.vcpu.register("rflags") & ~FLAG_RF)
        opcode, length = found.opcode, found.length
        if opcode == INT3:
            return (yield from self._breakpoint(length))
        if opcode == INT_N:
            trap = Trap(found.immediate, SOFTWARE_INTERRUPT, NO_ERROR_CODE, length, 0)
            return (yield from self._deliver_natively(trap))
        if opcode == INTO:
            return (yield from self._check_overflow(length))
        if self.privilege and is_privileged(opcode, found.modrm):
            return (yield from self._raise(Fault(GP, 0)))
        done = yield from self._execute_system(found)
        if done is not None:
            return done
        effect = effect_of(self.vcpu, self._mode, found)
        if effect is None:
            return (yield from self._execute_alone())
        if isinstance(effect, Halt):
            return (yield from self._halt(length))
        return (yield from self._execute_effect(effect, length))

    def _execute_system(self, found: Decoded) -> Waits[Done | None]:
        """Execute an instruction that no effect stands for; None if it is none of these."""
        opcode, length = found.opcode, found.length
        if (opcode, found.modrm) == VMCALL:
            return (yield from self._vmcall(length))
        if (opcode, found.modrm) == VMFUNC:
            return (yield from self._vmfunc(length))
        if opcode == RDMSR:
            return (yield from self._read_msr(length))
        if opcode in (SYSCALL, SYSENTER):
            return (yield from self._call_system(found))
        if opcode in (FROM_DEBUG, TO_DEBUG):
            move_debug_register(self.vcpu, self._mode, found)
            return (yield from self._complete(length))
        return None

    def _execute_effect(self, effect: Effect, length: int) -> Waits[Done]:
        subscribed = isinstance(effect, DescriptorAccess) and (
            "descriptor_access" in self.monitor.switches
        )
        if not length and not subscribed:  # its operand is in memory, and no event reports it
            return (yield from self._execute_alone())
        done = yield from self._apply(effect, length)
        if isinstance(effect, DescriptorAccess) and done is Done.NATIVE:
            return (yield from self._execute_alone())
        if done is Done.NATIVE:
            return (yield from self._complete(length))
        if done is Done.EXITED and not moves_itself(effect):
            self._advance(length)
        return done

    def _read_msr(self, length: int) -> Waits[Done]:
        msr = self.vcpu.register("rcx") & _U32
        if msr in DIRECT_MSRS or msr == EFER:  # construct_vmcs, vmx_update_guest_efer
            self._registers.load_msr(msr)
            return (yield from self._complete(length))
        if (yield from vm_exit(self.monitor, self.vcpu, EXIT_MSR_READ)):
            return Done.HELD
        self._registers.load_msr(msr)
        self._advance(length)
        return Done.EXITED

    def _halt(self, length: int) -> Waits[Done]:
        if (yield from vm_exit(self.monitor, self.vcpu, EXIT_HLT)):
            return Done.HELD
        self._advance(length)
        if self.vcpu.register("rflags") & FLAG_IF:
            self.vcpu.halted = True
            return Done.EXITED
        self.vcpu.online = False  # hvm_hlt, hvm_vcpu_down
        domain = self.monitor.domain
        if not domain.online_vcpus:
            domain.shut_down(SHUTDOWN_POWEROFF)
        return Done.EXITED

    def _complete_io(self, effect: PortIo) -> None:
        size = (1 << 8 * effect.size) - 1
        if effect.is_in:
            kept = 0 if effect.size == 4 else self.vcpu.register("rax") & ~size
            self.vcpu.set_register("rax", kept | size)  # no device is at the port
        elif effect.port == _DEBUG_PORT:
            self.console.append(effect.value & 0xFF)

    def _call_system(self, found: Decoded) -> Waits[Done]:
        try:
            call_system(self.vcpu, self._mode, found)
        except Fault as fault:
            return (yield from self._raise(fault))
        if self.vcpu.register("rflags") & FLAG_TF:
            return (yield from self._apply_trap_flag())
        return Done.NATIVE

    def _check_overflow(self, length: int) -> Waits[Done]:
        """INTO."""
        if self.long:
            return (yield from self._raise(Fault(UD)))
        if not self.vcpu.register("rflags") & FLAG_OF:
            return (yield from self._complete(length))
        trap = Trap(OF, SOFTWARE_EXCEPTION, NO_ERROR_CODE, length, 0)
        return (yield from self._deliver_natively(trap))

    def _vmcall(self, length: int) -> Waits[Done]:
        if (yield from vm_exit(self.monitor, self.vcpu, EXIT_VMCALL)):
            return Done.HELD
        yield from hypercall(self)
        self.vcpu.map_cache_stale = False  # hvm_hypercall
        self._advance(length)
        return Done.EXITED

    def _vmfunc(self, length: int) -> Waits[Done]:
        """VM function 0, which switches views (SDM 3C, VM Functions; ``vmx_vmfunc_intercept``)."""
        views, vcpu = self.monitor.domain.views, self.vcpu
        function, view = vcpu.register("rax") & _U32, vcpu.register("rcx") & _U32
        if not vcpu.vm_functions or function >= _VM_FUNCTIONS:
            return (yield from self._raise(Fault(UD)))
        if function or view >= len(views) or not views[view].visible:
            if not (yield from vm_exit(self.monitor, vcpu, EXIT_VMFUNC)):
                self._fault(UD)
            return Done.HELD
        vcpu.view = view
        return (yield from self._complete(length))

    # Execution by Xen's emulator, in the host p2m.

    def _emulate(self, kind: Flag, data: bytes) -> Waits[None]:
        yield from self._emulate_at_rip(kind, data)

    def _emulate_at_rip(self, kind: Flag, data: bytes, *, answered: bool = True) -> Waits[bool]:
        """Emulate the instruction at rip; True if it is completed."""
        vcpu, mode = self.vcpu, self._mode
        replaced = data[:LONGEST_INSTRUCTION] if kind is Flag.SET_EMUL_INSN_DATA else b""
        code = replaced or self._virtual.fetch_in_host(mode.rip_va, LONGEST_INSTRUCTION)
        if code[0] == INT3:
            vcpu.raise_trap(Trap(BP, SOFTWARE_EXCEPTION, NO_ERROR_CODE, 1, 0))
            return False
        if code.lstrip(_EMULATED_PREFIXES)[:1] == _IRET:  # x86_emulate: in real mode only
            self._fault(UD)
            return False
        found = mode.decode(code)
        if found is not None:
            completed = yield from self._emulate_exiting(found, answered=answered)
            if completed is not None:
                return completed
        fault = self._emulator.execute(kind, data, code, is_replaced=bool(replaced))
        if fault is None:
            return True
        error = fault.error_code if has_error_code(fault.vector) else NO_ERROR_CODE
        vcpu.raise_trap(Trap(fault.vector, HARDWARE_EXCEPTION, error, 0, fault.address))
        return False

    def _emulate_exiting(self, found: Decoded, *, answered: bool) -> Waits[bool | None]:
        """Emulate an instruction that exits; None if the core has to execute it."""
        vcpu, mode = self.vcpu, self._mode
        if found.opcode == INT_N:
            trap = Trap(found.immediate, SOFTWARE_INTERRUPT, NO_ERROR_CODE, found.length, 0)
            vcpu.raise_trap(trap)
            return False
        if (found.opcode, found.modrm) == VMFUNC:
            self._fault(UD)  # vmx_vcpu_emulate_vmfunc, where the CPU has it
            return False
        if (found.opcode, found.modrm) == VMCALL:
            yield from self._cannot_emulate(answered=answered)
            return False
        if found.opcode in (SYSCALL, SYSENTER):
            try:
                call_system(vcpu, mode, found)
            except Fault as fault:
                self._fault(fault.vector)
                return False
            return True
        effect = effect_of(vcpu, mode, found)
        if effect is None or not found.length:
            return None
        if not (yield from self._emulate_effect(effect, found.length)):
            return False
        if not moves_itself(effect):
            self._advance(found.length)
        return True


def processors(monitor: Monitor) -> list[Processor]:
    """Make a domain's vCPUs, on one core."""
    core, console = Core(monitor.domain.machine.frames), bytearray()
    return [MachineCode(monitor, vcpu, core, console) for vcpu in monitor.domain.vcpus]
