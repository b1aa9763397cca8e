# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which symbol lies where: by a guest's image, an ELF file, or by a kernel's own list.

The file may come from anywhere. Its size, its tables and every offset in it are bounded and
checked before use; whatever is wrong with it ends in a :class:`~xenaltp2m.errors.SymbolError`.
"""

from __future__ import annotations

import copy
import difflib
import io
import os
import re
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self, TypeAlias

from xenaltp2m.abi.x86 import CR0_PG
from xenaltp2m.elf import (
    ET_CORE,
    ET_REL,
    MAGIC,
    PF_W,
    PF_X,
    PT_LOAD,
    SHF_ALLOC,
    SHT_DYNSYM,
    SHT_STRTAB,
    SHT_SYMTAB,
    BuildId,
    ElfFile,
    Section,
    opened,
)
from xenaltp2m.errors import SymbolError
from xenaltp2m.types import GFN_LIMIT, PAGE_SHIFT

if TYPE_CHECKING:
    from xenaltp2m.events import Registers

MAX_SYMBOLS = 1 << 20
"""A Linux kernel with all its local symbols has about a quarter."""

MAX_NAMES = 1 << 28
"""Bytes in all names together: symbols may share their ends, so the file's size bounds nothing."""

MAX_STEPS = 1 << 26
"""Reads of a few bytes in a search, by pyelftools: a minute or two."""

_NO_PLACES = frozenset((0, 0xFFF1, 0xFFF2))
"""SHN_UNDEF, SHN_ABS and SHN_COMMON: the value of such a symbol is no address (gABI, chapter 4)."""
_PLACES = frozenset((0, 1, 2, 10))
"""STT_NOTYPE, OBJECT, FUNC and GNU_IFUNC: the types whose value is an address."""
_OBJECT = 1
"""STT_OBJECT."""
_SOURCE_FILE = 4
"""STT_FILE: the local symbols that follow are from it."""
_LOCAL = 0
_GLOBAL = 2
"""Ranks: 0 a local label, 1 a local function or object, 2 and 3 the same but global or weak."""
_FEW_NAMES = 20_000
"""So many are searched for similar ones quickly enough."""
_FEW_PLACES = 8
"""So many symbols of one name are listed."""
_MAP_LINE = re.compile(rb"[0-9A-Fa-f]{1,16} [A-Za-z?] ")
_NO_ADDRESS = re.compile(rb"\s*(?:\(null\) [A-Za-z?]|[UwvV]) \S+(?:\s+\[\S*\])?\s*")
"""What a kernel before 4.15 prints of an address it hides, and nm of a symbol without one."""
_ELSEWHERE = b"ffffffffffffffff B The"
"""Debian's System.map is a sentence that says which package has it."""
_LONGEST_LINE = 1024
_WITH_OFFSET = re.compile(r"(.+)\+(0x[0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,18})")
_SELECTED = re.compile(r"(.+)(?:#([1-9][0-9]{0,6})|@(0x[0-9a-fA-F]{1,16}))|(.+)@(.+)")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{1,16}")
_ENTRIES = {
    "msr_lstar": ("entry_SYSCALL_64",),
    "msr_cstar": ("entry_SYSCALL_compat", "ignore_sysret", "entry_SYSCALL32_ignore"),
    "sysenter_eip": ("entry_SYSENTER_compat", "entry_SYSENTER_32"),
}
"""Where a Linux kernel is entered, by the register that has the address (syscall_init)."""
_ENTRY_AREA = range(0xFFFFFE0000000000, 0xFFFFFE8000000000)
"""Each CPU's entry area, at the same address in every kernel. Linux 4.15 to 4.19 with page-table
isolation have MSR_LSTAR in a trampoline there (SYSCALL64_entry_trampoline)."""
_SLIDE_STEP, _SLIDE_LIMIT = 2 << 20, 1 << 30
"""CONFIG_PHYSICAL_ALIGN at least, and KERNEL_IMAGE_SIZE (Linux, arch/x86)."""
_FARTHEST = 1 << 20
"""What is farther behind a symbol without a size is not of it."""
_MOST_NESTED = 64
_SYMBOL = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}


class Meter:
    """Counts what is read of streams: tables may lead to the same bytes again and again.

    Attributes:
        left: How many steps may be taken; below 0 there were too many.
    """

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin to count."""
        self.left = MAX_STEPS

    def on(self, stream: IO[bytes]) -> Any:
        """Return what pyelftools may read a stream by."""
        return _Metered(stream, self)


class _Metered:
    __slots__ = ("_meter", "_stream", "seek")

    def __init__(self, stream: IO[bytes], meter: Meter) -> None:
        self._stream, self._meter, self.seek = stream, meter, stream.seek

    def tell(self) -> int:
        self._step(1)
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        self._step(1 + (min(size, 64) >> 2))  # names come 64 bytes at a time, and stay
        return self._stream.read(size)

    def _step(self, steps: int) -> None:
        self._meter.left -= steps
        if self._meter.left < 0:
            raise SymbolError("there is too much to read")


class Symbol(NamedTuple):
    """A name for a place in the image."""

    name: str
    address: int
    """As the guest's code uses it: virtual. Where paging is off, guest-physical."""
    size: int
    """Bytes; 0 where the file does not tell, as for labels in assembly."""
    is_data: bool = False
    """Whether the file says that it is no code (STT_OBJECT; b, d and r in a kernel's list)."""


_Found: TypeAlias = tuple[int, int, Symbol] | tuple[int, int, Symbol, str]


@dataclass(frozen=True, slots=True)
class Location:
    """An address, told by the symbol it lies in."""

    symbol: Symbol
    offset: int

    def __str__(self) -> str:
        return f"{self.symbol.name}+{self.offset:#x}" if self.offset else self.symbol.name


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the image that is loaded into memory."""

    address: int
    """Guest-physical, where the loader puts it."""
    virtual: int
    """Where the guest's code sees it."""
    size: int
    """Bytes in memory: ``data``, then zeros."""
    data: bytes = field(repr=False)
    writable: bool
    executable: bool

    def holds(self, address: int, size: int = 1) -> bool:
        """Tell whether ``size`` bytes from a virtual address on lie within."""
        return self.virtual <= address and address + size <= self.virtual + self.size

    def physical(self, address: int) -> int:
        """Return where a virtual address is, guest-physical."""
        return address - self.virtual + self.address


class Symbols:
    """Names for addresses, of an ELF image (:class:`Image`) or a kernel's list of its own.

    Attributes:
        name: What the file was called when it was opened.
        symbols: Every symbol with an address, by address, as the file has it.
        skipped: How many lines of a list were passed over, for they have no address.
        slide: How far from where the file says everything is: what KASLR has added.
    """

    _has_modules = True
    """Whether the origin of a symbol is a module, which does not move with the kernel."""

    def __init__(self, found: Sequence[_Found], name: str, skipped: int = 0) -> None:
        """Take over symbols: (address, rank, symbol), and maybe where it is from."""
        self.name, self.skipped = name, skipped
        self.slide = 0
        found = sorted(found, key=itemgetter(0, 1))
        self.symbols: tuple[Symbol, ...] = tuple(one[2] for one in found)
        self._addresses = [symbol.address for symbol in self.symbols]
        self._ranks = bytes(one[1] for one in found)
        self._origins = [one[3] if len(one) > 3 else "" for one in found]
        """The kernel module that a list has it from; of a local ELF symbol, its source file."""
        # Numbers of symbols: there are many, few of them have a namesake.
        self._first: dict[str, int] = {}
        self._namesakes: dict[str, list[int]] = {}
        for at, symbol in enumerate(self.symbols):
            if self._first.setdefault(symbol.name, at) != at:
                self._namesakes.setdefault(symbol.name, []).append(at)
        self._around = _enclosing(self.symbols)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Symbols:
        """Read an ELF image, System.map or a copy of /proc/kallsyms; tell them by their content.

        Raises:
            SymbolError: It cannot be read, or is none of these.
        """
        name = os.fspath(path)
        with opened(path) as stream:
            magic = stream.read(len(MAGIC))
            stream.seek(0)
            if magic == MAGIC:
                return Image(stream, name, Path(name).parent)
            return cls(*_map_symbols(stream, name))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} of {len(self.symbols)} symbols>"

    def slid(self, slide: int) -> Self:
        """Return the same symbols, so many bytes further up."""
        other = copy.copy(self)
        other.slide = slide
        return other

    def find_slide(self, registers: Registers) -> int:
        """Find how far up KASLR has put a Linux kernel, by a vCPU's registers.

        The kernel's entries are known to both: a register has the address, and it has a name.

        Raises:
            SymbolError: They do not fit, or one of them does not know any entry.
        """
        slides, told = self._slides(registers)
        if slides is None:
            raise SymbolError(
                f"{self.name}: where the guest has its kernel cannot be found",
                hint=(
                    "it lacks entry_SYSCALL_64: use a whole list, or say --slide",
                    "the guest's kernel has not begun yet, and the vCPU's MSR_LSTAR is 0",
                ),
            )
        fitting = [one for one in slides if not one % _SLIDE_STEP and 0 <= one < _SLIDE_LIMIT]
        if len(fitting) != 1:
            raise SymbolError(f"{self.name} is not of the kernel that runs: {', '.join(told)}")
        return fitting[0]

    def _slides(self, registers: Registers) -> tuple[set[int] | None, list[str]]:
        """How far each register says; None if none says anything. And what they say, in words."""
        slides: set[int] | None = None
        told = []
        for register, names in _ENTRIES.items():
            there = getattr(registers, register, 0)  # an event's registers have no MSR_CSTAR
            known = [self.symbol(name) for name in names if name in self._first]
            if there and there not in _ENTRY_AREA and known:
                told += [f"{one.name} is at {one.address:#x} in it" for one in known]
                told += [f"the vCPU's {register} is {there:#x}"]
                here = {there - one.address for one in known}
                slides = here if slides is None else slides & here
        return slides, told

    def in_guest(self, registers: Registers) -> Self:
        """Return the same symbols where a guest has them, as far as registers tell.

        Those of an image stay where they are if none tells: not every image is a Linux kernel.

        Raises:
            SymbolError: As :meth:`find_slide`.
        """
        return self.slid(self.find_slide(registers))

    def symbol(self, name: str) -> Symbol:
        """Find a symbol by its name; a global one is preferred to local ones.

        Of several with the same name, ``name@module`` (or source file), ``name@0xffff...`` (the
        address, as the file has it) and ``name#2`` (the second, by address) choose one.

        Raises:
            SymbolError: There is none, or several local ones at different addresses.
        """
        return self.symbols[self._find(name)]

    def _find(self, name: str) -> int:
        if name in self._first:
            same = self._named(name)
            return self._only(name, [at for at in same if self._ranks[at] >= _GLOBAL] or same)
        if _ADDRESS.fullmatch(name):
            at = bisect_right(self._addresses, int(name, 16)) - 1
            if at >= 0 and self._addresses[at] == int(name, 16):
                return at
        parts = _SELECTED.fullmatch(name)
        if parts is not None and (base := parts[1] or parts[4]) in self._first:
            same = self._named(base)
            addresses = sorted({self._addresses[at] for at in same})
            if parts[5]:
                chosen = [at for at in same if self._origins[at] == parts[5]]
            else:
                wanted = [int(parts[3], 16)] if parts[3] else addresses[int(parts[2]) - 1 :][:1]
                chosen = [at for at in same if self._addresses[at] in wanted]
            if chosen:
                return self._only(name, chosen)
            raise SymbolError(f"{self.name} has no symbol {name!r}, but {self._listed(same)}")
        if not self.symbols:
            raise SymbolError(f"{self.name} has no symbols: it is stripped", hint=self._stripped())
        few = len(self._first) <= _FEW_NAMES
        close = difflib.get_close_matches(name, self._first, 3) if few else []
        known = f"; did you mean {' or '.join(close)}?" if close else ""
        raise SymbolError(f"{self.name} has no symbol {name!r}{known}")

    def _stripped(self) -> tuple[str, ...]:
        return ()

    def _named(self, name: str) -> list[int]:
        return [self._first[name], *self._namesakes.get(name, ())]

    def _only(self, name: str, chosen: list[int]) -> int:
        if len({self._addresses[at] for at in chosen}) > 1:
            raise SymbolError(f"{self.name} has several symbols {name!r}: {self._listed(chosen)}")
        return chosen[-1]

    def _listed(self, chosen: list[int]) -> str:
        """Tell symbols of one name apart, as they can be chosen."""
        name = self.symbols[chosen[0]].name
        numbers = sorted({self._addresses[at] for at in self._named(name)})
        places = sorted({self._addresses[at]: self._origins[at] for at in chosen}.items())
        shown = [
            f"{name}#{numbers.index(address) + 1} at {address:#x}{origin and f' ({origin})'}"
            for address, origin in places[:_FEW_PLACES]
        ]
        more = f", ... {len(places)} in all" if len(places) > _FEW_PLACES else ""
        return ", ".join(shown) + more

    def address(self, place: str) -> int:
        """Return where something is: ``name`` or ``name+0x10``, slide included.

        See :attr:`Symbol.address`.

        Raises:
            SymbolError: As :meth:`symbol`; or it is in a module, which does not move with the
                kernel.
        """
        at, offset = self._place(place)
        if self.is_in_module(place) and self.slide:
            raise SymbolError(
                f"{self.name}: {self.symbols[at].name} is in the module {self._origins[at]}: "
                "nothing tells where that is since the kernel was loaded elsewhere",
                hint=("make a copy of /proc/kallsyms in the guest as it runs now",),
            )
        return self._addresses[at] + offset + self.slide

    def is_in_module(self, place: str) -> bool:
        """Whether a place is in a kernel module, which is loaded anywhere.

        Raises:
            SymbolError: As :meth:`symbol`.
        """
        return self._has_modules and bool(self._origins[self._place(place)[0]])

    def _place(self, place: str) -> tuple[int, int]:
        parts = _WITH_OFFSET.fullmatch(place) if place not in self._first else None
        if parts is None:
            return self._find(place), 0
        return self._find(parts[1]), int(parts[2], 0)

    def locate(self, address: int) -> Location | None:
        """Say which symbol an address lies in, slide included; None where nothing is known.

        That is the innermost with a size that has it within; else the label before it.
        """
        address -= self.slide
        at = bisect_right(self._addresses, address) - 1
        if at >= 0 and self._addresses[at] != address:
            nearest, at = at, self._covering(at, address)
            if at < 0 and not self.symbols[nearest].size:
                at = nearest
        if at < 0 or (self.slide and self._has_modules and self._origins[at]):
            return None
        found = self.symbols[at]
        offset = address - found.address
        return Location(found, offset) if offset < (found.size or _FARTHEST) else None

    def extent(self, address: int, few: int, most: int) -> tuple[int, int]:
        """Return where the function around an address begins, slide included, and its bytes.

        Args:
            address: In it, slide included.
            few: How many bytes one has that nothing tells the end of.
            most: How many are told of at most; from the address on, of a longer one.
        """
        found = self.locate(address)
        if found is None or found.symbol.size == 0 or found.offset >= most:
            at = bisect_right(self._addresses, address - self.slide)
            room = self._addresses[at] + self.slide - address if at < len(self.symbols) else few
            return address, min(room, few)
        return address - found.offset, min(found.symbol.size, most)

    def _covering(self, at: int, address: int) -> int:
        """The symbol with a size that an address lies in, the innermost; or -1."""
        for _ in range(_MOST_NESTED):
            if at < 0 or address < self._addresses[at] + self.symbols[at].size:
                return at
            at = self._around[at]
        return -1


class Image(Symbols):
    """An ELF image of a guest, read once and whole; the file is closed again.

    Attributes:
        segments: What is loaded, in the file's order.
        sections: The sections that are loaded, in the file's order; it need not tell of any.
        has_code: Whether the file has what is loaded: one with debugging information alone has not.
        build_id: The note by which the linker has named it, or None.
    """

    _has_modules = False

    def __init__(
        self, content: bytes | BinaryIO, name: str = "image", directory: Path | None = None
    ) -> None:
        """Read an image.

        Args:
            content: The file, or its bytes; must be seekable.
            name: What messages call it.
            directory: Where the files are searched for that it names; with None, they are not.

        Raises:
            SymbolError: It is not an ELF image for x86, or is damaged, or past a limit.
        """
        elf = ElfFile(io.BytesIO(content) if isinstance(content, bytes) else content, name)
        if elf.type == ET_REL:
            elf.refuse("a relocatable object (.o, .ko): its symbols have no addresses yet")
        if elf.type == ET_CORE:
            elf.refuse("a core dump, not an image")
        self.has_code = elf.has_code
        self.segments = tuple(_segments(elf))
        self.sections = tuple(one for one in elf.sections if one.flags & SHF_ALLOC)
        self.build_id: BuildId | None = elf.build_id()
        self._by_address = sorted(
            (one for one in self.segments if one.size), key=attrgetter("virtual")
        )
        self._starts = [one.virtual for one in self._by_address]
        link = elf.section(".gnu_debuglink")
        self._link = "" if link is None else _text(elf.content(link))
        super().__init__(_symbols(elf, content, directory), name)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Image:
        """Read an image from a file.

        Raises:
            SymbolError: It cannot be read, or is not a usable image.
        """
        with opened(path) as stream:
            return cls(stream, os.fspath(path), Path(path).parent)

    def _stripped(self) -> tuple[str, ...]:
        where = f", {self._link}" if self._link else ""
        return (f"use the file with its debugging information{where}",)

    def in_guest(self, registers: Registers) -> Self:
        """As :meth:`Symbols.in_guest`."""
        if not registers.cr0 & CR0_PG or self._slides(registers)[0] is None:
            return self
        return super().in_guest(registers)

    def locate(self, address: int) -> Location | None:
        """Say which symbol an address lies in, or None where the image has nothing there."""
        found = super().locate(address)
        if found is None:
            return None
        segment = self._segment_with(address - self.slide)
        if segment is None or found.symbol.address < segment.virtual:
            return None
        return found

    def extent(self, address: int, few: int, most: int) -> tuple[int, int]:
        """As :meth:`Symbols.extent`; it ends where what is loaded ends."""
        start, size = super().extent(address, few, most)
        segment = self._segment_with(start - self.slide)
        if segment is not None:
            size = min(size, segment.virtual + segment.size - (start - self.slide))
        return start, size

    def is_code(self, address: int) -> bool:
        """Whether a virtual address, slide not included, is in what the guest may execute."""
        segment = self._segment_with(address)
        return segment is not None and segment.executable

    def content(self, address: int, size: int) -> bytes | None:
        """Return what the file loads to a virtual address, slide not included.

        None where it loads nothing there, or does not have it: see ``has_code``.
        """
        segment = self._segment_with(address, size)
        if segment is None or not self.has_code:
            return None
        start = address - segment.virtual
        return segment.data[start : start + size].ljust(size, b"\0")

    def segment(self, symbol: Symbol) -> Segment:
        """Return the segment that a symbol lies in, all of it.

        Raises:
            SymbolError: It lies in none: it is a number rather than a place, or reaches too far.
        """
        segment = self._segment_with(symbol.address, max(symbol.size, 1))
        if segment is None:
            raise SymbolError(
                f"{self.name}: {symbol.name!r}, {symbol.size} bytes at {symbol.address:#x}, "
                "is not in memory that the image loads"
            )
        return segment

    def _segment_with(self, address: int, size: int = 1) -> Segment | None:
        at = bisect_right(self._starts, address) - 1
        if at < 0 or not self._by_address[at].holds(address, size):
            return None
        return self._by_address[at]

    def physical(self, symbol: Symbol) -> int:
        """Return the guest-physical address a symbol is loaded at.

        Raises:
            SymbolError: As :meth:`segment`.
        """
        return self.segment(symbol).physical(symbol.address)

    def physical_of(self, address: int) -> int:
        """Return the guest-physical address that an address, slide included, is loaded at.

        Raises:
            SymbolError: The image has nothing there.
        """
        segment = self._segment_with(address - self.slide)
        if segment is None:
            raise SymbolError(f"{self.name} loads nothing to {address:#x}")
        return segment.physical(address - self.slide)

    def gfns(self, name: str) -> range:
        """Return the gfns a symbol lies in: one, unless it crosses a page boundary.

        Raises:
            SymbolError: There is no such symbol, or it is not in memory.
        """
        symbol = self.symbol(name)
        first = self.physical(symbol)
        last = first + max(symbol.size, 1) - 1
        return range(first >> PAGE_SHIFT, (last >> PAGE_SHIFT) + 1)


def _segments(elf: ElfFile) -> Iterator[Segment]:
    loaded = 0
    for header in elf.programs:
        if header.type != PT_LOAD:
            continue
        length = header.file_size if elf.has_code else 0
        if length > header.size or header.physical + header.size > GFN_LIMIT << PAGE_SHIFT:
            elf.refuse(
                f"a segment of {header.size:#x} bytes at {header.physical:#x} cannot be loaded"
            )
        loaded += length
        if loaded > elf.length:
            elf.refuse("its segments overlap in the file")
        yield Segment(
            header.physical,
            header.virtual,
            header.size,
            elf.read(header.offset, length, "a segment") if length else b"",
            bool(header.flags & PF_W),
            bool(header.flags & PF_X),
        )


def _symbols(elf: ElfFile, content: bytes | BinaryIO, directory: Path | None) -> list[_Found]:
    """Return (address, rank, symbol) of .symtab, else of .dynsym, else of functions by DWARF."""
    for kind in (SHT_SYMTAB, SHT_DYNSYM):
        table = next((one for one in elf.sections if one.type == kind), None)
        if table is not None:
            found = list(_table_symbols(elf, table))
            if found or kind == SHT_SYMTAB:
                return found
    if not any(elf.section(name) for name in (".debug_info", ".zdebug_info")):
        return []
    from xenaltp2m.prototypes import Prototypes

    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    described = Prototypes(stream, elf.name, directory).functions()
    return [(one.address, _GLOBAL + 1, Symbol(*one)) for one in described]


def _table_symbols(elf: ElfFile, section: Section) -> Iterator[_Found]:
    layout, size, link = _SYMBOL[elf.bits], section.size, section.link
    if section.entry_size != layout.size or size % layout.size:
        elf.refuse("the symbol table's entries have no valid size")
    if size // layout.size > MAX_SYMBOLS:
        elf.refuse(f"{size // layout.size} symbols; the limit is {MAX_SYMBOLS}")
    if link >= len(elf.sections) or elf.sections[link].type != SHT_STRTAB:
        elf.refuse("the symbol table names no string table")
    table = elf.read(section.offset, size, "the symbol table")
    names = elf.read(elf.sections[link].offset, elf.sections[link].size, "the string table")
    budget, source = MAX_NAMES, ""
    for fields in layout.iter_unpack(table):
        if elf.bits == 32:
            at, address, size, info, _, index = fields
        else:
            at, info, _, index, address, size = fields
        kind, is_global = info & 15, info >> 4 != _LOCAL
        is_place = kind in _PLACES and index not in _NO_PLACES
        if not is_place and kind != _SOURCE_FILE:
            continue
        end = names.find(b"\0", at, at + budget)
        if end < 0:
            elf.refuse("a symbol's name is not in the string table, or does not end")
        budget -= end - at
        name = names[at:end].decode("utf-8", "backslashreplace")
        if kind == _SOURCE_FILE:
            source = name
        elif name:
            rank = _GLOBAL * is_global + (kind != 0)
            symbol = Symbol(name, address, size, kind == _OBJECT)
            yield address, rank, symbol, "" if is_global else source


def _enclosing(symbols: tuple[Symbol, ...]) -> array[int]:
    """Of each symbol, the number of the latest one with a size that it begins in, or -1."""
    found = array("i")
    around: list[int] = []
    for at, symbol in enumerate(symbols):
        while around and symbols[around[-1]].address + symbols[around[-1]].size <= symbol.address:
            around.pop()
        found.append(around[-1] if around else -1)
        if symbol.size:
            around.append(at)
    return found


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _map_symbols(stream: BinaryIO, name: str) -> tuple[list[_Found], str, int]:
    """Read a kernel's list: address, letter, name, maybe a module.

    Returns:
        What :class:`Symbols` takes: (address, rank, symbol) of each, the name, and how many lines
        were passed over.
    """
    found: list[_Found] = []
    lines = hidden = 0
    for lines, line in enumerate(_lines(stream, name), 1):
        parts = line.split()
        if line.startswith(_ELSEWHERE):
            what = line[len(_ELSEWHERE) - 3 :].decode("utf-8", "backslashreplace").strip()
            raise SymbolError(f"{name} has no symbols, but says: {what}")
        if not parts or _NO_ADDRESS.fullmatch(line):
            hidden += line.lstrip().startswith(b"(null)")
            continue
        if len(parts) not in (3, 4) or not _MAP_LINE.match(line):
            raise SymbolError(
                f"{name}: neither an ELF image nor a list of a kernel's symbols: line {lines}"
            )
        address, kind = int(parts[0], 16), parts[1]
        hidden += not address
        if kind in b"UuAa":
            continue
        rank = _GLOBAL * kind.isupper() + 1
        text = parts[2].decode("utf-8", "backslashreplace")
        module = parts[3].strip(b"[]").decode("utf-8", "backslashreplace") if parts[3:] else ""
        symbol = Symbol(text, address, 0, kind in b"bBdDrR")
        found.append((address, rank, symbol, module))
    if not any(one[0] for one in found):
        if not hidden:
            raise SymbolError(f"{name}: neither an ELF image nor a list of a kernel's symbols")
        raise SymbolError(
            f"{name}: every address is 0, for the kernel hides them (kptr_restrict)",
            hint=("read /proc/kallsyms as root of the guest, with kernel.kptr_restrict=0 or 1",),
        )
    return found, name, lines - len(found)


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    for _ in range(MAX_SYMBOLS):
        line = stream.readline(_LONGEST_LINE)
        if not line:
            return
        yield line
    raise SymbolError(f"{name}: more than {MAX_SYMBOLS} lines")
