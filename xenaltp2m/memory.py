# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's memory: guest-physical, as the host p2m has it, and by the guest's own page tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

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
from xenaltp2m.arguments import check_bytes, check_kind, check_number
from xenaltp2m.errors import InvalidArgumentError, NotMappedError, XenError
from xenaltp2m.events import Registers
from xenaltp2m.handle import Handle, UndoList
from xenaltp2m.signals import guard, uninterruptible
from xenaltp2m.types import GFN_LIMIT, PAGE_SHIFT, PAGE_SIZE
from xenaltp2m.view import check_gfn

if TYPE_CHECKING:
    from xenaltp2m.domain import Domain
    from xenaltp2m.vcpu import Vcpu

_U64 = 1 << 64
_MAPPED_AT_ONCE = 256
_MOST_REMEMBERED = 1024
"""Pages."""
_PHYSICAL_BITS = 52
"""At most: which of them the CPU has does not matter to who reads."""
_FEW_VCPUS = 8
"""To ask each whether it ran takes longer than to read anew, where there are more."""


_writes: Counter[int] = Counter()
"""Of this process, to each domain's memory: pages that were read before are outdated. By domid, so
that every handle of a domain counts, also those of other connections."""


class Memory:
    """A domain's guest-physical memory, as the host p2m has it: views and remaps do not show.

    To read or write what a view shows in place of a page, use the gfn it is remapped to.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._backend = domain.xen.backend

    @property
    def writes(self) -> int:
        """How often this process has written to the domain's memory, through any handle of it."""
        return _writes[int(self._domain.domid)]

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

        Pages are mapped a megabyte at a time: on error what was written before stays.

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
            # Afterwards: who reads meanwhile may remember a page of which half is written.
            _writes[int(self._domain.domid)] += 1

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
        """Return the linear addresses of a vCPU, by the page tables it uses.

        Args:
            registers: An event's, or what :meth:`Vcpu.registers` returned; by default those of a
                vCPU that is up, now: see :meth:`Domain.registers`.
            cr3: Another process's page tables, of the same kind.
            mapped: Where pages that are read stay mapped, for who reads much in a short time.
        """
        check_kind("registers", registers, Registers | None, "an event's or a vCPU's registers")
        check_kind("mapped", mapped, MappedPages | None, "MappedPages")
        if cr3 is not None:
            check_number("cr3", cr3, most=_U64 - 1)
        if registers is None:
            registers = self._domain.registers()
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
        """Return a kernel's linear addresses, also while a vCPU uses the tables without them.

        Linux with page-table isolation has the kernel's tables right before the user's
        (``PTI_USER_PGTABLE_BIT``).

        Args:
            registers: Of the vCPU.
        """
        check_kind("registers", registers, Registers, "an event's or a vCPU's registers")
        user = table_address(registers, registers.cr3)
        kernel = user & ~PAGE_SIZE
        is_isolated = user != kernel and self.is_one_process(registers, user, kernel)
        return self.address_space(registers, cr3=kernel if is_isolated else None)

    def is_one_process(self, registers: Registers, one: int, other: int) -> bool:
        """Tell whether two top-level page tables have the same user half: one is the kernel's.

        Args:
            registers: Of a vCPU, for the kind of page tables.
            one: Guest-physical, of a table.
            other: Of another.
        """
        check_kind("registers", registers, Registers, "an event's or a vCPU's registers")
        for table in (one, other):
            check_number("the address of a table", table, most=_U64 - 1)
        try:
            found = self._user_half(registers, one)
            return bool(found) and found == self._user_half(registers, other)
        except InvalidArgumentError:
            return False  # no memory

    def _user_half(self, registers: Registers, table: int) -> int:
        """Read where the entries of the lower half lead: all of them, as one number."""
        entry, size = 8, PAGE_SIZE // 2
        if not registers.msr_efer & EFER_LMA:
            entry, size = (8, 16) if registers.cr4 & CR4_PAE else (4, size)
        mask = FRAME | PTE_PRESENT if entry == 8 else 0xFFFF_F000 | PTE_PRESENT
        repeated = mask.to_bytes(entry, "little") * (size // entry)
        raw = self.read(table, size)
        return int.from_bytes(raw, "little") & int.from_bytes(repeated, "little")

    def read_va(self, cr3: int, address: int, length: int) -> bytes:
        """Read from a linear address by the page tables at ``cr3``, in the mode a vCPU is in.

        :meth:`address_space` does this for many reads.

        Raises:
            NotMappedError: The page tables lead nowhere.
        """
        check_number("cr3", cr3, most=_U64 - 1)
        return self.address_space(cr3=cr3).read(address, length)

    def _spans(self, address: int, length: int) -> Iterator[tuple[range, int, int]]:
        """Yield what to map at once: (gfns, offset in the first page, bytes)."""
        self._domain._check_open()
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
        domid, undo = self._domain.domid, UndoList()
        with guard.holding_back():  # mapped, copied and unmapped: a megabyte at most
            pages = undo.do(
                f"mapping of gfns {gfns.start:#x}..{gfns.stop - 1:#x} of domain {domid}",
                lambda: self._backend.foreignmemory_map(domid, writable, gfns),
                self._backend.foreignmemory_unmap,
            )
            try:
                yield pages
            finally:
                self._domain._finish(undo)


def table_address(registers: Registers, cr3: int) -> int:
    """Return where the top-level page table is; the rest of CR3 is a PCID, and flags.

    Args:
        registers: Of a vCPU, for the kind of page tables.
        cr3: Of them.
    """
    if registers.msr_efer & EFER_LMA:
        return cr3 & FRAME
    return cr3 & (0xFFFF_FFE0 if registers.cr4 & CR4_PAE else 0xFFFF_F000)


class LinearPage(NamedTuple):
    """Where a linear address leads."""

    physical: int
    """Guest-physical, of the very address."""
    page_size: int
    """4 KiB, 2 or 4 MiB, 1 GiB."""
    writable: bool
    user: bool
    """Whether privilege level 3 may use it."""
    executable: bool


class MappedPages(Handle):
    """Pages of a domain that stay mapped, so that reading them again takes no hypercall.

    Who has pages taken from the guest meanwhile reads what they were.
    """

    def __init__(self, domain: Domain, most: int = 64) -> None:
        """Map none, yet.

        Args:
            domain: The domain.
            most: How many are mapped at once.
        """
        super().__init__()
        self._domain, self._most = domain, most
        self._backend = domain.xen.backend
        self._pages: dict[int, list[memoryview]] = {}
        domain._carry_along(self)

    def __repr__(self) -> str:
        return f"<MappedPages of domain {self._domain.domid}>"

    def page(self, gfn: int) -> memoryview:
        """Return a page as it is at each moment, to read.

        Raises:
            InvalidArgumentError: It is not memory.

        ``xenforeignmemory_map``.
        """
        self._check_open()
        found = self._pages.get(gfn)
        if found is None:
            with guard.holding_back():
                if len(self._pages) >= self._most:
                    self._unmap(next(iter(self._pages)))
                found = self._backend.foreignmemory_map(int(self._domain.domid), False, [gfn])
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
            what = f"mapping of gfn {gfn:#x} of domain {self._domain.domid}"
            undo.push(what, partial(self._unmap, gfn))
        undo.unwind(f"closing {self!r}")

    def forget(self) -> None:
        """Unmap all; what is read later is mapped anew."""
        self._take_back()

    def _lay_down(self, _later: UndoList) -> None:
        """Map nothing more for now."""
        self.forget()

    def _take_up(self) -> None:
        self.forget()  # what was read in between, where the domain is no more

    def abandon(self) -> None:
        """Close where the domain is gone: the mappings are this process's own."""
        for gfn in list(self._pages):
            with suppress(XenError):
                self._unmap(gfn)
        super().abandon()

    def _orphaned(self) -> bool:
        return self._domain._orphaned()


class AddressSpace:
    """A guest's linear addresses. Made by :meth:`Memory.address_space`.

    Pages that were read are remembered, from the second read on, for as long as no vCPU of the
    domain has run and this process has not written to its memory; or they are kept mapped. Other
    processes' writes to a domain that stands still are not noticed. Everything in the guest's
    tables may be anything: a walk reads five entries at most.
    """

    def __init__(self, memory: Memory, paging: Paging, mapped: MappedPages | None = None) -> None:
        self._memory, self._mapped = memory, mapped
        self._domain = memory._domain
        self.paging = paging
        self._vcpus: list[Vcpu] | None = None
        self._pages: dict[int, bytes] = {}
        self._moment: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"<AddressSpace of {self._domain!r} by cr3 {self.paging.cr3:#x}>"

    def translate(self, address: int) -> LinearPage:
        """Tell where an address leads, and what may be done with it.

        Raises:
            NotMappedError: It leads nowhere.
            InvalidArgumentError: It is no linear address.
        """
        check_number("address", address, most=_U64 - 1)
        self._look_whether_it_ran()
        return self._translate(address)

    def read(self, address: int, length: int) -> bytes:
        """Read ``length`` bytes from an address, across pages.

        Raises:
            NotMappedError: Some of it leads nowhere.
        """
        return b"".join(self._pieces(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at an address, across pages, whatever the guest itself may do there.

        Raises:
            NotMappedError: Some of it leads nowhere; then nothing is written.
        """
        check_bytes("data", data)
        check_number("address", address, most=_U64 - 1)
        self._look_whether_it_ran()
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
            InvalidArgumentError: It has more bytes, or none.
        """
        check_number("size", size, least=1, most=8)
        return int.from_bytes(self.read(address, size), "little")

    def read_string(self, address: int, limit: int = 4096) -> bytes:
        """Read the bytes before a zero, ``limit`` at most.

        Raises:
            NotMappedError: A page that it goes on in leads nowhere.
        """
        found = b""
        for piece in self._pieces(address, limit):
            text, zero, _ = piece.partition(b"\0")
            found += text
            if zero:
                break
        return found

    def _pieces(self, address: int, length: int) -> Iterator[bytes]:
        """Read a page's part at a time: copies, for a mapped page goes when others come."""
        check_number("address", address, most=_U64 - 1)
        check_number("length", length)
        self._look_whether_it_ran()
        for at, count in _parts(address, length):
            gfn, offset = divmod(self._translate(at).physical, PAGE_SIZE)
            yield bytes(self._page(gfn)[offset : offset + count])

    def _translate(self, address: int) -> LinearPage:
        if not self.paging.cr0 & CR0_PG:
            if not 0 <= address < 1 << 32:
                raise InvalidArgumentError(f"{address:#x} is not an address of 32 bits")
            return LinearPage(address, PAGE_SIZE, True, True, True)
        return LinearPage(*self._walk(address)[:5])

    def check(self, address: int) -> None:
        """Refuse what is no linear address."""
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
                f"nothing is at {address:#x} by the page tables at {self.paging.cr3:#x}: {why}",
                domid=int(self._domain.domid),
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
                f"the page tables at {self.paging.cr3:#x} lead to gfn {gfn:#x}: no memory",
                domid=int(self._domain.domid),
                gfn=gfn,
            ) from None
        return found

    def _look_whether_it_ran(self) -> None:
        """Forget what was read if a vCPU may have written since."""
        if not self._pages:
            return  # who reads once need not ask
        moment = None
        if self._vcpus is None:
            self._vcpus = self._domain.vcpus()
        if len(self._vcpus) <= _FEW_VCPUS:
            moment = (self._memory.writes, *(vcpu.info().cpu_time for vcpu in self._vcpus))
        if moment is None or moment != self._moment:
            self._pages.clear()
        self._moment = moment


def _parts(address: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a run of bytes at page boundaries: (address, bytes)."""
    end = address + length
    while address < end:
        count = min(end - address, PAGE_SIZE - address % PAGE_SIZE)
        yield address, count
        address += count
