# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read ELF files for x86: headers, sections, the build id (System V gABI, chapters 4 and 5).

The file may come from anywhere. Sizes and offsets are checked before memory is allocated for them.
Every fault of the file raises a :class:`~xenaltp2m.errors.SymbolError`, which says whether the file
is damaged or only not supported.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, NoReturn

from xenaltp2m.errors import SymbolError

MAX_FILE = 1 << 30
"""Bytes in an image; a Linux kernel with debugging information has about half of this."""

MAX_HEADERS = 1 << 18
"""Sections, or program headers: a count above 65 279 is stored in section 0."""

MAX_UNPACKED = 1 << 30
"""Bytes of all sections of a file, after decompression."""

MAGIC = b"\x7fELF"
ET_REL, ET_CORE = 1, 4
PT_LOAD, PT_NOTE = 1, 4
PF_X, PF_W = 1, 2
SHT_SYMTAB, SHT_STRTAB, SHT_NOTE, SHT_NOBITS, SHT_DYNSYM = 2, 3, 7, 8, 11
SHF_ALLOC, SHF_EXECINSTR, SHF_COMPRESSED = 2, 4, 1 << 11
_PN_XNUM, _SHN_XINDEX = 0xFFFF, 0xFFFF
_MACHINES = frozenset((3, 62))
"""EM_386 and EM_X86_64."""
_EHDR = {32: struct.Struct("<HHIIIIIHHHHHH"), 64: struct.Struct("<HHIQQQIHHHHHH")}
_PHDR = {32: struct.Struct("<8I"), 64: struct.Struct("<IIQQQQQQ")}
_SHDR = {32: struct.Struct("<10I"), 64: struct.Struct("<IIQQQQIIQQ")}
_CHDR = {32: struct.Struct("<III"), 64: struct.Struct("<I4xQQ")}
_NOTE = struct.Struct("<III")
_NT_GNU_BUILD_ID = 3
_ZLIB, _ZSTD = 1, 2
_OLD_HEADER = struct.Struct(">4sQ")
"""The header of ``.zdebug_*``, before the gABI had SHF_COMPRESSED: "ZLIB" and the size."""
_LONGEST_NAME = 256
_MOST_UNPACKED = 64
"""The most that a file's sections may decompress to, as a multiple of its size."""
_MAX_NOTES = 1 << 20


class Program(NamedTuple):
    """A program header."""

    type: int
    flags: int
    offset: int
    virtual: int
    physical: int
    file_size: int
    size: int
    align: int


class Section(NamedTuple):
    """A section header."""

    name: str
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    align: int
    entry_size: int


class BuildId(NamedTuple):
    """The note by which a linker identifies its output."""

    address: int
    """The virtual address of its bytes."""
    value: bytes


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a regular file for a ``with`` block, without waiting for a FIFO.

    Raises:
        SymbolError: It cannot be opened, or is not a regular file.
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


def _open_at_once(name: str, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO must not block before fstat shows what it is.
    return os.open(name, flags | os.O_NONBLOCK)


class ElfFile:
    """The headers of an ELF file, and the data they refer to.

    Attributes:
        name: The file's name in messages.
        length: Bytes in the file.
        bits: 32 or 64: its class.
        type: ET_EXEC, ET_DYN, ...
        programs: Its program headers.
        sections: Its sections. A file need not have any.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        """Read the headers.

        Args:
            stream: The file, seekable; the caller closes it.
            name: The file's name in messages.

        Raises:
            SymbolError: It is not an ELF file for x86, is damaged, or exceeds a limit.
        """
        self.name, self._stream = name, stream
        self.length = stream.seek(0, io.SEEK_END)
        self._left = min(MAX_UNPACKED, _MOST_UNPACKED * self.length)
        if self.length > MAX_FILE:
            self.refuse(f"{self.length} bytes; the limit is {MAX_FILE}")
        ident = self.read(0, min(self.length, 16), "its first bytes")
        if ident[:4] != MAGIC or len(ident) < 16 or ident[4] not in (1, 2):
            self.refuse("not an ELF file, or its header is damaged")
        self.bits = 32 * ident[4]
        if ident[5] != 1:
            self.refuse("an ELF file, but not for x86 (not little-endian)")
        layout = _EHDR[self.bits]
        found = layout.unpack(self.read(16, layout.size, "the ELF header"))
        self.type, machine, _, _, phoff, shoff, _, _, phsize, phnum, shsize, shnum, names = found
        if machine not in _MACHINES:
            self.refuse(f"an ELF file, but not for x86 (machine {machine})")
        headers = self._headers(_SHDR[self.bits], shoff, shnum, shsize)
        # Numbers that do not fit into 16 bits of the ELF header are in section 0.
        if phnum == _PN_XNUM:
            phnum = headers[0][7] if headers else 0
            if phnum < _PN_XNUM:
                self.refuse("section 0 does not contain the number of program headers")
        if names == _SHN_XINDEX and headers:
            names = headers[0][6]
        programs = self._headers(_PHDR[self.bits], phoff, phnum, phsize) if phnum else []
        if self.bits == 32:
            order = 0, 6, 1, 2, 3, 4, 5, 7
            programs = [tuple(one[at] for at in order) for one in programs]
        self.programs = tuple(map(Program._make, programs))
        self.sections = tuple(self._named(headers, names))

    def _headers(
        self, layout: struct.Struct, offset: int, count: int, size: int
    ) -> list[tuple[int, ...]]:
        if not offset:
            return []
        if layout is _SHDR[self.bits] and not count:
            count = layout.unpack(self.read(offset, layout.size, "section 0"))[5]
        if count > MAX_HEADERS:
            self.refuse(f"{count} entries in a header table; the limit is {MAX_HEADERS}")
        if count and size != layout.size:
            self.refuse("a header table's entries have no valid size")
        table = self.read(offset, count * layout.size, "a header table")
        return list(layout.iter_unpack(table))

    def _named(self, headers: list[tuple[int, ...]], at: int) -> Iterator[Section]:
        names = b""
        if 0 < at < len(headers) and headers[at][1] == SHT_STRTAB:
            names = self.read(headers[at][4], headers[at][5], "the sections' names")
        for name, kind, flags, address, offset, size, link, _, align, entry in headers:
            told = names[name : name + _LONGEST_NAME].partition(b"\0")[0]
            text = told.decode("utf-8", "backslashreplace")
            yield Section(text, kind, flags, address, offset, size, link, align, entry)

    @property
    def has_code(self) -> bool:
        """Whether the file contains the code; one with debugging information alone does not.

        ``objcopy --only-keep-debug`` and ``eu-strip -f`` keep the program headers, and turn loaded
        sections into SHT_NOBITS.
        """
        code = [
            section.type != SHT_NOBITS
            for section in self.sections
            if section.flags & SHF_ALLOC and section.flags & SHF_EXECINSTR and section.size
        ]
        return any(code) or not code

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Read a part of the file.

        Raises:
            SymbolError: The file is too short, or cannot be read.
        """
        if offset + length > self.length:
            self.refuse(f"{what} ends {offset + length - self.length} bytes beyond the file's end")
        try:
            self._stream.seek(offset)
            found = self._stream.read(length)
        except OSError as error:
            self.refuse(f"{what} cannot be read: {error.strerror}", error)
        if len(found) != length:
            self.refuse(f"{what} was cut off while it was read")
        return found

    def section(self, name: str) -> Section | None:
        """Return the first section with a name, or None."""
        return next((one for one in self.sections if one.name == name), None)

    def content(self, section: Section) -> bytes:
        """Return the bytes of a section, decompressed.

        Raises:
            SymbolError: It is damaged, exceeds the limit for all sections, or is compressed by an
                unknown method.
        """
        if section.type == SHT_NOBITS:
            return b""
        what = section.name or "a section"
        data = self.read(section.offset, section.size, what)
        kind, size, start = self._compression(section, data, what)
        self._left -= size
        if self._left < 0:
            self.refuse(f"{what} has {size} bytes: too many")
        if not start:
            return data
        if kind not in (_ZLIB, _ZSTD):
            self._unsupported(f"{what} is compressed by an unknown method, {kind}")
        unpack = _inflate if kind == _ZLIB else self._zstd(what)
        try:
            found = unpack(data[start:], size)
        except Exception as error:  # noqa: BLE001 - each decompressor has errors of its own
            self.refuse(f"{what} is damaged: it cannot be decompressed", error)
        if len(found) != size:
            self.refuse(f"{what} is damaged: {len(found)} of {size} bytes after decompression")
        return found

    def _compression(self, section: Section, data: bytes, what: str) -> tuple[int, int, int]:
        """Return how a section is compressed, its size unpacked, and its header's size or 0."""
        if section.flags & SHF_COMPRESSED:
            layout = _CHDR[self.bits]
            if len(data) < layout.size:
                self.refuse(f"{what} is too small for its compression header")
            kind, size, _ = layout.unpack_from(data)
            return kind, size, layout.size
        if section.name.startswith(".zdebug"):
            if len(data) < _OLD_HEADER.size or not data.startswith(b"ZLIB"):
                self.refuse(f"{what} does not begin with a compression header")
            return _ZLIB, _OLD_HEADER.unpack_from(data)[1], _OLD_HEADER.size
        return 0, len(data), 0

    def _zstd(self, what: str) -> Callable[[bytes, int], bytes]:
        try:
            from compression import zstd  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            try:
                from backports import zstd
            except ImportError:
                self._unsupported(
                    f"{what} is compressed by zstd, which Python before 3.14 cannot read",
                    "install the package backports.zstd",
                )

        def unpack(data: bytes, size: int) -> bytes:
            found: bytes = zstd.ZstdDecompressor().decompress(data, max_length=size + 1)
            return found

        return unpack

    def build_id(self, *, loaded: bool = True) -> BuildId | None:
        """Return the build id, or None.

        Args:
            loaded: Whether only a note in loaded memory counts.

        Raises:
            SymbolError: A note is damaged.
        """
        for section in self.sections:
            if section.type == SHT_NOTE and (section.flags & SHF_ALLOC or not loaded):
                found = self._build_id(section.offset, section.size, section.address, section.align)
                if found is not None:
                    return found
        if not self.sections:
            for one in self.programs:
                if one.type == PT_NOTE:
                    found = self._build_id(one.offset, one.file_size, one.virtual, one.align)
                    if found is not None:
                        return found
        return None

    def _build_id(self, offset: int, size: int, address: int, align: int) -> BuildId | None:
        if size > _MAX_NOTES:
            self.refuse(f"{size} bytes of notes: too many")
        data, at = self.read(offset, size, "a note"), 0
        align = 8 if align == 8 else 4
        while at + _NOTE.size <= size:
            name_size, length, kind = _NOTE.unpack_from(data, at)
            start = at + _NOTE.size + -(-name_size // 4) * 4
            start += -start % align
            if data[at + _NOTE.size :][:name_size] == b"GNU\0" and kind == _NT_GNU_BUILD_ID:
                value = data[start : start + length]
                return BuildId(address + start, value) if 0 < len(value) == length else None
            at = start + length
            at += -at % align
        return None

    def _unsupported(self, why: str, *cures: str) -> NoReturn:
        raise SymbolError(
            f"{self.name}: {why}",
            hint=(*cures, "decompress it: objcopy --decompress-debug-sections FILE"),
        )

    def refuse(self, why: str, cause: BaseException | None = None) -> NoReturn:
        """Raise an error about the file.

        Raises:
            SymbolError: Always.
        """
        raise SymbolError(f"{self.name}: {why}") from cause


def _inflate(data: bytes, size: int) -> bytes:
    return zlib.decompressobj().decompress(data, size + 1)
