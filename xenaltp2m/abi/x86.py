# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the CPU does by its manual: page walks, segments, gates, and which instructions exit.

Names and numbers are those of the Intel SDM, volume 3. Nothing here knows of Xen: memory is
reached through functions that the caller gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from xenaltp2m.types import PAGE_SIZE

DB, BP, OF, UD, DF, NP, GP, PF, VE = 1, 3, 4, 6, 8, 11, 13, 14, 20
"""Exception vectors."""
NO_ERROR_CODE = 0xFFFF_FFFF
"""As Xen says that an exception has none (``X86_EVENT_NO_EC``)."""
CR0_PE, CR0_ET, CR0_WP, CR0_PG = 1 << 0, 1 << 4, 1 << 16, 1 << 31
CR4_TSD, CR4_DE, CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP = (
    1 << 2,
    1 << 3,
    1 << 4,
    1 << 5,
    1 << 12,
    1 << 20,
    1 << 21,
)
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11
FLAG_TF, FLAG_IF, FLAG_DF, FLAG_OF, FLAG_NT = 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 14
FLAG_RF, FLAG_VM, FLAG_AC = 1 << 16, 1 << 17, 1 << 18

PTE_PRESENT, PTE_ACCESSED, PTE_DIRTY = 1, 1 << 5, 1 << 6
_WRITABLE, _USER, _LARGE = 2, 4, 1 << 7
_NO_EXECUTE = 1 << 63
FRAME = 0x000F_FFFF_FFFF_F000
"""The address in an entry of page tables, and in CR3 in long mode."""
_U32 = (1 << 32) - 1
_PDPTE_RESERVED = 0x1E6
_READ, _WRITE, _FETCH = "r", "w", "x"
_ERROR_PRESENT, _ERROR_WRITE, _ERROR_USER, _ERROR_RESERVED, _ERROR_FETCH = 1, 2, 4, 8, 16


class Fault(Exception):  # noqa: N818 - the CPU's word
    """An exception that the CPU raises."""

    def __init__(
        self, vector: int, error_code: int = NO_ERROR_CODE, address: int = 0, kind: str = ""
    ) -> None:
        super().__init__(vector)
        self.vector = vector
        self.error_code = error_code
        self.address = address
        """For cr2."""
        self.kind = kind
        """Of a page fault: "r", "w" or "x"."""


class Translation(NamedTuple):
    """Where a linear page lies, and what the guest's own tables allow."""

    physical: int
    rights: str
    """Some of "rwx"; no "w" while the page is not marked dirty."""


class Entry(NamedTuple):
    """An entry of a page table."""

    address: int
    """Physical."""
    size: int
    value: int


class Walk(NamedTuple):
    """Where a linear address leads."""

    physical: int
    page_size: int
    writable: bool
    """By all entries together, as ``user`` and ``executable`` are."""
    user: bool
    executable: bool
    entries: tuple[Entry, ...]
    """From the top."""


@dataclass(frozen=True)
class Paging:
    """The registers that a page walk depends on."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    user: bool
    alignment_check: bool = False
    """EFLAGS.AC, with which supervisors may use users' pages despite SMAP."""
    physical_bits: int = 39
    """MAXPHYADDR."""

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """Of each level, from the top: its lowest bit, its index's bits, its entry's size."""
        if not self.cr4 & CR4_PAE:
            return [(22, 10, 4), (12, 10, 4)]
        if not self.efer & EFER_LMA:
            return [(30, 2, 8), (21, 9, 8), (12, 9, 8)]
        top = [(48, 9, 8)] if self.cr4 & CR4_LA57 else []
        return [*top, (39, 9, 8), (30, 9, 8), (21, 9, 8), (12, 9, 8)]

    def translate(
        self,
        address: int,
        kind: str,
        load: Callable[[int, int], int],
        store: Callable[[int, int, int], None],
    ) -> Translation:
        """Walk the tables for an access, as the CPU does.

        Args:
            address: Linear.
            kind: "r", "w" or "x".
            load: Reads an entry: physical address, size.
            store: Sets an entry's accessed and dirty bits: physical address, size, value.

        Raises:
            Fault: The page fault.
        """
        if not self.cr0 & CR0_PG:
            return Translation(address & ~(PAGE_SIZE - 1) & _U32, "rwx")
        walk = self.walk(address, load, kind)
        rights = self._rights(walk.writable, walk.user, not walk.executable)
        if kind not in rights:
            raise self._fault(address, kind, _ERROR_PRESENT)
        marked = walk.entries[1:] if len(self.levels) == 3 else walk.entries  # PDPTEs are not
        dirty = walk.entries[-1].value & PTE_DIRTY
        for entry in marked:
            marks = PTE_ACCESSED | (PTE_DIRTY if kind == _WRITE and entry is marked[-1] else 0)
            if marks & ~entry.value:
                store(entry.address, entry.size, entry.value | marks)
                dirty |= marks & PTE_DIRTY
        page = walk.physical & ~(PAGE_SIZE - 1)
        return Translation(page, rights if dirty else rights.replace(_WRITE, ""))

    def walk(self, address: int, load: Callable[[int, int], int], kind: str = _READ) -> Walk:
        """Look where a linear address leads, whoever uses it; paging is on.

        Args:
            address: Linear.
            load: Reads an entry: physical address, size.
            kind: What a fault says that it was for.

        Raises:
            Fault: It leads nowhere.
        """
        levels = self.levels
        long = bool(self.efer & EFER_LMA)
        if long and not canonical(address, 57 if len(levels) == 5 else 48):
            raise Fault(GP, 0)
        base = self.cr3 & (FRAME if long else 0xFFFF_FFE0 if self.cr4 & CR4_PAE else 0xFFFF_F000)
        writable = user = executable = True
        entries: list[Entry] = []
        for shift, bits, size in levels:
            where = base + (address >> shift & ((1 << bits) - 1)) * size
            value = load(where, size)
            entries.append(Entry(where, size, value))
            if not value & PTE_PRESENT:
                raise self._fault(address, kind, 0)
            base = value & FRAME
            if shift == 30 and not long:  # its rights are those of the tables below
                if value & _PDPTE_RESERVED:
                    raise self._fault(address, kind, _ERROR_PRESENT | _ERROR_RESERVED)
                continue
            large = shift in (21, 30) or (shift == 22 and self.cr4 & CR4_PSE)
            last = shift == 12 or bool(large and value & _LARGE)
            if value & self._reserved(shift, last):
                raise self._fault(address, kind, _ERROR_PRESENT | _ERROR_RESERVED)
            executable = executable and not value & _NO_EXECUTE
            writable = writable and bool(value & _WRITABLE)
            user = user and bool(value & _USER)
            if last:
                break
        if shift == 22:
            base = value & 0xFFC0_0000 | (value & 0x1F_E000) << 19
        within = (1 << shift) - 1
        physical = base & ~within | address & within
        return Walk(physical, within + 1, writable, user, executable, tuple(entries))

    def _reserved(self, shift: int, last: bool) -> int:
        """The bits of an entry that must be 0 (SDM 3A, tables 4-4, 4-9 and 4-15)."""
        if not self.cr4 & CR4_PAE:
            return 0x3F_E000 & -1 << min(self.physical_bits, 40) - 19 if last and shift > 12 else 0
        highest = 51 if self.efer & EFER_LMA else 62
        reserved = (1 << highest + 1) - (1 << self.physical_bits)
        if not self.efer & EFER_NXE:
            reserved |= _NO_EXECUTE
        if last:
            return reserved | (1 << shift) - 1 & ~0x1FFF
        return reserved | (_LARGE if shift > 30 else 0)

    def _rights(self, writable: bool, user: bool, no_execute: bool) -> str:
        if self.user:
            rights = "" if not user else "rwx" if writable else "rx"
        else:
            rights = "rwx" if writable or not self.cr0 & CR0_WP else "rx"
            if user and self.cr4 & CR4_SMAP and not self.alignment_check:
                rights = rights.replace(_READ, "").replace(_WRITE, "")
            if user and self.cr4 & CR4_SMEP:
                no_execute = True
        return rights.replace(_FETCH, "") if no_execute else rights

    def _fault(self, address: int, kind: str, code: int) -> Fault:
        code |= _ERROR_WRITE if kind == _WRITE else 0
        code |= _ERROR_USER if self.user else 0
        no_execute = self.cr4 & CR4_PAE and self.efer & EFER_NXE
        if kind == _FETCH and (no_execute or self.cr4 & CR4_SMEP):
            code |= _ERROR_FETCH
        return Fault(PF, code, address, kind)


def page_table_entry_size(cr4: int) -> int:
    """How many bytes an entry of page tables has."""
    return 8 if cr4 & CR4_PAE else 4


def canonical(address: int, bits: int = 48) -> bool:
    """Whether the upper bits of a linear address are copies of the highest one used."""
    upper = address >> (bits - 1)
    return upper in (0, (1 << (65 - bits)) - 1)


# Segments.


class Segment(NamedTuple):
    """A segment register's hidden part; ``attributes`` as VMX packs them for Xen: 12 bits."""

    base: int
    limit: int
    attributes: int

    @property
    def privilege(self) -> int:
        """DPL."""
        return self.attributes >> 5 & 3

    @property
    def is_code(self) -> bool:
        """Whether it is code, and no data or system segment."""
        return self.attributes & _CODE == _CODE

    @property
    def is_64_bit(self) -> bool:
        """Whether it is 64-bit code."""
        return self.attributes & (_CODE_L | _BIG) == _CODE_L

    @property
    def is_present(self) -> bool:
        """P."""
        return bool(self.attributes & _SEGMENT_PRESENT)


_CODE, _SEGMENT_PRESENT, _CODE_L, _BIG, _GRANULAR = 0x18, 1 << 7, 1 << 9, 1 << 10, 1 << 11


def segment_of(raw: int) -> Segment:
    """Return what loading a descriptor of 8 bytes gives."""
    base = (raw >> 16 & 0xFF_FFFF) | (raw >> 56 & 0xFF) << 24
    limit = (raw & 0xFFFF) | (raw >> 48 & 0xF) << 16
    attributes = (raw >> 40 & 0xFF) | (raw >> 52 & 0xF) << 8
    if attributes & _GRANULAR:
        limit = limit << 12 | 0xFFF
    return Segment(base, limit, attributes)


# Exceptions through the IDT.

_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21})
_CONTRIBUTORY = frozenset({0, 10, 11, 12, 13})
_INTERRUPT_GATE, _TRAP_GATE, _WIDE = 0x6, 0x7, 0x8


def has_error_code(vector: int) -> bool:
    """Whether the CPU pushes an error code."""
    return vector in _WITH_ERROR_CODE


def doubled(first: int, second: int) -> bool:
    """Whether a second exception, while the first is delivered, makes a double fault."""
    if first in (PF, VE):  # SDM 3A, table 6-4
        return second in _CONTRIBUTORY or second == PF
    return first in _CONTRIBUTORY and second in _CONTRIBUTORY


class Gate(NamedTuple):
    """An entry of the IDT."""

    selector: int
    offset: int
    kind: int
    privilege: int
    stack: int
    """IST's index; 0 for none."""

    @property
    def masks_interrupts(self) -> bool:
        """Whether IF is cleared."""
        return self.kind & ~_WIDE == _INTERRUPT_GATE

    @property
    def width(self) -> int:
        """Of what is pushed, outside of long mode."""
        return 4 if self.kind & _WIDE else 2

    @classmethod
    def of(cls, raw: bytes, vector: int, external: int) -> Gate:
        """Decode an entry of 8 bytes, or of 16 in long mode.

        Raises:
            Fault: It is not present or not a gate for interrupts.
        """
        low = int.from_bytes(raw[:8], "little")
        kind = low >> 40 & 0x1F
        code = vector * 8 + 2 + external
        narrow = kind in (_INTERRUPT_GATE, _TRAP_GATE) and len(raw) == 8
        if not narrow and kind not in (_INTERRUPT_GATE | _WIDE, _TRAP_GATE | _WIDE):
            raise Fault(GP, code)
        if not low >> 47 & 1:
            raise Fault(NP, code)
        offset = (low & 0xFFFF) | (0 if narrow else low >> 48 << 16)
        if len(raw) == 16:
            offset |= int.from_bytes(raw[8:12], "little") << 32
        return cls(
            low >> 16 & 0xFFFF, offset, kind, low >> 45 & 3, low >> 32 & 7 if len(raw) == 16 else 0
        )


# Instructions.

_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3") | frozenset(
    range(0x40, 0x50)
)
_PREFIX_BYTES = bytes(_PREFIXES)
_EXITING = re.compile(
    rb"(?=[\x6c-\x6f\x9c\x9d\xcc-\xcf\xe4-\xe7\xec-\xef\xf1\xf4\xfa\xfb]"
    rb"|\x0f(?:[\x00\x01\x05-\x09\x20-\x23\x30-\x35\xa2\xc7]|\Z))",
    re.DOTALL,
)
"""Among them are PUSHF, for Unicorn pushes RF and keeps it longer than one instruction after IRET,
POPF and IRET, so that a run begins with what a TF that they set traps, and CMPXCHG8B, whose other
flags Unicorn takes from an instruction before the last."""


def exiting_starts(page: bytes) -> Iterator[int]:
    """Yield the offsets in a page where an instruction may begin that the CPU must not run alone.

    It may be a part of a page. Too many rather than too few: bytes within instructions are among
    them. An instruction that begins in the page before is found by its prefixes or its first byte.
    """
    for found in _EXITING.finditer(page):
        yield from _with_prefixes(page, found.start())
    if page[-1] in _PREFIXES:
        yield from _with_prefixes(page, len(page) - 1)


def _with_prefixes(page: bytes, at: int) -> Iterator[int]:
    yield at
    for before in range(at - 1, max(at - 15, -1), -1):
        if page[before] not in _PREFIXES:
            break
        yield before


def is_inc_or_dec(code: bytes, long: bool) -> bool:
    """Whether it is INC or DEC of a register, of one byte, that in 64-bit mode is a prefix."""
    first = code.lstrip(bytes(_PREFIXES - {*range(0x40, 0x50)}))[:1]
    return not long and b"\x40" <= first < b"\x50"


class Decoded(NamedTuple):
    """An instruction among those that exit."""

    opcode: int
    """One byte, or 0x0f00 and the second."""
    length: int
    modrm: int
    immediate: int
    rex: int
    operand_size: int
    """2, 4 or 8 bytes."""
    repeats: bool


SYSCALL, SYSENTER = 0x0F05, 0x0F34
_UNPRIVILEGED = frozenset(
    {0x9C, 0x9D, 0xCC, 0xCD, 0xCE, 0xCF, 0xF1, 0x0FA2, 0x0FC7, 0x0F31, SYSCALL, SYSENTER}
)
_UNPRIVILEGED_01 = frozenset({0xC1, 0xD0, 0xD4, 0xF9})


def is_privileged(opcode: int, modrm: int) -> bool:
    """Whether an instruction that exits is for privilege level 0 alone (IOPL and UMIP left out)."""
    if opcode == 0x0F01:
        if modrm >= 0xC0:
            return modrm not in _UNPRIVILEGED_01 and modrm >> 3 & 7 != 4
        return modrm >> 3 & 7 not in (0, 1, 4)
    if opcode == 0x0F00:
        return modrm >> 3 & 7 in (2, 3)
    return opcode not in _UNPRIVILEGED


_STRING = frozenset(b"\x6c\x6d\x6e\x6f\xa4\xa5\xa6\xa7\xaa\xab\xac\xad\xae\xaf")
_SEGMENT_PREFIXES = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}


class Repeated(NamedTuple):
    """A string instruction with a prefix to repeat it."""

    opcode: int
    width: int
    """Bytes that one repetition moves."""
    mask: int
    """Of the address size: so much of rcx, rsi and rdi is used."""
    source: str
    """The segment that rsi is in."""
    length: int
    """Bytes of the instruction."""

    @property
    def is_movs(self) -> bool:
        """MOVS, whose operands are both in memory."""
        return self.opcode in (0xA4, 0xA5)

    @property
    def is_stos(self) -> bool:
        """STOS."""
        return self.opcode in (0xAA, 0xAB)


def _prefixes_of(code: bytes, long: bool) -> bytes | None:
    """Return an instruction's prefixes; None for INC and DEC, or if ``code`` has nothing else."""
    prefixes = code[: len(code) - len(code.lstrip(_PREFIX_BYTES))]
    if len(prefixes) == len(code):
        return None
    if prefixes and not long and any(0x40 <= one < 0x50 for one in prefixes):
        return None
    return prefixes


def _rex_of(prefixes: bytes) -> int:
    """Return the REX prefix, which counts as the last one only; 0 if there is none."""
    return prefixes[-1] if prefixes and 0x40 <= prefixes[-1] < 0x50 else 0


def _operand_size(prefixes: bytes, default_size: int) -> int:
    if _rex_of(prefixes) & 8:
        return 8
    return 6 - default_size if 0x66 in prefixes else default_size


def repeated(code: bytes, long: bool, default_size: int) -> Repeated | None:
    """Decode a repeated string instruction; None for any other."""
    prefixes = _prefixes_of(code, long)
    if prefixes is None or not (0xF2 in prefixes or 0xF3 in prefixes):
        return None
    opcode = code[len(prefixes)]
    if opcode not in _STRING:
        return None
    bits = 64 if long else 8 * default_size
    if 0x67 in prefixes:
        bits = {64: 32, 32: 16, 16: 32}[bits]
    segments = [_SEGMENT_PREFIXES[one] for one in prefixes if one in _SEGMENT_PREFIXES]
    source = segments[-1] if segments else "ds"
    width = _operand_size(prefixes, default_size) if opcode & 1 else 1
    return Repeated(opcode, width, (1 << bits) - 1, source, len(prefixes) + 1)


_IMMEDIATE = frozenset({0xCD, 0xE4, 0xE5, 0xE6, 0xE7})
_NO_MODRM = frozenset(
    {0x0F06, 0x0F07, 0x0F08, 0x0F09, 0x0F30, 0x0F31, 0x0F32, 0x0F33, 0x0F35, 0x0FA2}
    | {SYSCALL, SYSENTER}
)


def decode(code: bytes, long: bool, default_size: int) -> Decoded | None:
    """Decode an instruction that exits; None for any other, or where ``code`` ends too early.

    With an operand in memory, only the ModRM byte is decoded, and the length is 0.
    """
    prefixes = _prefixes_of(code, long)
    if prefixes is None:
        return None
    at = len(prefixes)
    opcode, length, modrm, immediate = code[at], at + 1, 0, 0
    if opcode == 0x0F:
        if length == len(code):
            return None
        opcode = 0x0F00 | code[length]
        length += 1
        if opcode not in _NO_MODRM:
            if length == len(code):
                return None
            modrm = code[length]
            is_register = modrm >= 0xC0 or 0x0F20 <= opcode <= 0x0F23
            length = length + 1 if is_register else 0
    elif opcode in _IMMEDIATE:
        if length == len(code):
            return None
        immediate = code[length]
        length += 1
    if not _EXITING.match(bytes([opcode]) if opcode < 0x0F00 else opcode.to_bytes(2, "big")):
        return None
    if not prefixes:
        return Decoded(opcode, length, modrm, immediate, 0, default_size, repeats=False)
    size, repeats = _operand_size(prefixes, default_size), 0xF2 in prefixes or 0xF3 in prefixes
    return Decoded(opcode, length, modrm, immediate, _rex_of(prefixes), size, repeats)
