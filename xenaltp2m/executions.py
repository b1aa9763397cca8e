# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one execution of an instruction does to watched memory.

Xen reports the first address of the first access to each page that may not be used so. The rest is
known from decoding the instruction before its step, and from comparing the pages that it may write
after its step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xenaltp2m.abi.vm_event import AccessFlag
from xenaltp2m.abi.x86 import FRAME, Repeated, page_table_entry_size
from xenaltp2m.errors import InvalidArgumentError, NotMappedError
from xenaltp2m.instructions import LONGEST_ACCESS, DataUse, Operand, code_at, data_use, repeats
from xenaltp2m.types import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from xenaltp2m.events import MemAccess, Registers
    from xenaltp2m.hooks import Watch
    from xenaltp2m.memory import AddressSpace, MappedPages, Memory

_LONGEST_DESCRIPTOR = 16
_LONGEST_FRAME = 256
"""Bytes that the delivery of an event, or a far call, pushes at most, with room for alignment."""


class _Piece(NamedTuple):
    """A part of an access that lies in one page."""

    address: int
    size: int
    length: int | None
    """Bytes of the access from this address on, into the next page, too; None if unknown."""
    written: bool
    exact: bool

    def reaches(self, watch: Watch) -> bool:
        """Whether some of it is watched in this way."""
        return (self.written or watch.reads) and (
            self.address < watch.end and watch.address < self.address + self.size
        )


class Use:
    """What an execution does to the bytes of one watch."""

    def __init__(self, watch: Watch, piece: _Piece, *, certain: bool) -> None:
        self.watch, self.certain = watch, certain
        self.told = False
        self.address, self.length, self.written = piece.address, piece.length, piece.written
        self.start = 0
        """Where ``old`` begins."""
        self.old = b""

    def cover(self, low: int, high: int, execution: Execution) -> None:
        """Keep the old content of watched bytes from one address up to another."""
        low, high = max(low, self.watch.address), min(high, self.watch.end)
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
    """An instruction that one vCPU executes; of a repeated string instruction, all iterations."""

    def __init__(
        self,
        memory: Memory,
        mapped: MappedPages,
        registers: Registers,
        code: bytes | None = None,
    ) -> None:
        self._memory, self._mapped = memory, mapped
        self.uses: dict[Watch, Use] = {}
        """Of the watches that were called, or are to be."""
        self.beside: set[Watch] = set()
        """Watches in pages that were used so, which are not known to be reached."""
        self.begin(registers, code)

    def begin(self, registers: Registers, code: bytes | None = None) -> None:
        """Begin, or go on with the next iteration.

        Args:
            registers: Before it.
            code: The instruction, where another one is executed than memory has.
        """
        self.registers = registers
        self.written: dict[int, bytes] = {}
        """The pages that it may write in this step, as they were."""
        self._pushed: dict[int, int] = {}
        """Linear addresses of writes that look like pushes, by gfn."""
        self._space: AddressSpace | None = None
        self._code = code
        self._decoded = None if code is None else data_use(registers, code)

    # Decoding, once somebody has to know.

    @property
    def code(self) -> bytes:
        """The instruction's bytes, and what follows."""
        if self._code is None:
            self._code = code_at(self.registers, self._linear)
            self._decoded = data_use(self.registers, self._code)
        return self._code

    @property
    def decoded(self) -> DataUse | None:
        """The memory that it uses; None where that is not known."""
        return self._decoded if self.code else None

    @property
    def _operands(self) -> list[Operand]:
        return self.decoded.operands if self.decoded is not None else []

    @property
    def repeated(self) -> Repeated | None:
        """The string instruction, where it is a repeated one."""
        return repeats(self.registers, self.code)

    @property
    def _linear(self) -> AddressSpace:
        if self._space is None:
            self._space = self._memory.address_space(self.registers, mapped=self._mapped)
        return self._space

    def goes_on_at(self, registers: Registers) -> bool:
        """Whether a vCPU with these registers executes the next iteration."""
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
        self, registers: Registers, watched: Mapping[int, Collection[Watch]]
    ) -> bool:
        """Whether another iteration follows, which uses a page with watches again."""
        if registers.rip != self.registers.rip:
            return False
        found = self.repeated
        if found is None or not registers.rcx & found.mask:
            return False
        next_one = data_use(registers, self.code)
        if next_one is None:
            return True  # nothing tells: the next event of the vCPU does
        return any(
            one.written or watch.reads
            for one in next_one.operands
            for linear in {one.linear, one.linear + one.size - 1}
            for watch in watched.get(self._gfn(linear), ())
        )

    def _gfn(self, linear: int) -> int:
        """Return the page that an address leads to; -1 for none."""
        try:
            return self._linear.translate(linear).physical >> PAGE_SHIFT
        except (NotMappedError, InvalidArgumentError):
            return -1

    # Before the step.

    def may_write(self, gfn: int) -> None:
        """Keep a page as it is before the execution writes it."""
        if gfn not in self.written:
            self.written[gfn] = bytes(self._mapped.page(gfn))

    def access(self, event: MemAccess, watches: Iterable[Watch]) -> list[Use]:
        """Note an access to a page with watches; return the uses that were not known before."""
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
        """Whether decoding tells all that it does, so that nothing need be compared.

        Not where the access may be a push: the delivery of an event looks the same.
        """
        if event.access_flags & AccessFlag.FAULT_IN_GPT:
            return False
        decoded, top = self.decoded, self.registers.linear_rsp
        if decoded is None or not decoded.complete or self._explaining(event) is None:
            return False
        return all(
            one.exact
            and abs(one.linear - top) > _LONGEST_FRAME
            and (one.linear & PAGE_SIZE - 1) + one.size <= PAGE_SIZE
            for one in decoded.operands
        )

    def _explaining(self, event: MemAccess) -> Operand | None:
        """Return the operand whose access was reported."""
        if not event.access_flags & AccessFlag.GLA_VALID:
            return None
        gla = int(event.gla)
        for one in self._operands:
            if one.linear <= gla < one.linear + one.size:
                return one
        return None

    def _pieces(self, event: MemAccess, written: bool) -> list[_Piece]:
        """List what it uses in the page of an access."""
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
            end = one.linear + one.size
            linear = one.linear
            while linear < end:
                stop = min(end, (linear | PAGE_SIZE - 1) + 1)
                same_page = linear >> PAGE_SHIFT == event.gla >> PAGE_SHIFT
                if same_page or self._gfn(linear) == gfn:
                    at = gfn << PAGE_SHIFT | linear & PAGE_SIZE - 1
                    length = end - linear if one.exact else None
                    found.append(_Piece(at, stop - linear, length, is_written, one.exact))
                linear = stop
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
        """Return what the bytes of a use are now."""
        self.written.clear()
        return self.content(use.start, use.start + len(use.old))

    def compare(self, registers: Registers, watched: Mapping[int, Iterable[Watch]]) -> None:
        """Find what was written besides, and what was not.

        Args:
            registers: After the step.
            watched: By gfn.
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
        """Return which bytes of a page were pushed, though the instruction's operands do not tell.

        An event's frame reaches from the new top of the stack to the first byte that was pushed.
        """
        linear = self._pushed.get(gfn)
        if linear is None:
            return None
        top, before = registers.linear_rsp, self.registers
        found = next((one for one in self._operands if one.on_stack), None)
        if found is not None and 0 <= registers.rip - before.rip <= 15:
            return None  # it has executed
        end = linear + registers.word_size
        if 0 < before.linear_rsp - top <= _LONGEST_FRAME:
            end = max(end, before.linear_rsp)
        if not 0 <= linear - top <= _LONGEST_FRAME:
            return None
        page = linear & -PAGE_SIZE
        return max(top - page, 0), min(end - page, PAGE_SIZE)


def _difference(before: bytes, now: bytes, first: int, last: int) -> tuple[int, int]:
    """Return from where to where two pages differ within some bounds; empty if they do not."""
    if before[first:last] == now[first:last]:
        return 0, 0
    while before[first] == now[first]:
        first += 1
    while before[last - 1] == now[last - 1]:
        last -= 1
    return first, last
