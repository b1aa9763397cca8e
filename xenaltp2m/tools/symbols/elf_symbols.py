# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read the symbols and the loaded segments of an ELF image."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xenaltp2m.tools.symbols.elf import (
    PF_W,
    PF_X,
    PT_LOAD,
    SHT_DYNSYM,
    SHT_STRTAB,
    SHT_SYMTAB,
    ElfFile,
    Section,
)
from xenaltp2m.tools.symbols.symbol import GLOBAL, MAX_SYMBOLS, Found, Segment, Symbol
from xenaltp2m.types import GFN_LIMIT, PAGE_SHIFT

MAX_NAMES = 1 << 28
"""Bytes of all names together: names may share their ends, so the file's size is no bound."""
_NO_PLACES = frozenset((0, 0xFFF1, 0xFFF2))
"""SHN_UNDEF, SHN_ABS and SHN_COMMON: the value of such a symbol is no address (gABI, chapter 4)."""
_PLACES = frozenset((0, 1, 2, 10))
"""STT_NOTYPE, OBJECT, FUNC and GNU_IFUNC: the types whose value is an address."""
_OBJECT = 1
"""STT_OBJECT."""
_SOURCE_FILE = 4
"""STT_FILE: the local symbols that follow are from it."""
_LOCAL = 0
_SYMBOL = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}


def segments_of(elf: ElfFile) -> Iterator[Segment]:
    """Yield the segments that a loader puts into memory."""
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


def symbols_of(elf: ElfFile, content: bytes | BinaryIO, directory: Path | None) -> list[Found]:
    """Return (address, rank, symbol) from .symtab, else .dynsym, else the functions in DWARF."""
    for kind in (SHT_SYMTAB, SHT_DYNSYM):
        table = next((one for one in elf.sections if one.type == kind), None)
        if table is not None:
            found = list(_table_symbols(elf, table))
            if found or kind == SHT_SYMTAB:
                return found
    if not any(elf.section(name) for name in (".debug_info", ".zdebug_info")):
        return []
    # Imported late: it loads pyelftools.
    from xenaltp2m.tools.symbols.prototypes import Prototypes

    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    described = Prototypes(stream, elf.name, directory).functions()
    return [(one.address, GLOBAL + 1, Symbol(*one)) for one in described]


def _table_symbols(elf: ElfFile, section: Section) -> Iterator[Found]:
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
            rank = GLOBAL * is_global + (kind != 0)
            symbol = Symbol(name, address, size, kind == _OBJECT)
            yield address, rank, symbol, "" if is_global else source
