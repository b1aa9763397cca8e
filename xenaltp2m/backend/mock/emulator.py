# SPDX-License-Identifier: LGPL-2.1-or-later
"""Xen's instruction emulator: one instruction against the host p2m, which no view restricts.

Restates what ``hvm_emulate_one_vm_event`` makes of an instruction's memory accesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xenaltp2m.abi.vm_event import Flag
from xenaltp2m.abi.x86 import FLAG_DF, FLAG_TF, PF, Fault, Repeated
from xenaltp2m.backend.mock.cpu_mode import CpuMode
from xenaltp2m.backend.mock.engine import Place, Seen, SoftwareInterrupt
from xenaltp2m.backend.mock.execution import Execution
from xenaltp2m.backend.mock.monitor import Monitor
from xenaltp2m.backend.mock.physical_memory import WRITES_DROPPED
from xenaltp2m.backend.mock.vcpu import Vcpu
from xenaltp2m.backend.mock.virtual_memory import VirtualMemory
from xenaltp2m.types import PAGE_SIZE

_MOST_REPETITIONS = 4096
"""Most repetitions that Xen's emulator executes at once."""


@dataclass(eq=False)
class Emulator:
    """Emulate a vCPU's instructions in the host p2m."""

    monitor: Monitor
    vcpu: Vcpu
    mode: CpuMode
    memory: VirtualMemory
    execution: Execution

    def execute(self, kind: Flag, data: bytes, code: bytes, *, is_replaced: bool) -> Fault | None:
        """Execute the instruction at rip, with all the repetitions that Xen executes at once.

        Args:
            kind: What a response asks for; 0 if nothing.
            data: What it gives.
            code: The instruction.
            is_replaced: Whether a response gave ``code``.

        Returns:
            The exception that it ended with.
        """
        for part in self._parts(code, kind, data):
            fault = self._step(kind, part, code, is_replaced=is_replaced)
            if fault is not None:
                return fault
        return None

    def _parts(self, code: bytes, kind: Flag, data: bytes) -> list[bytes]:
        """Split a response's data among the repetitions that Xen executes at once."""
        found = self.mode.repeats(code)
        count = 1 if found is None else self._repetitions_at_once(found, kind)
        if count == 1 or found is None or kind is not Flag.SET_EMUL_READ_DATA:
            return [data] * count
        size = int.from_bytes(data[:4], "little")  # set_context_data, of the whole buffer
        given = data[4 : 4 + size].ljust(count * found.width, b"\0")
        parts = [given[at * found.width :][: found.width] for at in range(count)]
        if self.vcpu.register("rflags") & FLAG_DF:
            parts.reverse()
        return [len(part).to_bytes(4, "little") + part for part in parts]

    def _repetitions_at_once(self, found: Repeated, kind: Flag) -> int:
        """``get_rep_prefix``, ``hvmemul_rep_movs``, ``hvmemul_rep_stos``: many; of others, one."""
        register, width, mask = self.vcpu.register, found.width, found.mask
        count, flags = register("rcx") & mask, register("rflags")
        if not (found.is_movs or found.is_stos) or count <= 1 or flags & FLAG_TF:
            return 1
        offsets = [("es", register("rdi") & mask, "w")]
        if found.is_movs:
            offsets.append((found.source, register("rsi") & mask, "r"))
        backwards = bool(flags & FLAG_DF)
        for _, offset, _ in offsets:  # truncate_ea_and_reps
            room = offset // width + 1 if backwards else (-offset & mask) // width
            count = min(count, max(room, 1))
        if kind is Flag.EMULATE_NOWRITE:  # hvmemul_rep_movs_discard
            return count
        if "emulate_each_rep" in self.monitor.switches:
            return 1
        return self._contiguous_repetitions(offsets, min(count, _MOST_REPETITIONS), width)

    def _contiguous_repetitions(
        self, offsets: list[tuple[str, int, str]], count: int, width: int
    ) -> int:
        """Cut a count of repetitions to what is contiguous and does not overlap."""
        register = self.vcpu.register
        backwards = bool(register("rflags") & FLAG_DF)
        places = []
        for segment, offset, right in offsets:
            flat = self.mode.is_64_bit and segment not in ("fs", "gs")
            base = 0 if flat else register(f"{segment}_base")
            physical, count = self._contiguous(base + offset, right, count, width, backwards)
            places.append(physical)
        if len(places) > 1:
            size = count * width
            target, source = places
            source -= size - width if backwards else 0
            if source - width < target < source + size:
                return 1
        return count

    def _contiguous(
        self, va: int, access: str, count: int, width: int, backwards: bool
    ) -> tuple[int, int]:
        """``hvmemul_linear_to_phys``: the physical address, and the repetitions in one piece."""
        va &= self.mode.mask
        if not self.mode.paged:
            return va, count
        user, step = self.mode.privilege == 3, -PAGE_SIZE if backwards else PAGE_SIZE
        translate = self.memory.translate_in_host
        try:
            physical = translate(va, access, user)
        except Fault:
            return 0, 1  # it is raised by the first
        done = va % PAGE_SIZE + width if backwards else PAGE_SIZE - va % PAGE_SIZE
        following = physical
        while done < count * width:
            va, following = va + step, following + step
            try:
                if translate(va, access, user) != following:
                    break
            except Fault:
                break
            done += PAGE_SIZE
        return physical, max(min(count, done // width), 1)

    def _step(self, kind: Flag, data: bytes, code: bytes, *, is_replaced: bool) -> Fault | None:
        """Execute one instruction or one repetition."""
        accesses = _Accesses(self, kind, data, code if is_replaced else b"")
        try:
            stopped = self.execution.step(code, accesses.resolve, accesses.give)
        except Fault as fault:
            stopped = fault
            if fault.vector == PF and not is_replaced:
                self.execution.locate_fault(fault)
        finally:
            accesses.restore()
        if isinstance(stopped, SoftwareInterrupt):
            return Fault(stopped.vector, 0)
        return stopped


@dataclass(eq=False)
class _Accesses:
    """The memory accesses of one emulated instruction, and the frames to restore after it."""

    emulator: Emulator
    kind: Flag
    data: bytes
    code: bytes
    """The instruction, where a response gave it."""
    rip_va: int = field(init=False)
    _kept: dict[int, bytes] = field(default_factory=dict, init=False)
    """Contents of frames whose writes are dropped."""
    _patched: dict[int, bytes] = field(default_factory=dict, init=False)
    """Contents of frames that have a response's data for a read."""

    def __post_init__(self) -> None:
        self.rip_va = self.emulator.mode.rip_va
        self._frames = self.emulator.memory.domain.machine.frames
        self._frames.page(self.emulator.execution.core.nothing)[:] = b"\xff" * PAGE_SIZE

    def resolve(self, va: int, access: str, user: bool) -> Place:
        """Find a page for the engine in the host p2m."""
        memory, nothing = self.emulator.memory, self.emulator.execution.core.nothing
        physical = memory.translate_in_host(va, access, user)
        gfn = physical // PAGE_SIZE
        found = memory.domain.host_lookup(gfn, populate=True, unshare=access == "w")
        if access == "x" and self.code:
            return Place(self._overlay(self._frames.peek(found.mfn), va), "x")
        if not found.valid:
            if access == "w":
                self._kept.setdefault(nothing, b"\xff" * PAGE_SIZE)
            return Place(nothing, "rw")
        if access != "w":
            return Place(found.mfn, "rx")
        if self.kind is Flag.EMULATE_NOWRITE or found.type in WRITES_DROPPED:
            self._kept.setdefault(found.mfn, bytes(self._frames.peek(found.mfn)))
        return Place(found.mfn, "rw")

    def give(self, seen: Seen) -> None:
        """Have a read find a response's data."""
        if seen.kind != "r" or self.kind is not Flag.SET_EMUL_READ_DATA:
            return
        size = int.from_bytes(self.data[:4], "little")
        given = self.data[4 : 4 + min(size, seen.size)].ljust(seen.size, b"\0")
        mfn, at = divmod(seen.address, PAGE_SIZE)
        frame = self._frames.page(mfn)
        self._patched.setdefault(mfn, bytes(frame))
        room = frame[at : at + seen.size]
        room[:] = given[: len(room)]

    def restore(self) -> None:
        """Put back what the instruction must not have changed."""
        for mfn, content in {**self._patched, **self._kept}.items():
            self._frames.page(mfn)[:] = content

    def _overlay(self, page: memoryview, va: int) -> int:
        """Lay the given instruction over a copy of the page it is in; return the copy's frame."""
        mfn = self.emulator.execution.core.scratch
        frame = self._frames.page(mfn)
        frame[:] = page
        at = self.rip_va - va // PAGE_SIZE * PAGE_SIZE
        start, skipped = max(at, 0), max(-at, 0)
        part = self.code[skipped : skipped + PAGE_SIZE - start]
        frame[start : start + len(part)] = part
        return mfn
