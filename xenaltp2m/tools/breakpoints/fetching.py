# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read a vCPU's next instruction as it is executed: with patches, by its page tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

from xenaltp2m.abi.vm_event import AccessFlag
from xenaltp2m.abi.x86 import Repeated, repeated
from xenaltp2m.errors import InvalidArgumentError, NotMappedError, XenError
from xenaltp2m.handles.memory import Memory
from xenaltp2m.tools.breakpoints.guarded_pages import GuardedPages
from xenaltp2m.tools.breakpoints.hooks import Breakpoint
from xenaltp2m.tools.breakpoints.operand_size import LONGEST_INSTRUCTION, length
from xenaltp2m.tools.breakpoints.pages import BEFORE, INT3, Page
from xenaltp2m.types import PAGE_SHIFT, PAGE_SIZE, Gfn
from xenaltp2m.values.events import MemAccess, Registers, SoftwareBreakpoint

Instruction: TypeAlias = Mapping[int, Sequence[range]]
"""An instruction's bytes in pages with patches, as offsets by gfn; empty if none is patched."""

_OFFSET = PAGE_SIZE - 1
_REPEATS = frozenset(b"\xf2\xf3\x66\x67\x26\x2e\x36\x3e\x64\x65")
"""The first bytes of repeated string instructions: REP, sizes, segments."""


class Fetching:
    """Reads the instructions of vCPUs that wait for a response."""

    def __init__(self, memory: Memory, guarded: GuardedPages) -> None:
        self._memory, self._guarded = memory, guarded

    def int3_of(self, event: SoftwareBreakpoint) -> tuple[int, int]:
        """Return the gfn and the offset of an int3's first byte."""
        rip, base = event.registers.rip_and_cs_base
        return (event.gfn, rip & _OFFSET) if not base else self._place(event)

    def _place(self, event: SoftwareBreakpoint) -> tuple[Gfn, int]:
        registers, gfn = event.registers, event.gfn
        va = registers.rip_va
        if va != registers.cs_base + registers.rip:
            # Xen adds the base in 64-bit code, too, and does not truncate the sum (gfn_of_rip).
            with suppress(XenError):
                space = self._memory.address_space(registers)
                gfn = Gfn(space.translate(va).physical >> PAGE_SHIFT)
        return gfn, va & _OFFSET

    def last_byte_of(self, event: SoftwareBreakpoint) -> tuple[int, int]:
        """Return the place of the byte that makes an instruction an int3: prefixes may precede it.

        Raises:
            XenError: It is in another page than the first byte, and that page is not mapped.
        """
        gfn, offset = self._place(event)
        behind = event.insn_length - 1
        if 0 < behind <= BEFORE:
            offset += behind
            if offset >= PAGE_SIZE:
                registers = event.registers
                space = self._memory.address_space(registers)
                return divmod(space.translate(registers.rip_va + behind).physical, PAGE_SIZE)
        return gfn, offset

    def is_guests_own(self, event: SoftwareBreakpoint) -> bool:
        """Return whether an int3 that was hit is the guest's own."""
        try:
            gfn, offset = self.last_byte_of(event)
            page = self._guarded.pages.get(gfn)
            if page is not None and page.patches:
                return page.executed(offset, offset + 1)[0] == INT3
            return self._memory.read(gfn << PAGE_SHIFT | offset, 1)[0] == INT3
        except (InvalidArgumentError, NotMappedError):
            return True  # there is no such page, so the int3 was none of ours

    def repetition(self, page: Page, offset: int, registers: Registers) -> Repeated | None:
        """Decode a repeated string instruction; None for any other."""
        code = page.executed(offset, min(offset + LONGEST_INSTRUCTION, PAGE_SIZE))
        if _REPEATS.issuperset(code):  # the instruction continues in the next page
            code = self.code(registers)
        size = registers.word_size
        return repeated(code, size == 8, min(size, 4))

    def may_repeat(self, page: Page, offset: int) -> bool:
        """Return whether an instruction may be a repeated one, by its first byte."""
        return page.executed(offset, offset + 1)[0] in _REPEATS

    def places(self, registers: Registers) -> Iterator[tuple[int, int, int]]:
        """Yield where the next instruction's bytes may be: gfn, offset, length within the page."""
        va = registers.rip_va
        here = min(LONGEST_INSTRUCTION, PAGE_SIZE - va % PAGE_SIZE)
        try:
            space = self._memory.address_space(registers)
            for at, size in ((va, here), (va + here, LONGEST_INSTRUCTION - here)):
                if size:
                    yield *divmod(space.translate(at).physical, PAGE_SIZE), size
        except XenError:
            return  # the instruction ends before, or faults

    def code(self, registers: Registers) -> bytes:
        """Return the next instruction's bytes, and those that follow, as they are executed."""
        code = b""
        for gfn, offset, size in self.places(registers):
            page = self._guarded.pages.get(gfn)
            if page is not None:
                code += page.executed(offset, offset + size)
                continue
            with suppress(InvalidArgumentError, NotMappedError):  # a hole is not executed
                code += self._memory.read(gfn << PAGE_SHIFT | offset, size)
        return code

    def patched_parts(self, registers: Registers) -> Instruction:
        """Return which bytes of the next instruction are patched."""
        found: dict[int, list[range]] = {}
        left = length(registers, self.code(registers))
        for gfn, offset, room in self.places(registers):
            page, stop = self._guarded.pages.get(gfn), offset + min(room, left)
            left -= stop - offset
            if page is not None and page.is_patched(offset, stop):
                found.setdefault(gfn, []).append(range(offset, stop))
        return found

    def being_fetched(self, event: MemAccess) -> list[Breakpoint]:
        """List the breakpoints of an instruction whose page tables are being read for its fetch."""
        if not event.access_flags & AccessFlag.FAULT_IN_GPT:
            return []
        registers = event.registers
        va = registers.rip_va
        if event.gla >> PAGE_SHIFT != va >> PAGE_SHIFT:
            return []
        try:
            place = self._memory.address_space(registers).translate(va).physical
        except XenError:
            return []  # it is not mapped: the CPU raises a page fault in the guest
        page = self._guarded.pages.get(place >> PAGE_SHIFT)
        return page.hooks.get(place & _OFFSET, []) if page is not None else []

    def page_before(self, event: MemAccess) -> int | None:
        """Return the gfn of the page before the one that is fetched from; None if unmapped."""
        registers = event.registers
        va = event.gla if event.access_flags & AccessFlag.GLA_VALID else registers.rip_va
        try:
            space = self._memory.address_space(registers)
            return space.translate((va & -PAGE_SIZE) - 1).physical >> PAGE_SHIFT
        except XenError:
            return None

    @staticmethod
    def covered(page: Page, event: MemAccess) -> set[int]:
        """Return the breakpoints that an instruction reaches that begins in the preceding page."""
        start = event.gla & -PAGE_SIZE
        if not 0 < start - event.registers.rip_va <= BEFORE:
            return set()
        return {at for at in page.hooks if at <= event.offset}
