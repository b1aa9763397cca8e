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
import stat
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, Self

from elftools.common.utils import struct_parse
from elftools.elf.elffile import ELFFile

from xenaltp2m.errors import SymbolError
from xenaltp2m.types import GFN_LIMIT, PAGE_SHIFT

if TYPE_CHECKING:
    from xenaltp2m.events import Registers

MAX_FILE = 1 << 30
"""Bytes in an image; a Linux kernel with debugging information has about half."""

MAX_SYMBOLS = 1 << 20
"""A Linux kernel with all its local symbols has about a quarter."""

MAX_NAMES = 1 << 28
"""Bytes in all names together: symbols may share their ends, so the file's size bounds nothing."""

MAX_STEPS = 1 << 26
"""Reads of a few bytes in a search, by pyelftools: a minute or two."""

_MAX_SEGMENTS = 256
_MAX_SECTIONS = 1 << 14
_MACHINES = ("EM_386", "EM_X86_64")
_WRITABLE, _EXECUTABLE = 2, 1
_UNDEFINED_SECTION = 0
_PLACES = frozenset((0, 1, 2, 10))
"""STT_NOTYPE, OBJECT, FUNC and GNU_IFUNC: the types whose value is an address."""
_LOCAL = 0
_GLOBAL = 2
"""Ranks: 0 a local label, 1 a local function or object, 2 and 3 the same but global or weak."""
_FEW_NAMES = 20_000
"""So many are searched for similar ones quickly enough."""
_ELF_MAGIC = b"\x7fELF"
_MAP_LINE = re.compile(rb"[0-9A-Fa-f]{1,16} [A-Za-z?] ")
_ELSEWHERE = b"ffffffffffffffff B The"
"""Debian's System.map is a sentence that says which package has it."""
_LONGEST_LINE = 1024
_WITH_OFFSET = re.compile(r"(.+)\+(0x[0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,18})")
SYSTEM_CALL = "entry_SYSCALL_64"
"""Where a Linux kernel's system calls enter: MSR_LSTAR has its address."""
_SLIDE_STEP, _SLIDE_LIMIT = 2 << 20, 1 << 30
"""CONFIG_PHYSICAL_ALIGN at least, and KERNEL_IMAGE_SIZE (Linux, arch/x86)."""
_FARTHEST = 1 << 20
"""What is farther behind a symbol without a size is not of it."""
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
        slide: How far from where the file says everything is: what KASLR has added.
    """

    def __init__(self, found: list[tuple[int, int, Symbol]], name: str) -> None:
        """Take over symbols: (address, rank, symbol)."""
        self.name = name
        self.slide = 0
        found.sort(key=itemgetter(0, 1))
        self.symbols: tuple[Symbol, ...] = tuple(symbol for _, _, symbol in found)
        self._addresses = [symbol.address for symbol in self.symbols]
        self._ranks = bytes(rank for _, rank, _ in found)
        # Numbers of symbols: there are many, few of them have a namesake.
        self._first: dict[str, int] = {}
        self._namesakes: dict[str, list[int]] = {}
        for at, symbol in enumerate(self.symbols):
            if self._first.setdefault(symbol.name, at) != at:
                self._namesakes.setdefault(symbol.name, []).append(at)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Symbols:
        """Read an ELF image, System.map or a copy of /proc/kallsyms; tell them by their content.

        Raises:
            SymbolError: It cannot be read, or is none of these.
        """
        with opened(path) as stream:
            magic = stream.read(len(_ELF_MAGIC))
            stream.seek(0)
            if magic == _ELF_MAGIC:
                return Image(stream, os.fspath(path))
            return cls(list(_map_symbols(stream, os.fspath(path))), os.fspath(path))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} of {len(self.symbols)} symbols>"

    def slid(self, slide: int) -> Self:
        """Return the same symbols, so many bytes further up."""
        other = copy.copy(self)
        other.slide = slide
        return other

    def find_slide(self, registers: Registers) -> int:
        """Find how far up KASLR has put a Linux kernel, by a vCPU's registers.

        The system call entry is known to both: MSR_LSTAR has its address, and it has a name.

        Raises:
            SymbolError: They do not fit.
        """
        there, here = registers.msr_lstar, self.symbol(SYSTEM_CALL).address
        slide = there - here
        if slide % _SLIDE_STEP or not 0 <= slide < _SLIDE_LIMIT:
            raise SymbolError(
                f"{self.name} is not of the kernel that runs: {SYSTEM_CALL} is at {here:#x} in "
                f"it, and the vCPU's MSR_LSTAR is {there:#x}"
            )
        return slide

    def symbol(self, name: str) -> Symbol:
        """Find a symbol by its name; a global one is preferred to local ones.

        Raises:
            SymbolError: There is none, or several local ones at different addresses.
        """
        if name not in self._first:
            few = len(self._first) <= _FEW_NAMES
            close = difflib.get_close_matches(name, self._first, 3) if few else []
            known = f"; did you mean {' or '.join(close)}?" if close else ""
            raise SymbolError(f"{self.name} has no symbol {name!r}{known}")
        found: list[int] = [self._first[name], *self._namesakes.get(name, ())]
        globals_ = [at for at in found if self._ranks[at] >= _GLOBAL]
        chosen = [self.symbols[at] for at in globals_ or found]
        if len({symbol.address for symbol in chosen}) > 1:
            places = ", ".join(f"{symbol.address:#x}" for symbol in chosen[:4])
            more = ", ..." if len(chosen) > 4 else ""
            raise SymbolError(f"{self.name} has several symbols {name!r}: at {places}{more}")
        return chosen[-1]

    def address(self, place: str) -> int:
        """Return where something is: ``name`` or ``name+0x10``, slide included.

        See :attr:`Symbol.address`.

        Raises:
            SymbolError: As :meth:`symbol`.
        """
        parts = _WITH_OFFSET.fullmatch(place) if place not in self._first else None
        if parts is None:
            return self.symbol(place).address + self.slide
        return self.symbol(parts[1]).address + int(parts[2], 0) + self.slide

    def locate(self, address: int) -> Location | None:
        """Say which symbol an address lies in, slide included; None where nothing is known."""
        at = bisect_right(self._addresses, address - self.slide) - 1
        if at < 0:
            return None
        symbol = self.symbols[at]
        offset = address - self.slide - symbol.address
        if offset >= (symbol.size or _FARTHEST):
            return None
        return Location(symbol, offset)


class Image(Symbols):
    """An ELF image of a guest, read once and whole; the file is closed again.

    Attributes:
        segments: What is loaded, in the file's order.
    """

    def __init__(self, content: bytes | BinaryIO, name: str = "image") -> None:
        """Read an image.

        Args:
            content: The file, or its bytes; must be seekable.
            name: What messages call it.

        Raises:
            SymbolError: It is not an ELF image for x86, or is damaged, or past a limit.
        """
        reader = _Reader(io.BytesIO(content) if isinstance(content, bytes) else content, name)
        self.segments = tuple(reader.segments())
        super().__init__(list(reader.symbols()), name)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Image:
        """Read an image from a file.

        Raises:
            SymbolError: It cannot be read, or is not a usable image.
        """
        with opened(path) as stream:
            return cls(stream, os.fspath(path))

    def locate(self, address: int) -> Location | None:
        """Say which symbol an address lies in, or None where the image has nothing there."""
        found = super().locate(address)
        if found is None:
            return None
        segment = self._segment_with(address - self.slide)
        if segment is None or found.symbol.address < segment.virtual:
            return None
        return found

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
        return next((one for one in self.segments if one.holds(address, size)), None)

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


def is_described(elf: ELFFile) -> bool:
    """Whether an image has debugging information; tables for unwinding are none."""
    # pyelftools 0.29 counts them, and cannot be told not to.
    return any(elf.get_section_by_name(name) for name in (".debug_info", ".zdebug_info"))


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open an ordinary file within the block; nothing else is waited for.

    Raises:
        SymbolError: It cannot be opened, or is no ordinary file.
    """
    name = os.fspath(path)
    try:
        stream = open(name, "rb", opener=_open_at_once)  # noqa: SIM115 - closed below
    except OSError as error:
        raise SymbolError(f"{name}: {error.strerror}", errno=error.errno) from error
    except ValueError as error:
        raise SymbolError(f"{name!r} is not a file name: {error}") from error
    with stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise SymbolError(f"{name}: not a regular file")
        yield stream


def _map_symbols(stream: BinaryIO, name: str) -> Iterator[tuple[int, int, Symbol]]:
    """Yield (address, rank, symbol) of a kernel's list: address, letter, name, maybe a module."""
    seen = False
    for number, line in enumerate(_lines(stream, name), 1):
        parts = line.split()
        if line.startswith(_ELSEWHERE):
            what = line[len(_ELSEWHERE) - 3 :].decode("utf-8", "backslashreplace").strip()
            raise SymbolError(f"{name} has no symbols, but says: {what}")
        if len(parts) not in (3, 4) or not _MAP_LINE.match(line):
            raise SymbolError(
                f"{name}: neither an ELF image nor a list of a kernel's symbols: line {number}"
            )
        address, kind = int(parts[0], 16), parts[1]
        seen |= bool(address)
        if kind in b"UuAa":
            continue
        rank = _GLOBAL * kind.isupper() + 1
        yield address, rank, Symbol(parts[2].decode("utf-8", "backslashreplace"), address, 0)
    if not seen:
        raise SymbolError(
            f"{name}: every address is 0, for the kernel hides them (kptr_restrict)",
            hint=("read /proc/kallsyms as root of the guest, with kernel.kptr_restrict=0 or 1",),
        )


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    for _ in range(MAX_SYMBOLS):
        line = stream.readline(_LONGEST_LINE)
        if not line:
            return
        yield line
    raise SymbolError(f"{name}: more than {MAX_SYMBOLS} lines")


def _open_at_once(name: str, flags: int) -> int:
    # A FIFO must not hold us up before fstat can tell what it is.
    return os.open(name, flags | os.O_NONBLOCK)


class _Reader:
    """Reads the tables of an ELF file, trusting none of its numbers."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._length = stream.seek(0, io.SEEK_END)
        if self._length > MAX_FILE:
            self._refuse(f"{self._length} bytes; the limit is {MAX_FILE}")
        try:
            self._elf = ELFFile(Meter().on(stream))
            machine = self._elf["e_machine"]
        except Exception as error:  # noqa: BLE001 - damaged headers raise nearly anything there
            self._refuse("not an ELF file, or its header is damaged", error)
        if machine not in _MACHINES or not self._elf.little_endian:
            self._refuse(f"an ELF file, but not for x86 ({machine})")

    def segments(self) -> Iterator[Segment]:
        loaded = 0
        for header in self._table("Elf_Phdr", "e_phoff", "e_phnum", "e_phentsize", _MAX_SEGMENTS):
            if header["p_type"] != "PT_LOAD":
                continue
            address, size, length = header["p_paddr"], header["p_memsz"], header["p_filesz"]
            if length > size or address + size > GFN_LIMIT << PAGE_SHIFT:
                self._refuse(f"a segment of {size:#x} bytes at {address:#x} cannot be loaded")
            loaded += length
            if loaded > self._length:
                self._refuse("its segments overlap in the file")
            yield Segment(
                address,
                header["p_vaddr"],
                size,
                self._read(header["p_offset"], length, "a segment"),
                bool(header["p_flags"] & _WRITABLE),
                bool(header["p_flags"] & _EXECUTABLE),
            )

    def symbols(self) -> Iterator[tuple[int, int, Symbol]]:
        """Yield (address, rank, symbol) of .symtab, else of .dynsym, else of functions by DWARF."""
        sections = list(self._table("Elf_Shdr", "e_shoff", "e_shnum", "e_shentsize", _MAX_SECTIONS))
        for kind in ("SHT_SYMTAB", "SHT_DYNSYM"):
            for section in sections:
                if section["sh_type"] == kind:
                    yield from self._symbols(section, sections)
                    return
        if any(section["sh_type"] == "SHT_PROGBITS" for section in sections):
            yield from self._functions()

    def _functions(self) -> Iterator[tuple[int, int, Symbol]]:
        from xenaltp2m.prototypes import Prototypes

        try:
            described = is_described(self._elf)
        except Exception as error:  # noqa: BLE001 - as above
            self._refuse("its sections are damaged", error)
        if described:
            for found in Prototypes(self._stream, self._name).functions():
                yield found.address, _GLOBAL + 1, Symbol(*found)

    def _symbols(self, section: Any, sections: list[Any]) -> Iterator[tuple[int, int, Symbol]]:
        layout = _SYMBOL[self._elf.elfclass]
        size, link = section["sh_size"], section["sh_link"]
        if section["sh_entsize"] != layout.size or size % layout.size:
            self._refuse("the symbol table's entries have no valid size")
        if size // layout.size > MAX_SYMBOLS:
            self._refuse(f"{size // layout.size} symbols; the limit is {MAX_SYMBOLS}")
        if link >= len(sections) or sections[link]["sh_type"] != "SHT_STRTAB":
            self._refuse("the symbol table names no string table")
        table = self._read(section["sh_offset"], size, "the symbol table")
        names = self._read(
            sections[link]["sh_offset"], sections[link]["sh_size"], "the string table"
        )
        budget = MAX_NAMES
        for fields in layout.iter_unpack(table):
            if layout is _SYMBOL[32]:
                at, address, size, info, _, index = fields
            else:
                at, info, _, index, address, size = fields
            if index == _UNDEFINED_SECTION or info & 15 not in _PLACES:
                continue
            end = names.find(b"\0", at, at + budget)
            if end < 0:
                self._refuse("a symbol's name is not in the string table, or does not end")
            if end == at:
                continue
            budget -= end - at
            rank = _GLOBAL * (info >> 4 != _LOCAL) + (info & 15 != 0)
            name = names[at:end].decode("utf-8", "backslashreplace")
            yield address, rank, Symbol(name, address, size)

    def _table(self, entry: str, offset: str, count: str, size: str, limit: int) -> Iterator[Any]:
        """Yield the entries of one of the two header tables."""
        header, layout = self._elf.header, getattr(self._elf.structs, entry)
        if not header[offset] or not header[count]:
            return
        if header[count] > limit:
            self._refuse(f"{header[count]} entries in a header table; the limit is {limit}")
        if header[size] != layout.sizeof():
            self._refuse("a header table's entries have no valid size")
        whole = self._read(header[offset], header[count] * header[size], "a header table")
        stream = io.BytesIO(whole)
        for _ in range(header[count]):
            try:
                yield struct_parse(layout, stream)
            except Exception as error:  # noqa: BLE001 - as above
                self._refuse("a header table is damaged", error)

    def _read(self, offset: int, length: int, what: str) -> bytes:
        if offset + length > self._length:
            self._refuse(
                f"{what} ends {offset + length - self._length} bytes behind the file's end"
            )
        try:
            self._stream.seek(offset)
            found = self._stream.read(length)
        except OSError as error:
            self._refuse(f"{what} cannot be read: {error.strerror}", error)
        if len(found) != length:
            self._refuse(f"{what} was cut off while it was read")
        return found

    def _refuse(self, why: str, cause: BaseException | None = None) -> NoReturn:
        raise SymbolError(f"{self._name}: {why}") from cause
