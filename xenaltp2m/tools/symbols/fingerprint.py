# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check that symbols match a guest: compare them with its memory before it is changed.

A breakpoint at an address of another kernel is in the middle of something, and corrupts the guest.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from xenaltp2m.abi.x86 import CR0_PG
from xenaltp2m.errors import InvalidArgumentError, NotMappedError, SymbolError
from xenaltp2m.tools.symbols.tables import Image, Symbols

if TYPE_CHECKING:
    from xenaltp2m.handles.memory import Memory
    from xenaltp2m.values.events import Registers

Read: TypeAlias = Callable[[int, int], bytes]
"""Reads a number of bytes at a virtual address; raises NotMappedError."""

_MOST_BYTES = 4096
"""The most bytes of a function that are compared."""
_FEW_BYTES = 16
"""The bytes compared at a label without a known end."""
_MOST_SITES = 1 << 22
_LONGEST_SITE = 255
"""Bytes: a table stores the length in one byte."""
_SAMPLE = 64
"""The entries of a section that are checked to find the form of all."""
_BANNER, _BANNER_SAYS = "linux_banner", b"Linux version "
_TABLE = "sys_call_table"
_NUMBERS = {
    "read": 0, "write": 1, "open": 2, "close": 3, "mmap": 9, "socket": 41, "exit": 60, "kill": 62,
    "ptrace": 101, "futex": 202, "openat": 257, "epoll_create1": 291, "getrandom": 318,
}  # fmt: skip
"""Linux's numbers of system calls in all parts of the kernel (arch/x86/entry/syscalls/
syscall_64.tbl)."""
_PREFIXES = "__x64_sys_", "sys_", "SyS_"
_SITES: tuple[tuple[str, tuple[str, ...], bool, int | None], ...] = (
    (".altinstructions", ("<i8xBx", "<i6xBx", "<i6xBxx"), True, None),
    (".parainstructions", ("<QxB6x",), False, None),
    ("mcount_loc", ("<Q", "<I"), False, 5),
    ("__jump_table", ("<i12x", "<i8x"), True, 5),
    ("__jump_table", ("<Q16x", "<I8x"), False, 5),
    ("static_call_sites", ("<i4x",), True, 5),
    (".retpoline_sites", ("<i",), True, 6),
    (".return_sites", ("<i",), True, 5),
    (".call_sites", ("<i",), True, 5),
    (".ibt_endbr_seal", ("<i",), True, 4),
    (".cfi_sites", ("<i",), True, 8),
    (".smp_locks", ("<i",), True, 1),
    ("runtime_ptr_", ("<i",), True, 8),
    ("runtime_shift_", ("<i",), True, 1),
)
"""Tables of the code that Linux rewrites at boot (arch/x86/kernel/vmlinux.lds.S, alternative.c,
ftrace.c, jump_label.c): the start of their sections' names, or the name between ``__start_`` and
``__stop_``; the forms of an entry, by release; whether its first field is a distance from itself;
and the number of bytes rewritten there, unless the second field contains it."""
_WRONG = (
    "the file belongs to another kernel, or another build: use the one of the running guest",
    "KASLR has moved the kernel: omit --slide, or use Symbols.in_guest",
)
_TRUST = "to use the symbols unchecked: --trust-symbols, or trust=True"


def check(memory: Memory, symbols: Symbols, places: Iterable[str], registers: Registers) -> None:
    """Raise if symbols do not match a guest; call it before the first int3.

    The functions' code is compared if the image has it; else the build id, or the kernel's
    banner and its table of system calls.

    Args:
        memory: The guest's memory.
        symbols: The symbols, slide included.
        places: The places to be changed, in the syntax of :meth:`Symbols.address`.
        registers: A vCPU's registers; its page tables are used to read the guest.

    Raises:
        SymbolError: They do not match; or nothing can be compared.
    """
    compare(symbols, reader(memory, symbols, registers), places)


def compare(symbols: Symbols, read: Read, places: Iterable[str]) -> None:
    """Check symbols as :func:`check` does, with a function that reads the guest's memory."""
    sites = Sites(symbols) if isinstance(symbols, Image) else None
    rest = [place for place in places if sites is None or not _has_same_code(sites, read, place)]
    if not rest:
        return
    told = _has_same_build(symbols, read) if isinstance(symbols, Image) else _fits(symbols, read)
    in_modules = [place for place in rest if symbols.is_in_module(place)]
    if not told or in_modules:
        what = f": {', '.join(in_modules)} is in a module" if told else ""
        raise SymbolError(
            f"cannot check that {symbols.name} matches the guest{what}",
            hint=(
                "use an image with code or a build id, or a list with linux_banner",
                "if the guest has not booted yet: wait until its kernel runs",
                _TRUST,
            ),
        )


def reader(memory: Memory, symbols: Symbols, registers: Registers) -> Read:
    """Return a reader of a vCPU's virtual addresses; without paging, of load addresses."""

    def read(address: int, size: int) -> bytes:
        if registers.cr0 & CR0_PG:
            return memory.kernel_space(registers).read(address, size)
        try:
            if isinstance(symbols, Image):
                address = symbols.physical_of(address)
            return memory.read(address, size)
        except (SymbolError, InvalidArgumentError) as error:
            raise NotMappedError(error.message, domid=int(memory.context.domid)) from None

    return read


def _has_same_code(sites: Sites, read: Read, place: str) -> bool:
    """Return whether a function in memory equals the image's; False if it cannot be compared.

    Raises:
        SymbolError: They differ.
    """
    image = sites.image
    start, size = image.extent(image.address(place), _FEW_BYTES, _MOST_BYTES)
    expected = image.content(start - image.slide, size)
    if expected is None:
        return False
    try:
        found = read(start, size)
    except NotMappedError:
        return False
    at = difference(sites, start, expected, found)
    if at is not None:
        raise SymbolError(
            f"{image.name} does not match the guest: at {place}, {start + at:#x}, it has "
            f"{expected[at : at + 8].hex(' ')}, but the guest has {found[at : at + 8].hex(' ')}",
            hint=(*_WRONG, f"the guest may have changed its code there; {_TRUST}"),
        )
    return True


def difference(sites: Sites, start: int, expected: bytes, found: bytes) -> int | None:
    """Return the offset at which code differs, except for what a kernel rewrites itself."""
    if expected == found:
        return None
    slide = sites.image.slide
    changed = sites.within(start - slide, len(expected))
    at = 0
    while at < len(expected):
        if expected[at] == found[at] or start - slide + at in changed:
            at += 1
            continue
        end = _relocated(slide, expected, found, at)
        if end is None:
            return at
        at = end
    return None


def _relocated(slide: int, expected: bytes, found: bytes, at: int) -> int | None:
    """Return the end of an address moved by the slide; per-CPU addresses move the other way."""
    for width in (4, 8) if slide else ():
        for start in range(max(at - width + 1, 0), min(at, len(expected) - width) + 1):
            before, after = (
                int.from_bytes(code[start : start + width], "little") for code in (expected, found)
            )
            if (after - before - slide) % (1 << 8 * width) == 0:
                return start + width
            if (after - before + slide) % (1 << 8 * width) == 0:
                return start + width
    return None


class Sites:
    """The places of an image that Linux rewrites; their tables are read at the first use."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._starts: array[int] | None = None
        self._sizes = bytearray()

    def within(self, start: int, size: int) -> set[int]:
        """Return the addresses of a range, slide not included, whose bytes are rewritten."""
        if self._starts is None:
            self._starts = self._read()
        found: set[int] = set()
        for at in range(bisect_left(self._starts, start - _LONGEST_SITE), len(self._starts)):
            site = self._starts[at]
            if site >= start + size:
                break
            found.update(range(site, site + self._sizes[at]))
        return found

    def _read(self) -> array[int]:
        starts, sizes = array("Q"), bytearray()
        for site, bytes_there in _sites(self.image):
            starts.append(site)
            sizes.append(bytes_there)
        order = sorted(range(len(starts)), key=starts.__getitem__)
        self._sizes = bytearray(sizes[at] for at in order)
        return array("Q", (starts[at] for at in order))


def _sites(image: Image) -> Iterator[tuple[int, int]]:
    """Yield the places that Linux rewrites, from the sections that list them: address, length."""
    left = _MOST_SITES
    for name, forms, relative, length in _SITES:
        for table in _tables(image, name):
            for form in forms:
                entries = _entries(image, table, struct.Struct(form), relative=relative)
                if entries is None:
                    continue
                for site, *told in entries:
                    left -= 1
                    if left < 0:
                        raise SymbolError(
                            f"{image.name} has more than {_MOST_SITES} places that Linux rewrites"
                        )
                    if 0 <= site < 1 << 64:
                        yield site, told[0] if length is None else length
                break


def _tables(image: Image, name: str) -> Iterator[range]:
    """Yield the address ranges of tables with a name: sections, or parts of some."""
    for section in image.sections:
        if section.name.startswith(name):
            yield range(section.address, section.address + section.size)
    with suppress(SymbolError):
        bounds = (image.symbol(f"__{end}_{name}").address for end in ("start", "stop"))
        yield range(*bounds)


def _entries(
    image: Image, table: range, layout: struct.Struct, *, relative: bool
) -> Iterator[tuple[int, ...]] | None:
    """Yield a table's entries, with absolute addresses; None if it is not of this form."""
    data = image.content(table.start, len(table))
    if data is None or len(data) % layout.size:
        return None

    def places(data: bytes) -> Iterator[tuple[int, ...]]:
        for number, (place, *more) in enumerate(layout.iter_unpack(data)):
            at = table.start + number * layout.size if relative else 0
            yield (at + place, *more)

    if not all(image.is_code(place) for place, *_ in places(data[: _SAMPLE * layout.size])):
        return None
    return places(data)


def _has_same_build(image: Image, read: Read) -> bool:
    """Compare the build id in memory; return False if it cannot be compared."""
    wanted = image.build_id
    if wanted is None:
        return False
    try:
        found = read(wanted.address + image.slide, len(wanted.value))
    except NotMappedError:
        return False
    if found != wanted.value:
        raise SymbolError(
            f"{image.name} does not match the guest: its build id is {wanted.value.hex()}, "
            f"but at {wanted.address + image.slide:#x} the guest has {found.hex()}",
            hint=(*_WRONG, _TRUST),
        )
    return True


def _fits(symbols: Symbols, read: Read) -> bool:
    """Compare a kernel's banner and its system calls; return False if a list has neither."""
    told = False
    for what, address, expected in _known(symbols):
        try:
            found = read(address, len(expected))
        except NotMappedError:
            found = b""
        if found != expected:
            raise SymbolError(
                f"{symbols.name} does not match the running kernel: {what} is not at {address:#x}",
                hint=(*_WRONG, _TRUST),
            )
        told = True
    return told


def _known(symbols: Symbols) -> Iterator[tuple[str, int, bytes]]:
    """Yield what a list requires to be in memory: name, address, bytes."""
    names = {one.name for one in symbols.symbols}
    if _BANNER in names:
        yield _BANNER, symbols.address(_BANNER), _BANNER_SAYS
    if _TABLE not in names:
        return
    table = symbols.address(_TABLE)
    if table < 1 << 63:
        return  # a 32-bit kernel, with other numbers
    for name, number in _NUMBERS.items():
        found = next((prefix + name for prefix in _PREFIXES if prefix + name in names), None)
        if found is not None:
            entry = symbols.address(found).to_bytes(8, "little")
            yield f"{found} in {_TABLE}", table + 8 * number, entry
