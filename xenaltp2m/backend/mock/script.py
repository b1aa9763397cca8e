# SPDX-License-Identifier: LGPL-2.1-or-later
"""vCPUs that execute scripted instructions.

A program stands for machine code with paging off. Each instruction is fetched, may access memory
and may have one effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from xenaltp2m.abi.vm_event import Flag
from xenaltp2m.abi.x86 import BP, GP, NO_ERROR_CODE, UD, Segment
from xenaltp2m.backend.mock.effects import Done, Effect, GuestRequest, moves_itself
from xenaltp2m.backend.mock.guest import Outcome, access
from xenaltp2m.backend.mock.physical_memory import pages
from xenaltp2m.backend.mock.processor import Processor
from xenaltp2m.backend.mock.vcpu import (
    BEGINNING,
    FLAT_CODE,
    FLAT_DATA,
    FLAT_LIMIT,
    HARDWARE_EXCEPTION,
    SOFTWARE_EXCEPTION,
    SOFTWARE_INTERRUPT,
    Trap,
    Waits,
)

_INT3 = 0xCC


class Access(NamedTuple):
    """A data access of an instruction.

    Attributes:
        kind: "r" or "w".
        address: Where.
        data: What is written; of a read its length counts.
        register: Where a read's value goes; nowhere if empty.
    """

    kind: str
    address: int
    data: bytes = b"\0"
    register: str = ""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: Where it is. A 0xCC there in memory, as the vCPU's view shows it, is an int3.
        length: Its length; the next instruction of the program need not follow it in memory.
        accesses: Its data accesses: :class:`Access` or tuples of its fields.
        effect: What else it does.
        emulated: Whether Xen's emulator can execute it.
    """

    address: int
    length: int = 1
    accesses: Sequence[Access | tuple[str, int] | tuple[str, int, bytes]] = ()
    effect: Effect | None = None
    emulated: bool = True


@dataclass(eq=False)
class Script(Processor):
    """A vCPU with its program."""

    program: Sequence[Instruction] = ()
    loop: bool = False
    _at: int = field(default=0, init=False)
    """Where in the program the last instruction was begun."""

    def load(self, program: Iterable[Instruction], *, loop: bool) -> None:
        """Give the vCPU a program, and registers as they are at its start, paging off."""
        self.program, self.loop, self._at = tuple(program), loop, 0
        vcpu = self.vcpu
        for name in ("cs", "ds", "es", "ss", "fs", "gs"):
            code = name == "cs"
            vcpu.set_register(f"{name}_sel", 8 if code else 16)
            vcpu.set_segment(name, Segment(0, FLAT_LIMIT, FLAT_CODE if code else FLAT_DATA))
        start = self.program[0].address if self.program else 0
        vcpu.set_registers({**BEGINNING, "rip": start})
        vcpu.halted = False

    @property
    def finished(self) -> bool:
        """Whether the program has come to its end; the vCPU then waits as after HLT."""
        if self.loop or not self.program:
            return False
        end = self.program[-1].address + self.program[-1].length
        return self.vcpu.register("rip") == end and not any(
            instruction.address == end for instruction in self.program
        )

    @property
    def _has_work(self) -> bool:
        return bool(self.program) and not self.finished

    # The program.

    def _current(self) -> Instruction | None:
        """The instruction at rip."""
        rip, program = self.vcpu.register("rip"), self.program
        if not program:
            return None
        last = program[self._at]
        if last.address == rip:
            return last
        following = self._following
        if following is not None and rip in (
            last.address + last.length,
            program[following].address,
        ):
            self._at = following
            self.vcpu.set_register("rip", program[following].address)
            return program[following]
        for index, instruction in enumerate(program):
            if instruction.address == rip:
                self._at = index
                return instruction
        return None

    @property
    def _following(self) -> int | None:
        if self._at + 1 < len(self.program):
            return self._at + 1
        return 0 if self.loop else None

    def _advance(self, length: int) -> None:
        """``update_guest_eip``, and a jump where the program goes on elsewhere."""
        following = self._following
        address = self.vcpu.register("rip") + length
        if following is not None:
            address = self.program[following].address
            self._at = following
        self.vcpu.set_register("rip", address)

    def _deliver(self, trap: Trap) -> Waits[bool]:
        """The guest's handler gets it, and returns to where the CPU says."""
        vcpu = self.vcpu
        vcpu.pending = None
        vcpu.delivered.append((trap.vector, trap.kind))
        if trap.kind >= SOFTWARE_INTERRUPT:
            vcpu.set_register("rip", vcpu.register("rip") + trap.length)
        return True
        yield

    # Execution by the CPU, in the vCPU's view.

    def _execute(self, limit: int) -> Waits[tuple[Done, int]]:  # noqa: ARG002 - one at a time
        instruction = self._current()
        if instruction is None:
            if self.program and not self.finished:  # it has gone astray
                self.vcpu.delivered.append((UD, HARDWARE_EXCEPTION))
                self.vcpu.halted = True
            return Done.HELD, 0
        done = yield from self._execute_one(instruction)
        return done, int(done is not Done.HELD)

    def _fetch(self, instruction: Instruction) -> Waits[Outcome]:
        for part, _ in pages(instruction.address, instruction.length):
            outcome = yield from access(self.monitor, self.vcpu, part, "x")
            if outcome is Outcome.EMULATED:
                self._fault(GP)  # hvm_hap_nested_page_fault: nothing to fetch
            if outcome is not Outcome.DONE:
                return outcome
        return Outcome.DONE

    def _execute_one(self, instruction: Instruction) -> Waits[Done]:
        outcome = yield from self._fetch(instruction)
        if outcome is not Outcome.DONE:
            return self._held(outcome)
        if self._memory.read_in_view(instruction.address, 1)[0] == _INT3:
            return (yield from self._breakpoint())
        accesses = [Access(*one) for one in instruction.accesses]
        for one in accesses:
            for part, _ in pages(one.address, len(one.data)):
                outcome = yield from access(self.monitor, self.vcpu, part, one.kind)
                if outcome is Outcome.EMULATED:  # handle_mmio
                    completed = yield from self._emulate_instruction(
                        instruction, Flag(0), b"", answered=False
                    )
                    return Done.EXITED if completed else Done.HELD
                if outcome is not Outcome.DONE:
                    return self._held(outcome)
        for one in accesses:
            if one.kind == "w":
                self._memory.write_in_view(one.address, one.data)
            else:
                self._load(one, self._memory.read_in_view(one.address, len(one.data)))
        done = yield from self._apply(instruction.effect, instruction.length)
        if done is not Done.HELD and not moves_itself(instruction.effect):
            self._advance(instruction.length)
        return done

    # Execution by Xen's emulator, in the host p2m.

    def _emulate(self, kind: Flag, data: bytes) -> Waits[None]:
        if not self.program:
            return
        instruction = self._current()
        if instruction is None:
            self._fault(UD)
        else:
            yield from self._emulate_instruction(instruction, kind, data, answered=True)

    def _emulate_instruction(
        self, instruction: Instruction, kind: Flag, data: bytes, *, answered: bool
    ) -> Waits[bool]:
        """Emulate one, because a response says so or for MMIO; True if it is completed."""
        vcpu, effect = self.vcpu, instruction.effect
        first = self._memory.read_in_host(instruction.address, 1)
        if kind is Flag.SET_EMUL_INSN_DATA:
            first = data[:1]
        if first[0] == _INT3:
            vcpu.raise_trap(Trap(BP, SOFTWARE_EXCEPTION, NO_ERROR_CODE, 1, 0))
            return False
        if not instruction.emulated or isinstance(effect, GuestRequest):
            yield from self._cannot_emulate(answered=answered)
            return False
        for one in instruction.accesses:
            wanted = Access(*one)
            if wanted.kind != "w":
                found = self._memory.read_in_host(wanted.address, len(wanted.data))
                if kind is Flag.SET_EMUL_READ_DATA:  # set_context_data
                    size = int.from_bytes(data[:4], "little")
                    found = data[4 : 4 + min(size, len(found))].ljust(len(found), b"\0")
                self._load(wanted, found)
            elif kind is not Flag.EMULATE_NOWRITE:
                self._memory.write_in_host(wanted.address, wanted.data)
        if not (yield from self._emulate_effect(effect, instruction.length)):
            return False
        if not moves_itself(effect):
            self._advance(instruction.length)
        return True

    def _load(self, wanted: Access, found: bytes) -> None:
        if wanted.register:
            self.vcpu.set_register(wanted.register, int.from_bytes(found, "little"))
