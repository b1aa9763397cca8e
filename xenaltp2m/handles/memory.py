# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's memory: by guest-physical address, and by virtual address."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from xenaltp2m.abi.x86 import (
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    FRAME,
    GP,
    PTE_PRESENT,
    Fault,
    Paging,
    Walk,
)
from xenaltp2m.errors import InvalidArgumentError, NotMappedError, XenError
from xenaltp2m.handles.base import Handle, UndoList
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.signals import guard, uninterruptible
from xenaltp2m.handles.vcpu import Vcpu, registers_of, vcpus_of
from xenaltp2m.types import GFN_LIMIT, PAGE_SHIFT, PAGE_SIZE
from xenaltp2m.values.arguments import check_bytes, check_kind, check_number
from xenaltp2m.values.events import Registers
from xenaltp2m.values.gfns import check_gfn

_U64 = 1 << 64
_MAPPED_AT_ONCE = 256
_MOST_REMEMBERED = 1024
"""Cached pages of an address space."""
_PHYSICAL_BITS = 52
"""The architectural maximum: for reading, the CPU's own number does not matter."""
_FEW_VCPUS = 8
"""With more vCPUs, checking whether each has run takes longer than reading the pages again."""


_writes: Counter[int] = Counter()
"""This process's writes to each domain's memory, which invalidate cached pages. By domid, so that
the handles of all connections share one count."""


class Memory:
    """A domain's guest-physical memory, as the host p2m maps it: views have no effect on it.

    To read or write the page that a view shows at a remapped gfn, use the new gfn.

    Attributes:
        context: The domain's context.
    """

    def __init__(self, context: DomainContext) -> None:
        self.context = context
        self._backend = context.backend

    @property
    def writes(self) -> int:
        """The number of writes by this process to the domain's memory, through any handle."""
        return _writes[int(self.context.domid)]

    def read(self, address: int, length: int) -> bytes:
        """Read ``length`` bytes from a guest-physical address, across pages.

        Raises:
            InvalidArgumentError: The range is not in the guest's address space, or a page of it
                is not memory.

        ``xenforeignmemory_map``.
        """
        parts = []
        for gfns, offset, size in self._spans(address, length):
            with self._mapped(gfns, writable=False) as pages:
                parts.append(b"".join(pages)[offset : offset + size])
        return b"".join(parts)

    def check(self, address: int, length: int) -> None:
        """Check that a range is memory, without reading it.

        Raises:
            InvalidArgumentError: As :meth:`read`.

        ``xenforeignmemory_map``.
        """
        for gfns, _, _ in self._spans(address, length):
            with self._mapped(gfns, writable=False):
                pass

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at a guest-physical address, across pages.

        Pages are mapped one megabyte at a time: on error, what was written before stays written.

        Raises:
            InvalidArgumentError: As :meth:`read`.

        ``xenforeignmemory_map``.
        """
        check_bytes("data", data)
        source = memoryview(data).cast("B")
        done = 0
        try:
            for gfns, offset, size in self._spans(address, len(source)):
                end = done + size
                with self._mapped(gfns, writable=True) as pages:
                    for page in pages:
                        part = source[done : min(done + PAGE_SIZE - offset, end)]
                        page[offset : offset + len(part)] = part
                        done += len(part)
                        offset = 0  # noqa: PLW2901 - only the first page starts within
        finally:
            # Count afterwards: a concurrent reader may have cached a half-written page.
            _writes[int(self.context.domid)] += 1

    def read_page(self, gfn: int) -> bytes:
        """Read one page: 4096 bytes."""
        check_gfn(gfn)
        return self.read(gfn << PAGE_SHIFT, PAGE_SIZE)

    def write_page(self, gfn: int, data: bytes | bytearray | memoryview) -> None:
        """Write one whole page.

        Raises:
            InvalidArgumentError: ``data`` is not 4096 bytes long.
        """
        check_gfn(gfn)
        check_bytes("data", data)
        if len(data) != PAGE_SIZE:
            raise InvalidArgumentError(f"a page is {PAGE_SIZE} bytes, not {len(data)}")
        self.write(gfn << PAGE_SHIFT, data)

    def address_space(
        self,
        registers: Registers | None = None,
        *,
        cr3: int | None = None,
        mapped: MappedPages | None = None,
    ) -> AddressSpace:
        """Return the virtual address space of a vCPU, by its page tables.

        Args:
            registers: Registers of an event, or from :meth:`Vcpu.registers`; by default the current
                ones of a vCPU that is online: see :meth:`Domain.registers`.
            cr3: Another process's page tables, of the same kind.
            mapped: Keeps pages mapped after a read, which makes many reads fast.
        """
        check_kind("registers", registers, Registers | None, "an event's or a vCPU's registers")
        check_kind("mapped", mapped, MappedPages | None, "MappedPages")
        if cr3 is not None:
            check_number("cr3", cr3, most=_U64 - 1)
        if registers is None:
            registers = registers_of(self.context)
        paging = Paging(
            registers.cr0,
            registers.cr3 if cr3 is None else cr3,
            registers.cr4,
            registers.msr_efer,
            user=False,
            physical_bits=_PHYSICAL_BITS,
        )
        return AddressSpace(self, paging, mapped)

    def kernel_space(self, registers: Registers) -> AddressSpace:
        """Return the kernel's virtual address space, even if the vCPU runs with user page tables.

        With page-table isolation, Linux keeps the kernel's top-level table in the page right before
        the user's (``PTI_USER_PGTABLE_BIT``).

        Args:
            registers: The vCPU's registers.
        """
        check_kind("registers", registers, Registers, "an event's or a vCPU's registers")
        user = table_address(registers, registers.cr3)
        kernel = user & ~PAGE_SIZE
        is_isolated = user != kernel and self.is_one_process(registers, user, kernel)
        return self.address_space(registers, cr3=kernel if is_isolated else None)

    def is_one_process(self, registers: Registers, one: int, other: int) -> bool:
        """Check whether two top-level page tables belong to one process: their user halves agree.

        Args:
            registers: A vCPU's registers, which give the kind of page tables.
            one: Guest-physical address of a table.
            other: Guest-physical address of another table.
        """
        check_kind("registers", registers, Registers, "an event's or a vCPU's registers")
        for table in (one, other):
            check_number("the address of a table", table, most=_U64 - 1)
        try:
            found = self._user_half(registers, one)
            return bool(found) and found == self._user_half(registers, other)
        except InvalidArgumentError:
            return False  # a table is not memory

    def _user_half(self, registers: Registers, table: int) -> int:
        """Read the frames and present bits of the lower half's entries, as one number."""
        entry, size = 8, PAGE_SIZE // 2
        if not registers.msr_efer & EFER_LMA:
            entry, size = (8, 16) if registers.cr4 & CR4_PAE else (4, size)
        mask = FRAME | PTE_PRESENT if entry == 8 else 0xFFFF_F000 | PTE_PRESENT
        repeated = mask.to_bytes(entry, "little") * (size // entry)
        raw = self.read(table, size)
        return int.from_bytes(raw, "little") & int.from_bytes(repeated, "little")

    def read_va(self, cr3: int, address: int, length: int) -> bytes:
        """Read from a virtual address by the page tables at ``cr3``, in a vCPU's current mode.

        For many reads use :meth:`address_space`.

        Raises:
            NotMappedError: A page is not mapped.
        """
        check_number("cr3", cr3, most=_U64 - 1)
        return self.address_space(cr3=cr3).read(address, length)

    def _spans(self, address: int, length: int) -> Iterator[tuple[range, int, int]]:
        """Split a range into parts to map together: (gfns, offset in the first page, bytes)."""
        self.context.check_open()
        check_number("address", address)
        check_number("length", length)
        if address + length > GFN_LIMIT << PAGE_SHIFT:
            raise InvalidArgumentError(
                f"{length} bytes at {address:#x} are not in the guest-physical address space"
            )
        end = address + length
        while address < end:
            first = address >> PAGE_SHIFT
            stop = min(end, (first + _MAPPED_AT_ONCE) << PAGE_SHIFT)
            gfns = range(first, (stop - 1 >> PAGE_SHIFT) + 1)
            yield gfns, address & (PAGE_SIZE - 1), stop - address
            address = stop

    @contextmanager
    def _mapped(self, gfns: range, *, writable: bool) -> Iterator[list[memoryview]]:
        domid, undo = self.context.domid, UndoList()
        with guard.holding_back():  # mapped, copied and unmapped: a megabyte at most
            pages = undo.do(
                f"mapping of gfns {gfns.start:#x}..{gfns.stop - 1:#x} of domain {domid}",
                lambda: self._backend.foreignmemory_map(domid, writable, gfns),
                self._backend.foreignmemory_unmap,
            )
            try:
                yield pages
            finally:
                undo.unwind(
                    f"reading or writing the memory of {self.context!r}", heir=self.context.undo
                )


def table_address(registers: Registers, cr3: int) -> int:
    """Return the address of the top-level page table in CR3, without PCID and flags.

    Args:
        registers: A vCPU's registers, which give the kind of page tables.
        cr3: The value of CR3.
    """
    if registers.msr_efer & EFER_LMA:
        return cr3 & FRAME
    return cr3 & (0xFFFF_FFE0 if registers.cr4 & CR4_PAE else 0xFFFF_F000)


class Translation(NamedTuple):
    """The translation of a virtual address."""

    physical: int
    """Guest-physical address, with the offset in the page."""
    page_size: int
    """4 KiB, 2 MiB, 4 MiB or 1 GiB."""
    writable: bool
    user: bool
    """Whether privilege level 3 may access it."""
    executable: bool


class MappedPages(Handle):
    """A cache of mapped pages of a domain, so that reading them again needs no hypercall.

    If a page is removed from the guest while it is mapped, reads return the old page.
    """

    def __init__(self, context: DomainContext, most: int = 64) -> None:
        """Make an empty cache.

        Args:
            context: The domain's context.
            most: The greatest number of pages mapped at the same time.
        """
        super().__init__()
        self._context, self._most = context, most
        self._backend = context.backend
        self._pages: dict[int, list[memoryview]] = {}
        context.register_for_migration(self)

    def __repr__(self) -> str:
        return f"<MappedPages of domain {self._context.domid}>"

    def page(self, gfn: int) -> memoryview:
        """Return a page for reading: it always shows the current content.

        Raises:
            InvalidArgumentError: The gfn is not memory.

        ``xenforeignmemory_map``.
        """
        self.check_open()
        found = self._pages.get(gfn)
        if found is None:
            with guard.holding_back():
                if len(self._pages) >= self._most:
                    self._unmap(next(iter(self._pages)))
                found = self._backend.foreignmemory_map(int(self._context.domid), False, [gfn])
                self._pages[gfn] = found
        return found[0]

    @uninterruptible
    def _unmap(self, gfn: int) -> None:
        self._backend.foreignmemory_unmap(self._pages[gfn])
        del self._pages[gfn]

    @uninterruptible
    def _take_back(self) -> None:
        undo = UndoList()
        for gfn in self._pages:
            what = f"mapping of gfn {gfn:#x} of domain {self._context.domid}"
            undo.push(what, partial(self._unmap, gfn))
        undo.unwind(f"closing {self!r}")

    def forget(self) -> None:
        """Unmap all pages; a later read maps its page again."""
        self._take_back()

    def detach(self, _later: UndoList) -> None:
        """Unmap all pages before a migration."""
        self.forget()

    def reattach(self) -> None:
        """Unmap pages that were read during the migration: they are the old domain's."""
        self.forget()

    def abandon(self) -> None:
        """Close after the domain is gone; the mappings, which are this process's, are unmapped."""
        for gfn in list(self._pages):
            with suppress(XenError):
                self._unmap(gfn)
        super().abandon()

    def _orphaned(self) -> bool:
        return self._context.is_gone()


class AddressSpace:
    """A guest's virtual address space. Made by :meth:`Memory.address_space`.

    Pages are either kept mapped, or cached from the second read on, until a vCPU of the domain runs
    or this process writes to the domain's memory. Writes by other processes to a paused domain are
    not detected. The guest's page tables are not trusted: a walk reads five entries at most.
    """

    def __init__(self, memory: Memory, paging: Paging, mapped: MappedPages | None = None) -> None:
        self._memory, self._mapped = memory, mapped
        self._context = memory.context
        self.paging = paging
        self._vcpus: list[Vcpu] | None = None
        self._pages: dict[int, bytes] = {}
        self._moment: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"<AddressSpace of {self._context!r} by cr3 {self.paging.cr3:#x}>"

    def translate(self, address: int) -> Translation:
        """Translate a virtual address to a guest-physical one, with its access rights.

        Raises:
            NotMappedError: It is not mapped.
            InvalidArgumentError: It is not a virtual address.
        """
        check_number("address", address, most=_U64 - 1)
        self._drop_outdated()
        return self._translate(address)

    def read(self, address: int, length: int) -> bytes:
        """Read ``length`` bytes from a virtual address, across pages.

        Raises:
            NotMappedError: Some of it is not mapped.
        """
        return b"".join(self._pieces(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at a virtual address, across pages, even if the guest may not write there.

        Raises:
            NotMappedError: Some of it is not mapped; then nothing is written.
        """
        check_bytes("data", data)
        check_number("address", address, most=_U64 - 1)
        self._drop_outdated()
        source = memoryview(data).cast("B")
        places = [
            (self._translate(at).physical, count) for at, count in _parts(address, len(source))
        ]
        done = 0
        for physical, count in places:
            self._memory.write(physical, source[done : done + count])
            done += count

    def read_number(self, address: int, size: int = 8) -> int:
        """Read an unsigned number of 1 to 8 bytes, such as a pointer.

        Raises:
            NotMappedError: As :meth:`read`.
            InvalidArgumentError: The size is not 1 to 8.
        """
        check_number("size", size, least=1, most=8)
        return int.from_bytes(self.read(address, size), "little")

    def read_string(self, address: int, limit: int = 4096) -> bytes:
        """Read a zero-terminated string, of ``limit`` bytes at most.

        Raises:
            NotMappedError: A page of the string is not mapped.
        """
        found = b""
        for piece in self._pieces(address, limit):
            text, zero, _ = piece.partition(b"\0")
            found += text
            if zero:
                break
        return found

    def _pieces(self, address: int, length: int) -> Iterator[bytes]:
        """Read page by page. Yields copies, because reading may evict a mapped page."""
        check_number("address", address, most=_U64 - 1)
        check_number("length", length)
        self._drop_outdated()
        for at, count in _parts(address, length):
            gfn, offset = divmod(self._translate(at).physical, PAGE_SIZE)
            yield bytes(self._page(gfn)[offset : offset + count])

    def _translate(self, address: int) -> Translation:
        if not self.paging.cr0 & CR0_PG:
            if not 0 <= address < 1 << 32:
                raise InvalidArgumentError(f"{address:#x} is not an address of 32 bits")
            return Translation(address, PAGE_SIZE, True, True, True)
        return Translation(*self._walk(address)[:5])

    def check(self, address: int) -> None:
        """Raise if a number is not a virtual address."""
        bits = 64 if self.paging.efer & EFER_LMA else 32
        check_number("address", address, most=(1 << bits) - 1)

    def _walk(self, address: int) -> Walk:
        self.check(address)
        try:
            return self.paging.walk(address, self._load)
        except Fault as fault:
            why = "it is not canonical"
            if fault.vector != GP:
                why = "a reserved bit is set" if fault.error_code & 1 else "an entry is not present"
            raise NotMappedError(
                f"{address:#x} is not mapped by the page tables at {self.paging.cr3:#x}: {why}",
                domid=int(self._context.domid),
            ) from None

    def _load(self, physical: int, size: int) -> int:
        gfn, offset = divmod(physical, PAGE_SIZE)
        return int.from_bytes(self._page(gfn)[offset : offset + size], "little")

    def _page(self, gfn: int) -> bytes | memoryview:
        found = self._pages.get(gfn)
        if found is not None:
            return found
        if len(self._pages) >= _MOST_REMEMBERED:
            self._pages.clear()
        try:
            if self._mapped is not None:
                return self._mapped.page(gfn)
            found = self._pages[gfn] = self._memory.read_page(gfn)
        except InvalidArgumentError:
            raise NotMappedError(
                f"the page tables at {self.paging.cr3:#x} lead to gfn {gfn:#x}, which is not "
                "memory",
                domid=int(self._context.domid),
                gfn=gfn,
            ) from None
        return found

    def _drop_outdated(self) -> None:
        """Drop cached pages if a vCPU or this process may have written since."""
        if not self._pages:
            return  # a single read needs no check
        moment = None
        if self._vcpus is None:
            self._vcpus = vcpus_of(self._context)
        if len(self._vcpus) <= _FEW_VCPUS:
            moment = (self._memory.writes, *(vcpu.info().cpu_time for vcpu in self._vcpus))
        if moment is None or moment != self._moment:
            self._pages.clear()
        self._moment = moment


def _parts(address: int, length: int) -> Iterator[tuple[int, int]]:
    """Split a range of bytes at page boundaries: (address, bytes)."""
    end = address + length
    while address < end:
        count = min(end - address, PAGE_SIZE - address % PAGE_SIZE)
        yield address, count
        address += count
