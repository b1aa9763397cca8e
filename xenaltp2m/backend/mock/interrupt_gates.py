# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interrupt gates: how the CPU enters the guest's handler of an exception or interrupt."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from xenaltp2m.abi.x86 import (
    CR0_PE,
    DB,
    FLAG_AC,
    FLAG_IF,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    GP,
    NP,
    PF,
    Fault,
    Gate,
    Segment,
    has_error_code,
    segment_of,
)
from xenaltp2m.backend.mock.cpu_mode import CpuMode
from xenaltp2m.backend.mock.engine_state import null_stack
from xenaltp2m.backend.mock.physical_memory import pages
from xenaltp2m.backend.mock.vcpu import (
    HARDWARE_EXCEPTION,
    PRIVILEGED_EXCEPTION,
    SOFTWARE_EXCEPTION,
    SOFTWARE_INTERRUPT,
    Trap,
    Vcpu,
)
from xenaltp2m.backend.mock.virtual_memory import VirtualMemory
from xenaltp2m.types import PAGE_SIZE

_SOFTWARE = SOFTWARE_INTERRUPT, SOFTWARE_EXCEPTION
_RETURN_AFTER = *_SOFTWARE, PRIVILEGED_EXCEPTION
"""Kinds of exceptions whose handlers return to the next instruction."""
_U16, _U32, _U64 = 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1
_BIG = 1 << 10


@dataclass(eq=False)
class InterruptGates:
    """A vCPU's interrupt descriptor table, or in real mode its vector table."""

    vcpu: Vcpu
    mode: CpuMode
    memory: VirtualMemory

    def enter(self, trap: Trap) -> None:
        """Enter the handler of an exception or interrupt.

        If it raises, no register but cr2 has changed.

        Raises:
            Fault: The CPU cannot deliver it.
            Denied: The view does not allow an access that this needs.
        """
        vcpu, register = self.vcpu, self.vcpu.register
        if trap.vector == PF:
            vcpu.set_register("cr2", trap.cr2)
        rip = register("rip") + (trap.length if trap.kind in _RETURN_AFTER else 0)
        flags = register("rflags")
        if trap.kind in _RETURN_AFTER:  # an exit meanwhile has set it
            flags &= ~FLAG_RF
        if not register("cr0") & CR0_PE:
            self._enter_vector(trap.vector, [rip, register("cs_sel"), flags])
            return
        gate, code = self._find_gate(trap)
        inner = code.privilege if not code.attributes & 4 else self.mode.privilege
        changes = inner < self.mode.privilege
        selector, stack, top = self._find_stack(gate, inner)
        if trap.kind == HARDWARE_EXCEPTION and trap.vector != DB:
            flags |= FLAG_RF
        frame = [rip, register("cs_sel"), flags]
        if self.mode.long_mode or changes:
            frame += [register("rsp"), register("ss_sel")]
        if has_error_code(trap.vector) and trap.kind == HARDWARE_EXCEPTION:
            frame.insert(0, trap.error_code)
        top = self._push(frame, 8 if self.mode.long_mode else gate.width, stack, top)
        cleared = FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM | (FLAG_IF if gate.masks_interrupts else 0)
        vcpu.set_register("rflags", register("rflags") & ~cleared)
        vcpu.set_registers({"rip": gate.offset, "rsp": top})
        vcpu.set_register("cs_sel", gate.selector & ~3 | inner)
        vcpu.set_segment("cs", code._replace(attributes=code.attributes | 1))
        if changes:
            vcpu.set_register("ss_sel", selector)
            vcpu.set_segment("ss", stack)

    def _enter_vector(self, vector: int, frame: list[int]) -> None:
        """Enter a real-mode handler (SDM 3B, 21.1.4): offset and segment, and no error code."""
        vcpu, register = self.vcpu, self.vcpu.register
        if 4 * vector + 3 > register("idtr_limit"):
            raise Fault(GP, 0)
        raw = self.memory.read(register("idtr_base") + 4 * vector, 4)
        offset, selector = struct.unpack("<HH", raw)
        top = self._push(frame, 2, vcpu.segment("ss"), register("rsp"))
        cleared = FLAG_IF | FLAG_TF | FLAG_AC | FLAG_RF
        vcpu.set_registers({"rflags": register("rflags") & ~cleared, "rsp": top, "rip": offset})
        vcpu.set_registers({"cs_sel": selector, "cs_base": selector << 4})

    def _push(self, frame: list[int], width: int, stack: Segment, top: int) -> int:
        """Push words, the last first, all of them or none; return the new stack pointer."""
        long = self.mode.long_mode
        mask = _U64 if long else _U32 if stack.attributes & _BIG else _U16
        base, limit = (0, _U64) if long else (stack.base, _U32)
        parts = []
        for word in reversed(frame):
            top = top & ~mask | (top - width) & mask
            data = (word & _U64).to_bytes(8, "little")[:width]
            for start, count in pages(base + (top & mask) & limit, width):
                mfn = self.memory.resolve(start, "w", user=False).mfn
                parts.append((mfn, start, data[:count]))
                data = data[count:]
        for mfn, start, data in parts:
            frame_page = self.memory.domain.machine.frames.page(mfn)
            frame_page[start % PAGE_SIZE :][: len(data)] = data
        return top

    def _find_gate(self, trap: Trap) -> tuple[Gate, Segment]:
        """Read the gate of an exception or interrupt, and the code segment it leads to."""
        register, long = self.vcpu.register, self.mode.long_mode
        size = 16 if long else 8
        at = trap.vector * size
        external = int(trap.kind < SOFTWARE_INTERRUPT)
        if not register("cr0") & CR0_PE or at + size - 1 > register("idtr_limit"):
            raise Fault(GP, trap.vector * 8 + 2 + external)
        raw = self.memory.read(register("idtr_base") + at, size)
        gate = Gate.of(raw, trap.vector, external)
        if trap.kind in _SOFTWARE and gate.privilege < self.mode.privilege:
            raise Fault(GP, trap.vector * 8 + 2)
        if not gate.selector & ~3 or (gate.selector | 7) > register("gdtr_limit"):
            raise Fault(GP, gate.selector & ~3 | external)
        code = self._segment_at(gate.selector)
        allowed = code.is_code and code.privilege <= self.mode.privilege
        if not allowed or (long and not code.is_64_bit):
            raise Fault(GP, gate.selector & ~3 | external)
        if not code.is_present:
            raise Fault(NP, gate.selector & ~3 | external)
        return gate, code

    def _find_stack(self, gate: Gate, inner: int) -> tuple[int, Segment, int]:
        """Find the stack that a gate asks for: its selector, its segment and its top."""
        vcpu, register = self.vcpu, self.vcpu.register
        selector, stack, top = register("ss_sel"), vcpu.segment("ss"), register("rsp")
        changes = inner < self.mode.privilege
        if self.mode.long_mode:
            if gate.stack or changes:
                where = 0x24 + 8 * (gate.stack - 1) if gate.stack else 4 + 8 * inner
                raw = self.memory.read(register("tr_base") + where, 8)
                top = int.from_bytes(raw, "little")
            if changes:
                selector, stack = inner, null_stack(inner)
            top &= ~0xF
        elif changes:
            new = self.memory.read(register("tr_base") + 4 + 8 * inner, 8)
            top = int.from_bytes(new[:4], "little")
            selector = int.from_bytes(new[4:6], "little")
            stack = self._segment_at(selector)
        return selector, stack, top

    def _segment_at(self, selector: int) -> Segment:
        raw = self.memory.read(self.vcpu.register("gdtr_base") + (selector & ~7), 8)
        return segment_of(int.from_bytes(raw, "little"))
