# SPDX-License-Identifier: LGPL-2.1-or-later
"""Execution of a vCPU's instructions on the core: many, one, or one to find its accesses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from xenaltp2m.abi.x86 import DB, Fault
from xenaltp2m.backend.mock.core import Core
from xenaltp2m.backend.mock.cpu_mode import CpuMode
from xenaltp2m.backend.mock.engine import GaveUp, Place, Seen, SoftwareInterrupt, Where
from xenaltp2m.backend.mock.engine_state import State
from xenaltp2m.backend.mock.vcpu import Vcpu
from xenaltp2m.backend.mock.virtual_memory import VirtualMemory
from xenaltp2m.types import PAGE_SIZE

_ERROR_WRITE = 1 << 1
_MOST_REMEMBERED = 128
"""Checking so many pages takes as long as resolving those again that are used."""
Resolve: TypeAlias = Callable[[int, str, bool], Place]
OnAccess: TypeAlias = Callable[[Seen], None]
Stopped: TypeAlias = Fault | SoftwareInterrupt | None
"""What stopped the core before its limit; None if nothing did."""


@dataclass(eq=False)
class Execution:
    """A vCPU's use of the core that its domain's vCPUs share."""

    core: Core
    vcpu: Vcpu
    mode: CpuMode
    memory: VirtualMemory
    executed: int = 0
    """Instructions that the core has completed in this turn, where it counts."""
    _state: State = field(init=False)
    _loaded: bytes = field(init=False)
    """The context as the engine has it."""

    def __post_init__(self) -> None:
        self._state = self.core.engine.new_state()
        self._loaded = bytes(len(self.vcpu.context))

    def _enter(self, engine: Any) -> None:
        engine.load(self.vcpu, self._state, self._loaded)

    def _leave(self, engine: Any) -> None:
        engine.save(self.vcpu, self._state)
        self._loaded = bytes(self.vcpu.context)

    def run(self, limit: int) -> Stopped:
        """Execute up to ``limit`` instructions.

        Raises:
            Fault: The guest's page tables do not allow an access.
            Denied: The view does not allow one.
            ReadsAhead, WritesCode: The next instruction has to be executed alone.
        """
        core = self.core
        table = self.memory.physical.table
        where = Where(self, table, table.generation)
        if core.where != where or (self.mode.paged and not core.stayed):
            self._forget_pages(core.where, where)
        core.where, core.stayed = where, False
        core.check_code()
        self._enter(core.engine)
        try:
            return core.run(self.vcpu.register("rip"), self.memory.resolve_to_run, limit)
        finally:
            self._leave(core.engine)
            self.executed += core.executed

    def _forget_pages(self, before: Where | None, now: Where) -> None:
        """Have the engine resolve the pages again that differ; all where that is not known.

        The CPU has left guest mode, and reads the guest's own tables again, too.
        """
        engine, memory = self.core.engine, self.memory.domain.machine.frames.memory
        if (
            before is None
            or before.processor is not now.processor
            or before.table.generation != before.generation
            or len(engine.remembered) > _MOST_REMEMBERED
        ):
            engine.forget_pages()
            return
        remembered = engine.remembered.items()
        stale = {
            at
            for at, place in remembered
            for entry, value in place.entries.items()
            if memory[entry : entry + len(value)] != value
        }
        if before.table is not now.table:
            was, here = before.table.lookup, now.table.lookup
            used = {gfn for _, place in remembered for gfn in place.gfns}
            differ = {gfn for gfn in used if was(gfn) != here(gfn)}
            if differ:
                stale |= {at for at, place in remembered if not differ.isdisjoint(place.gfns)}
        engine.forget(stale)

    def _step_engine(self, resolve: Resolve, on_access: OnAccess | None = None) -> Stopped:
        core, frames = self.core, self.memory.domain.machine.frames

        def noting(va: int, kind: str, user: bool) -> Place:
            place = resolve(va, kind, user)
            if "w" in place.rights:
                frames.page(place.mfn)  # the other engine may have translated it
            return place

        self._enter(core.stepper)
        try:
            return core.step(self.vcpu.register("rip"), self.mode.rip_va, noting, on_access)
        finally:
            self._leave(core.stepper)
            core.stepper.save_tables(self.vcpu, self._state)
            self._loaded = bytes(self.vcpu.context)

    def step(self, code: bytes, resolve: Resolve, on_access: OnAccess | None = None) -> Stopped:
        """Execute one instruction, ``code``, or one repetition (SDM 3C, Monitor Trap Flag)."""
        register = self.vcpu.register
        rip, count = register("rip"), register("rcx")
        stopped = self._step_engine(resolve, on_access)
        found = self.mode.repeats(code) if register("rip") == rip else None
        was_last = found and (count & found.mask, register("rcx") & found.mask) == (1, 0)
        if stopped is None and was_last:  # Unicorn leaves the instruction at the next step only
            stopped = self._step_engine(resolve, on_access)
        self.executed += stopped is None or stopped == SoftwareInterrupt(DB)
        return stopped

    def step_natively(self, code: bytes) -> Stopped:
        """Execute one instruction, ``code``, or one repetition, as the CPU itself does."""
        rip, count = self.vcpu.register("rip"), self.vcpu.register("rcx")
        stopped = self.step(code, self.memory.resolve)
        self.mark_repetition(rip, count, code)
        return stopped

    def mark_repetition(self, rip: int, count: int, code: bytes) -> None:
        """Set RF after any repetition but the last, as a fault does (SDM 3B, 18.3.1.1)."""
        if self.vcpu.register("rip") == rip and self.vcpu.register("rcx") != count:
            found = self.mode.repeats(code)
            if found and self.vcpu.register("rcx") & found.mask:
                self.mode.set_resume_flag()

    def locate_fault(self, fault: Fault) -> None:
        """Complete a page fault: its exact address, and whether it is a write's."""
        fault.address, kind = self.locate(fault.address, fault.kind)
        fault.error_code |= _ERROR_WRITE if kind == "w" else 0

    def locate(self, va: int, denied: str) -> tuple[int, str]:
        """Find the exact address and kind of a denied access, by a dry run of the instruction.

        An instruction that reads and then writes a place asks for a write (seen on the lab's CPU).
        """
        page = va // PAGE_SIZE * PAGE_SIZE
        if denied == "x":
            rip = self.mode.rip_va
            return (rip if page <= rip < page + PAGE_SIZE else page), denied
        core, memory = self.core, self.memory
        found: dict[str, list[tuple[int, int]]] = {"r": [], "w": []}
        marker = core.marker

        def resolve(va: int, kind: str, user: bool) -> Place:
            if kind != "x" and va // PAGE_SIZE * PAGE_SIZE == page:
                return Place(marker, kind)
            if kind == "w":
                return Place(core.scratch, "rw")
            physical = memory.translate_in_host(va, kind, user)
            # A page that is both executed and read must lead to the marker for the read.
            return Place(memory.physical.find(physical // PAGE_SIZE).mfn, kind)

        def on_access(seen: Seen) -> None:
            if seen.address // PAGE_SIZE == marker:
                found[seen.kind].append((page + seen.address % PAGE_SIZE, seen.size))

        self._enter(core.stepper)
        core.stepper.save(self.vcpu, self._state)
        self._loaded = bytes(self.vcpu.context)
        with contextlib.suppress(Fault, GaveUp):
            core.step(self.vcpu.register("rip"), self.mode.rip_va, resolve, on_access)
        if not found[denied]:
            return page, denied
        first = found[denied][0]
        return first[0], "w" if first in found["w"] else denied
