# SPDX-License-Identifier: LGPL-2.1-or-later
"""Map names to addresses and back, by a guest's ELF image or by a kernel's own list.

The file may come from anywhere. Its size, its tables and every offset in it are bounded and
checked before use; every fault of it raises a :class:`~xenaltp2m.errors.SymbolError`.
"""

from __future__ import annotations

import copy
import difflib
import io
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from xenaltp2m.abi.x86 import CR0_PG
from xenaltp2m.errors import SymbolError
from xenaltp2m.tools.symbols.elf import (
    ET_CORE,
    ET_REL,
    MAGIC,
    SHF_ALLOC,
    BuildId,
    ElfFile,
    opened,
)
from xenaltp2m.tools.symbols.elf_symbols import segments_of, symbols_of
from xenaltp2m.tools.symbols.kallsyms import map_symbols
from xenaltp2m.tools.symbols.symbol import GLOBAL, Found, Location, Segment, Symbol, text_of
from xenaltp2m.types import PAGE_SHIFT

if TYPE_CHECKING:
    from xenaltp2m.values.events import Registers


_FEW_NAMES = 20_000
"""The most names among which similar ones are searched quickly enough."""
_FEW_PLACES = 8
"""The most symbols of one name that are listed."""
_WITH_OFFSET = re.compile(r"(.+)\+(0x[0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,18})")
_SELECTED = re.compile(r"(.+)(?:#([1-9][0-9]{0,6})|@(0x[0-9a-fA-F]{1,16}))|(.+)@(.+)")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{1,16}")
_ENTRIES = {
    "msr_lstar": ("entry_SYSCALL_64",),
    "msr_cstar": ("entry_SYSCALL_compat", "ignore_sysret", "entry_SYSCALL32_ignore"),
    "sysenter_eip": ("entry_SYSENTER_compat", "entry_SYSENTER_32"),
}
"""A Linux kernel's entry points, by the register that contains the address (syscall_init)."""
_ENTRY_AREA = range(0xFFFFFE0000000000, 0xFFFFFE8000000000)
"""Each CPU's entry area, at the same address in every kernel. Linux 4.15 to 4.19 with page-table
isolation have MSR_LSTAR in a trampoline there (SYSCALL64_entry_trampoline)."""
_SLIDE_STEP, _SLIDE_LIMIT = 2 << 20, 1 << 30
"""CONFIG_PHYSICAL_ALIGN at least, and KERNEL_IMAGE_SIZE (Linux, arch/x86)."""
_FARTHEST = 1 << 20
"""The farthest that an address may lie beyond a symbol without a size to belong to it."""
_MOST_NESTED = 64


class Symbols:
    """Names of addresses, from an ELF image (:class:`Image`) or a kernel's own list.

    Attributes:
        name: The file's name when it was opened.
        symbols: Every symbol with an address, ordered by address, as in the file.
        skipped: The number of lines of a list that were skipped because they have no address.
        slide: The offset that KASLR has added to the file's addresses.
    """

    _has_modules = True
    """Whether a symbol's origin is a module, which does not move with the kernel."""

    def __init__(self, found: Sequence[Found], name: str, skipped: int = 0) -> None:
        """Store symbols: (address, rank, symbol), and maybe the origin."""
        self.name, self.skipped = name, skipped
        self.slide = 0
        found = sorted(found, key=itemgetter(0, 1))
        self.symbols: tuple[Symbol, ...] = tuple(one[2] for one in found)
        self._addresses = [symbol.address for symbol in self.symbols]
        self._ranks = bytes(one[1] for one in found)
        self._origins = [one[3] if len(one) > 3 else "" for one in found]
        """The kernel module in a kernel's list; of a local ELF symbol, its source file."""
        # Indexes into symbols: there are many, and few share a name.
        self._first: dict[str, int] = {}
        self._namesakes: dict[str, list[int]] = {}
        for at, symbol in enumerate(self.symbols):
            if self._first.setdefault(symbol.name, at) != at:
                self._namesakes.setdefault(symbol.name, []).append(at)
        self._around = _enclosing(self.symbols)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Symbols:
        """Read an ELF image, System.map or a copy of /proc/kallsyms, detected by content.

        Raises:
            SymbolError: It cannot be read, or is none of these.
        """
        name = os.fspath(path)
        with opened(path) as stream:
            magic = stream.read(len(MAGIC))
            stream.seek(0)
            if magic == MAGIC:
                return Image(stream, name, Path(name).parent)
            return cls(*map_symbols(stream, name))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} of {len(self.symbols)} symbols>"

    def slid(self, slide: int) -> Self:
        """Return the same symbols with another slide."""
        other = copy.copy(self)
        other.slide = slide
        return other

    def find_slide(self, registers: Registers) -> int:
        """Find the slide of a Linux kernel (KASLR) from a vCPU's registers.

        A register contains the address of a kernel entry point whose symbol has a known name.

        Raises:
            SymbolError: They do not match, or the registers or the symbols have no entry point.
        """
        slides, told = self._slides(registers)
        if slides is None:
            raise SymbolError(
                f"{self.name}: cannot find the address of the guest's kernel",
                hint=(
                    "if the file lacks entry_SYSCALL_64: use a complete list, or --slide",
                    "if the vCPU's MSR_LSTAR is 0: wait until the guest's kernel runs",
                ),
            )
        fitting = [one for one in slides if not one % _SLIDE_STEP and 0 <= one < _SLIDE_LIMIT]
        if len(fitting) != 1:
            raise SymbolError(f"{self.name} does not match the running kernel: {', '.join(told)}")
        return fitting[0]

    def _slides(self, registers: Registers) -> tuple[set[int] | None, list[str]]:
        """Return the slides that fit all registers, None if unknown; and the facts in words."""
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
        """Return the same symbols with the guest's slide, found from registers.

        Those of an image stay where they are if no slide is found: it need not be a Linux kernel.

        Raises:
            SymbolError: As :meth:`find_slide`.
        """
        return self.slid(self.find_slide(registers))

    def symbol(self, name: str) -> Symbol:
        """Find a symbol by its name; a global one is preferred to local ones.

        If several share the name, ``name@module`` (or source file), ``name@0xffff...`` (the
        address, as in the file) and ``name#2`` (the second, by address) select one.

        Raises:
            SymbolError: There is none, or several local ones at different addresses.
        """
        return self.symbols[self._find(name)]

    def _find(self, name: str) -> int:
        if name in self._first:
            same = self._named(name)
            return self._only(name, [at for at in same if self._ranks[at] >= GLOBAL] or same)
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
        """Describe symbols of one name in the forms that select them."""
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
        """Return the address of ``name`` or ``name+0x10``, slide included.

        See :attr:`Symbol.address`.

        Raises:
            SymbolError: As :meth:`symbol`; or it is in a module, which does not move with the
                kernel.
        """
        at, offset = self._place(place)
        if self.is_in_module(place) and self.slide:
            raise SymbolError(
                f"{self.name}: {self.symbols[at].name} is in the module {self._origins[at]}, "
                "whose address is unknown since the kernel was loaded elsewhere",
                hint=("copy /proc/kallsyms from the guest as it runs now",),
            )
        return self._addresses[at] + offset + self.slide

    def is_in_module(self, place: str) -> bool:
        """Return whether a place is in a kernel module, whose address may be any.

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
        """Return the symbol that an address lies in, slide included; None if there is none.

        It is the innermost symbol whose size covers the address; else the label before it.
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
        """Return the start of the function around an address, slide included, and its length.

        Args:
            address: An address in it, slide included.
            few: The length to return if the function's end is unknown.
            most: The most to return; of a longer function, the bytes from the address on.
        """
        found = self.locate(address)
        if found is None or found.symbol.size == 0 or found.offset >= most:
            at = bisect_right(self._addresses, address - self.slide)
            room = self._addresses[at] + self.slide - address if at < len(self.symbols) else few
            return address, min(room, few)
        return address - found.offset, min(found.symbol.size, most)

    def _covering(self, at: int, address: int) -> int:
        """Return the innermost symbol whose size covers an address; -1 if there is none."""
        for _ in range(_MOST_NESTED):
            if at < 0 or address < self._addresses[at] + self.symbols[at].size:
                return at
            at = self._around[at]
        return -1


class Image(Symbols):
    """An ELF image of a guest, read completely on opening; the file is closed again.

    Attributes:
        segments: The loaded segments, in the file's order.
        sections: The loaded sections, in the file's order; the file need not list any.
        has_code: Whether the file contains the loaded bytes; one with debugging information alone
            does not.
        build_id: The note by which the linker has identified it, or None.
    """

    _has_modules = False

    def __init__(
        self, content: bytes | BinaryIO, name: str = "image", directory: Path | None = None
    ) -> None:
        """Read an image.

        Args:
            content: The file, or its bytes; must be seekable.
            name: The file's name in messages.
            directory: Where to search for files that it names; None does not search.

        Raises:
            SymbolError: It is not an ELF image for x86, is damaged, or exceeds a limit.
        """
        elf = ElfFile(io.BytesIO(content) if isinstance(content, bytes) else content, name)
        if elf.type == ET_REL:
            elf.refuse("a relocatable object (.o, .ko): its symbols have no addresses yet")
        if elf.type == ET_CORE:
            elf.refuse("a core dump, not an image")
        self.has_code = elf.has_code
        self.segments = tuple(segments_of(elf))
        self.sections = tuple(one for one in elf.sections if one.flags & SHF_ALLOC)
        self.build_id: BuildId | None = elf.build_id()
        self._by_address = sorted(
            (one for one in self.segments if one.size), key=attrgetter("virtual")
        )
        self._starts = [one.virtual for one in self._by_address]
        link = elf.section(".gnu_debuglink")
        self._link = "" if link is None else text_of(elf.content(link))
        super().__init__(symbols_of(elf, content, directory), name)

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
        """Find the slide as :meth:`Symbols.in_guest` does."""
        if not registers.cr0 & CR0_PG or self._slides(registers)[0] is None:
            return self
        return super().in_guest(registers)

    def locate(self, address: int) -> Location | None:
        """Return the symbol that an address lies in; None if the image has nothing there."""
        found = super().locate(address)
        if found is None:
            return None
        segment = self._segment_with(address - self.slide)
        if segment is None or found.symbol.address < segment.virtual:
            return None
        return found

    def extent(self, address: int, few: int, most: int) -> tuple[int, int]:
        """Return a function's extent as :meth:`Symbols.extent` does, up to the segment's end."""
        start, size = super().extent(address, few, most)
        segment = self._segment_with(start - self.slide)
        if segment is not None:
            size = min(size, segment.virtual + segment.size - (start - self.slide))
        return start, size

    def is_code(self, address: int) -> bool:
        """Return whether a virtual address, slide not included, is in an executable segment."""
        segment = self._segment_with(address)
        return segment is not None and segment.executable

    def content(self, address: int, size: int) -> bytes | None:
        """Return what the file loads at a virtual address, slide not included.

        None if it loads nothing there, or does not contain it: see ``has_code``.
        """
        segment = self._segment_with(address, size)
        if segment is None or not self.has_code:
            return None
        start = address - segment.virtual
        return segment.data[start : start + size].ljust(size, b"\0")

    def segment(self, symbol: Symbol) -> Segment:
        """Return the segment that contains all of a symbol.

        Raises:
            SymbolError: None does: it is a number rather than a place, or too long.
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
        """Return the guest-physical load address of a symbol.

        Raises:
            SymbolError: As :meth:`segment`.
        """
        return self.segment(symbol).physical(symbol.address)

    def physical_of(self, address: int) -> int:
        """Return the guest-physical load address of a virtual address, slide included.

        Raises:
            SymbolError: The image loads nothing there.
        """
        segment = self._segment_with(address - self.slide)
        if segment is None:
            raise SymbolError(f"{self.name} loads nothing at {address:#x}")
        return segment.physical(address - self.slide)

    def gfns(self, name: str) -> range:
        """Return the gfns that a symbol lies in: one, unless it crosses a page boundary.

        Raises:
            SymbolError: There is no such symbol, or it is not in memory.
        """
        symbol = self.symbol(name)
        first = self.physical(symbol)
        last = first + max(symbol.size, 1) - 1
        return range(first >> PAGE_SHIFT, (last >> PAGE_SHIFT) + 1)


def _enclosing(symbols: tuple[Symbol, ...]) -> array[int]:
    """Return, for each symbol, the index of the last sized one that encloses its start; or -1."""
    found = array("i")
    around: list[int] = []
    for at, symbol in enumerate(symbols):
        while around and symbols[around[-1]].address + symbols[around[-1]].size <= symbol.address:
            around.pop()
        found.append(around[-1] if around else -1)
        if symbol.size:
            around.append(at)
    return found
