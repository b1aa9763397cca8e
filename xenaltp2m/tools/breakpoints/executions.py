# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one execution of an instruction does to watched memory.

Xen reports only the first address of the first access to each restricted page. The rest is found by
decoding the instruction before its step, and by comparing the pages that it may write after its
step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xenaltp2m.abi.vm_event import AccessFlag
from xenaltp2m.abi.x86 import FRAME, Repeated, page_table_entry_size
from xenaltp2m.errors import InvalidArgumentError, NotMappedError
from xenaltp2m.tools.breakpoints.operand_size import (
    LONGEST_ACCESS,
    DataAccess,
    Operand,
    code_at,
    data_access,
    repeats,
)
from xenaltp2m.types import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from xenaltp2m.handles.memory import AddressSpace, MappedPages, Memory
    from xenaltp2m.tools.breakpoints.hooks import Watchpoint
    from xenaltp2m.values.events import MemAccess, Registers

_LONGEST_DESCRIPTOR = 16
_LONGEST_FRAME = 256
"""The most bytes that the delivery of an event, or a far call, pushes, alignment included."""


class _Piece(NamedTuple):
    """The part of an access that lies in one page."""

    address: int
    size: int
    length: int | None
    """Bytes of the access from this address on, the next page included; None if unknown."""
    written: bool
    exact: bool

    def reaches(self, watch: Watchpoint) -> bool:
        """Return whether it touches watched bytes by a watched kind of access."""
        return (self.written or watch.reads) and (
            self.address < watch.end and watch.address < self.address + self.size
        )


class Use:
    """An execution's use of the bytes of one watchpoint."""

    def __init__(self, watch: Watchpoint, piece: _Piece, *, certain: bool) -> None:
        self.watchpoint, self.certain = watch, certain
        self.reported = False
        self.address, self.length, self.written = piece.address, piece.length, piece.written
        self.start = 0
        """The address of the first byte of ``old``."""
        self.old = b""

    def cover(self, low: int, high: int, execution: Execution) -> None:
        """Keep the old content of the watched bytes between two addresses."""
        low, high = max(low, self.watchpoint.address), min(high, self.watchpoint.end)
        if not self.old:
            self.start, self.old = low, execution.content(low, high)
            return
        if low < self.start:
            self.old = execution.content(low, self.start) + self.old
            self.start = low
        end = self.start + len(self.old)
        if high > end:
            self.old += execution.content(end, high)


class Execution:
    """An instruction that one vCPU executes; a repeated string instruction with all iterations."""

    def __init__(
        self,
        memory: Memory,
        mapped: MappedPages,
        registers: Registers,
        code: bytes | None = None,
    ) -> None:
        self._memory, self._mapped = memory, mapped
        self.uses: dict[Watchpoint, Use] = {}
        """The uses by watchpoints that were called, or are to be."""
        self.beside: set[Watchpoint] = set()
        """Watchpoints in pages that were accessed so, which are not known to be reached."""
        self.begin(registers, code)

    def begin(self, registers: Registers, code: bytes | None = None) -> None:
        """Begin the execution, or its next iteration.

        Args:
            registers: The registers before it.
            code: The instruction, if another one is executed than memory contains.
        """
        self.registers = registers
        self.written: dict[int, bytes] = {}
        """The old content of the pages that it may write in this step."""
        self._pushed: dict[int, int] = {}
        """Virtual addresses of writes that look like pushes, by gfn."""
        self._space: AddressSpace | None = None
        self._code = code
        self._decoded = None if code is None else data_access(registers, code)

    # Decoding, only when it is needed.

    @property
    def code(self) -> bytes:
        """The instruction's bytes, and those that follow."""
        if self._code is None:
            self._code = code_at(self.registers, self._va_space)
            self._decoded = data_access(self.registers, self._code)
        return self._code

    @property
    def decoded(self) -> DataAccess | None:
        """The memory that it uses; None if unknown."""
        return self._decoded if self.code else None

    @property
    def _operands(self) -> list[Operand]:
        return self.decoded.operands if self.decoded is not None else []

    @property
    def repeated(self) -> Repeated | None:
        """The string instruction, if it is a repeated one."""
        return repeats(self.registers, self.code)

    @property
    def _va_space(self) -> AddressSpace:
        if self._space is None:
            self._space = self._memory.address_space(self.registers, mapped=self._mapped)
        return self._space

    def goes_on_at(self, registers: Registers) -> bool:
        """Return whether a vCPU with these registers executes the next iteration."""
        before = self.registers
        places = [(one.rip, one.rsp, one.cr3 & FRAME) for one in (registers, before)]
        if places[0] != places[1]:
            return False
        found = self.repeated
        if found is None:
            return False
        # SCAS, CMPS, MOVS, STOS and LODS move one or both by the operand's size.
        moves = {0, found.width, -found.width & found.mask}
        return (
            registers.rcx & found.mask == (before.rcx - 1) & found.mask != found.mask
            and (registers.rdi - before.rdi) & found.mask in moves
            and (registers.rsi - before.rsi) & found.mask in moves
        )

    def is_repeated_in(
        self, registers: Registers, watched: Mapping[int, Collection[Watchpoint]]
    ) -> bool:
        """Return whether another iteration follows that accesses a page with watchpoints."""
        if registers.rip != self.registers.rip:
            return False
        found = self.repeated
        if found is None or not registers.rcx & found.mask:
            return False
        next_one = data_access(registers, self.code)
        if next_one is None:
            return True  # unknown for now: the vCPU's next event shows it
        return any(
            one.written or watch.reads
            for one in next_one.operands
            for va in {one.va, one.va + one.size - 1}
            for watch in watched.get(self._gfn(va), ())
        )

    def _gfn(self, va: int) -> int:
        """Return the gfn that a virtual address maps to; -1 for none."""
        try:
            return self._va_space.translate(va).physical >> PAGE_SHIFT
        except (NotMappedError, InvalidArgumentError):
            return -1

    # Before the step.

    def may_write(self, gfn: int) -> None:
        """Save a page's content before the execution writes it."""
        if gfn not in self.written:
            self.written[gfn] = bytes(self._mapped.page(gfn))

    def access(self, event: MemAccess, watches: Iterable[Watchpoint]) -> list[Use]:
        """Note an access to a page with watchpoints; return the uses that are new."""
        written = bool(event.access_flags & AccessFlag.W)
        address = event.gfn << PAGE_SHIFT | event.offset
        pieces: list[_Piece] | None = None
        new = []
        for watch in watches:
            if not (written or watch.reads):
                continue
            if pieces is None:
                pieces = self._pieces(event, written)
            reaching = [piece for piece in pieces if piece.reaches(watch)]
            if not reaching:
                if watch not in self.uses:
                    self.beside.add(watch)
                continue
            self.beside.discard(watch)
            first = max(reaching, key=lambda piece: piece.written)
            use = self.uses.get(watch)
            if use is None:
                use = self.uses[watch] = Use(watch, first, certain=False)
                new.append(use)
            use.written = use.written or first.written
            use.certain = (
                use.certain
                or watch.address <= address < watch.end
                or any(piece.exact for piece in reaching)
            )
            for piece in reaching:
                use.cover(piece.address, piece.address + piece.size, self)
        return new

    def is_plain(self, event: MemAccess) -> bool:
        """Return whether decoding shows all that it does, so that nothing need be compared.

        False if the access may be a push: the delivery of an event looks the same.
        """
        if event.access_flags & AccessFlag.FAULT_IN_GPT:
            return False
        decoded, top = self.decoded, self.registers.rsp_va
        if decoded is None or not decoded.complete or self._explaining(event) is None:
            return False
        return all(
            one.exact
            and abs(one.va - top) > _LONGEST_FRAME
            and (one.va & PAGE_SIZE - 1) + one.size <= PAGE_SIZE
            for one in decoded.operands
        )

    def _explaining(self, event: MemAccess) -> Operand | None:
        """Return the operand whose access was reported."""
        if not event.access_flags & AccessFlag.GLA_VALID:
            return None
        gla = int(event.gla)
        for one in self._operands:
            if one.va <= gla < one.va + one.size:
                return one
        return None

    def _pieces(self, event: MemAccess, written: bool) -> list[_Piece]:
        """List the parts of its operands in the page of an access."""
        gfn = int(event.gfn)
        address = gfn << PAGE_SHIFT | event.offset
        if event.access_flags & AccessFlag.FAULT_IN_GPT:
            size = page_table_entry_size(event.registers.cr4)
            return [_Piece(address & -size, size, size, written, exact=True)]
        explaining = self._explaining(event)
        if written and (explaining is None or explaining.on_stack):
            self._pushed.setdefault(gfn, int(event.gla))
        if explaining is None:
            longest = LONGEST_ACCESS if self.decoded is None else _LONGEST_DESCRIPTOR
            size = min(longest, PAGE_SIZE - event.offset)
            return [_Piece(address, size, None, written, exact=False)]
        found = []
        for one in self._operands:
            is_written = one.written or (written and one is explaining)
            end = one.va + one.size
            va = one.va
            while va < end:
                stop = min(end, (va | PAGE_SIZE - 1) + 1)
                same_page = va >> PAGE_SHIFT == event.gla >> PAGE_SHIFT
                if same_page or self._gfn(va) == gfn:
                    at = gfn << PAGE_SHIFT | va & PAGE_SIZE - 1
                    length = end - va if one.exact else None
                    found.append(_Piece(at, stop - va, length, is_written, one.exact))
                va = stop
        return found

    def content(self, low: int, high: int) -> bytes:
        """Return bytes of memory as they were before the step."""
        found = b""
        while low < high:
            gfn, offset = divmod(low, PAGE_SIZE)
            count = min(high - low, PAGE_SIZE - offset)
            page = self.written.get(gfn) or self._mapped.page(gfn)
            found += bytes(page[offset : offset + count])
            low += count
        return found

    # After the step.

    def now(self, use: Use) -> bytes:
        """Return the current content of the bytes of a use."""
        self.written.clear()
        return self.content(use.start, use.start + len(use.old))

    def compare(self, registers: Registers, watched: Mapping[int, Iterable[Watchpoint]]) -> None:
        """Find writes that were not reported, and remove reported ones that did not happen.

        Args:
            registers: The registers after the step.
            watched: The watchpoints by gfn.
        """
        for gfn, before in self.written.items():
            now = bytes(self._mapped.page(gfn))
            frame = self._frame(gfn, registers)
            if now == before and frame is None:
                continue
            for watch in watched.get(gfn, ()):
                first = max(watch.address - (gfn << PAGE_SHIFT), 0)
                last = min(watch.end - (gfn << PAGE_SHIFT), PAGE_SIZE)
                ranges = [_difference(before, now, first, last)]
                if frame is not None:
                    ranges.append((max(frame[0], first), min(frame[1], last)))
                for low, high in ranges:
                    if low >= high:
                        continue
                    at = (gfn << PAGE_SHIFT) + low
                    use = self.uses.get(watch)
                    if use is None:
                        piece = _Piece(at, high - low, None, True, exact=True)
                        use = self.uses[watch] = Use(watch, piece, certain=True)
                    use.certain = use.written = True
                    use.cover(at, at + high - low, self)
                use = self.uses.get(watch)
                if frame is not None and use is not None and not use.certain:
                    del self.uses[watch]
                    self.beside.add(watch)
        self.beside -= self.uses.keys()

    def _frame(self, gfn: int, registers: Registers) -> tuple[int, int] | None:
        """Return the range of a page that was pushed although no operand explains it; or None.

        The frame of an event extends from the new top of the stack to the first byte pushed.
        """
        va = self._pushed.get(gfn)
        if va is None:
            return None
        top, before = registers.rsp_va, self.registers
        found = next((one for one in self._operands if one.on_stack), None)
        if found is not None and 0 <= registers.rip - before.rip <= 15:
            return None  # the instruction has executed
        end = va + registers.word_size
        if 0 < before.rsp_va - top <= _LONGEST_FRAME:
            end = max(end, before.rsp_va)
        if not 0 <= va - top <= _LONGEST_FRAME:
            return None
        page = va & -PAGE_SIZE
        return max(top - page, 0), min(end - page, PAGE_SIZE)


def _difference(before: bytes, now: bytes, first: int, last: int) -> tuple[int, int]:
    """Return the range in which two pages differ within some bounds; empty if they do not."""
    if before[first:last] == now[first:last]:
        return 0, 0
    while before[first] == now[first]:
        first += 1
    while before[last - 1] == now[last - 1]:
        last -= 1
    return first, last
