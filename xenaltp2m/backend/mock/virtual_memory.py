# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtual memory: a vCPU's own page tables, in its view and in the host p2m."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EFAULT

from xenaltp2m.abi.vm_event import AccessFlag
from xenaltp2m.abi.x86 import FLAG_AC, Fault, Paging
from xenaltp2m.backend.mock.core import Core
from xenaltp2m.backend.mock.cpu_mode import CpuMode
from xenaltp2m.backend.mock.engine import LONGEST_INSTRUCTION, Place, ReadsAhead, WritesCode
from xenaltp2m.backend.mock.guest import AT_PAGE
from xenaltp2m.backend.mock.machine import Domain, HypercallError
from xenaltp2m.backend.mock.p2m import R, W, X, entry_rights
from xenaltp2m.backend.mock.physical_memory import PhysicalMemory, pages
from xenaltp2m.backend.mock.vcpu import Vcpu
from xenaltp2m.types import PAGE_SIZE

_RIGHTS = {"r": R, "w": W, "x": X}
_PAGE_OF_32_BITS = 0xFFFF_FFFF & ~(PAGE_SIZE - 1)
_IN_WALK = AccessFlag.GLA_VALID | AccessFlag.FAULT_IN_GPT


class Denied(Exception):  # noqa: N818 - the view's answer
    """An access of a page that the view's table does not allow, or has no entry for."""

    def __init__(self, physical: int, kind: str, va: int, wanted: str, flags: AccessFlag) -> None:
        super().__init__(physical, kind)
        self.physical = physical
        self.kind = kind
        self.va = va
        """Any address in the page to translate, and ``wanted`` the kind of access to that page."""
        self.wanted = wanted
        self.flags = flags


@dataclass(eq=False)
class VirtualMemory:
    """Translate virtual addresses and access what they lead to, for one vCPU."""

    domain: Domain
    vcpu: Vcpu
    mode: CpuMode
    core: Core
    physical: PhysicalMemory

    def _paging(self, user: bool) -> Paging:
        register = self.vcpu.register
        return Paging(
            register("cr0"),
            register("cr3"),
            register("cr4"),
            register("msr_efer"),
            user,
            alignment_check=bool(register("rflags") & FLAG_AC),
            physical_bits=self.domain.machine.physical_address_bits,
        )

    def _check(
        self, physical: int, kind: str, va: int, wanted: str, flags: AccessFlag
    ) -> tuple[int, int]:
        """Return the frame that the view has at a physical address, and its rights.

        Raises:
            Denied: The view does not allow the access.
        """
        found = self.physical.find(physical // PAGE_SIZE)
        rights = entry_rights(found.type, found.access) if found.mapped else 0
        big = found.order and not self.domain.machine.executable_superpages
        if not rights & _RIGHTS[kind] or (kind == "x" and big) or (rights & W and not rights & R):
            raise Denied(physical, kind, va, wanted, flags)
        return found.mfn, rights

    def resolve(self, va: int, kind: str, user: bool, *, ahead: bool = False) -> Place:
        """Find a page for the engine, and mark it as accessed or dirty.

        Raises:
            Fault: The guest's page tables do not allow the access.
            Denied: The view does not allow it.
            ReadsAhead: It would be marked as accessed (SDM 3A, 4.8) before it is.
        """
        frames = self.domain.machine.frames
        gfns = []
        entries = {}

        def load(physical: int, size: int) -> int:
            gfn, offset = divmod(physical, PAGE_SIZE)
            mfn, _ = self._check(physical, "r", va, kind, _IN_WALK)
            at = mfn * PAGE_SIZE + offset
            value = entries[at] = frames.memory[at : at + size]
            gfns.append(gfn)
            return int.from_bytes(value, "little")

        def store(physical: int, size: int, value: int) -> None:
            if ahead:
                raise ReadsAhead
            mfn, _ = self._check(physical, "w", va, kind, _IN_WALK)
            at = physical % PAGE_SIZE
            marked = entries[mfn * PAGE_SIZE + at] = value.to_bytes(size, "little")
            frames.page(mfn)[at : at + size] = marked

        physical, allowed = va & _PAGE_OF_32_BITS, "rwx"
        if self.mode.paged:
            physical, allowed = self._paging(user).translate(va, kind, load, store)
        mfn, rights = self._check(physical, kind, va, kind, AT_PAGE)
        gfns.append(physical // PAGE_SIZE)
        granted = "".join(right for right in allowed if rights & _RIGHTS[right])
        return Place(mfn, self._rights_on_core(va, kind, mfn, granted), gfns, entries)

    def _rights_on_core(self, va: int, kind: str, mfn: int, granted: str) -> str:
        """Return the rights that the engine gets, so that it exits where code may change."""
        core = self.core
        if kind == "x":
            core.note_code(va, mfn)
            return granted.replace("w", "")
        if kind == "w" and core.has_code_at(va, mfn):  # Unicorn checks each store
            return granted
        if core.has_code(mfn) and kind == "r":
            granted = granted.replace("w", "")
        return granted.replace("x", "")

    def resolve_to_run(self, va: int, kind: str, user: bool) -> Place:
        """Find a page for the engine that runs on; see :meth:`resolve`.

        Raises:
            WritesCode: The engine that runs on may not write to it.
        """
        ahead = kind == "x" and va // PAGE_SIZE != self.core.engine.rip_va // PAGE_SIZE
        place = self.resolve(va, kind, user, ahead=ahead)
        if kind == "w" and self.core.has_code(place.mfn):
            if "x" not in place.rights:
                raise WritesCode
            self.core.note_write(place.mfn)
        return place

    def translate_in_host(self, va: int, kind: str, user: bool = False) -> int:
        """Translate in the host p2m and mark nothing.

        Raises:
            Fault: The guest's page tables do not allow the access.
        """
        domain, physical = self.domain, self.physical

        def load(address: int, size: int) -> int:
            found = domain.host_lookup(address // PAGE_SIZE)
            at = address % PAGE_SIZE
            return int.from_bytes(physical.frame(found)[at : at + size], "little")

        page, _ = self._paging(user).translate(va, kind, load, lambda *_: None)
        return page + va % PAGE_SIZE

    def copy_from(self, va: int, size: int) -> bytes:
        """``copy_from_guest``: what the host p2m has, whatever the view; EFAULT if nothing."""
        found = b""
        for start, count in pages(va, size):
            found += self.physical.read_in_host(self._argument(start, "r"), count)
        return found

    def copy_to(self, va: int, data: bytes) -> None:
        """``copy_to_guest``; EFAULT where there is no memory."""
        at = 0
        for start, count in pages(va, len(data)):
            self.physical.write_in_host(self._argument(start, "w"), data[at : at + count])
            at += count

    def _argument(self, va: int, kind: str) -> int:
        """Translate an address that the guest gave to Xen."""
        try:
            physical = self.translate_in_host(va, kind)
        except Fault:
            raise HypercallError(EFAULT) from None
        if not self.domain.host_lookup(physical // PAGE_SIZE, populate=True).valid:
            raise HypercallError(EFAULT)
        return physical

    def fetch(self, va: int) -> bytes:
        """Fetch as many bytes as an instruction may have, up to the page's end."""
        mfn = self.resolve(va, "x", self.mode.privilege == 3).mfn
        at = va % PAGE_SIZE
        return bytes(self.domain.machine.frames.peek(mfn)[at : at + LONGEST_INSTRUCTION])

    def fetch_in_host(self, va: int, size: int) -> bytes:
        """Fetch from the host p2m; fewer bytes where the next page is not mapped, but one."""
        found = b""
        for start, count in pages(va, size):
            try:
                physical = self.translate_in_host(start, "x", self.mode.privilege == 3)
            except Fault:
                break
            found += self.physical.read_in_host(physical, count)
        return found or b"\0"

    def read(self, va: int, size: int) -> bytes:
        """Read as the CPU does for itself, as a supervisor."""
        found = b""
        for start, count in pages(va, size):
            mfn = self.resolve(start, "r", user=False).mfn
            at = start % PAGE_SIZE
            found += bytes(self.domain.machine.frames.peek(mfn)[at : at + count])
        return found
