# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guest-physical memory: as a vCPU's view shows it, and as the host p2m does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xenaltp2m.backend.mock.machine import Domain
from xenaltp2m.backend.mock.p2m import Lookup, P2m, PageType
from xenaltp2m.backend.mock.vcpu import Vcpu
from xenaltp2m.types import PAGE_SIZE

WRITES_DROPPED = {PageType.RAM_RO, PageType.GRANT_MAP_RO}


@dataclass(eq=False)
class PhysicalMemory:
    """Read and write a domain's memory by guest-physical address, for one vCPU."""

    domain: Domain
    vcpu: Vcpu

    @property
    def table(self) -> P2m:
        """The table of the view that the vCPU is in."""
        domain = self.domain
        return domain.views[self.vcpu.view].table if domain.active else domain.host

    def find(self, gfn: int) -> Lookup:
        """Look a gfn up in the vCPU's view."""
        return self.table.lookup(gfn)

    def read_in_view(self, address: int, size: int) -> bytes:
        """Read what the vCPU's view shows."""
        parts = (self.frame(self.find(gfn)) for gfn in _gfns(address, size))
        return _cut(b"".join(parts), address, size)

    def write_in_view(self, address: int, data: bytes) -> None:
        """Write to the frames that the vCPU's view shows."""
        for offset, one in enumerate(data):
            gfn, at = divmod(address + offset, PAGE_SIZE)
            self.domain.machine.frames.page(self.find(gfn).mfn)[at] = one

    def read_in_host(self, address: int, size: int) -> bytes:
        """Read what the host p2m has, whatever the view."""
        domain = self.domain
        parts = (self.frame(domain.host_lookup(gfn, populate=True)) for gfn in _gfns(address, size))
        return _cut(b"".join(parts), address, size)

    def write_in_host(self, address: int, data: bytes) -> None:
        """``hvm_copy_to_guest_phys``: dropped where the page is read-only or none."""
        domain = self.domain
        for offset, one in enumerate(data):
            gfn, at = divmod(address + offset, PAGE_SIZE)
            found = domain.host_lookup(gfn, populate=True, unshare=True)
            if found.valid and found.type not in WRITES_DROPPED:
                domain.machine.frames.page(found.mfn)[at] = one

    def frame(self, found: Lookup) -> bytes:
        """Return a page's contents; all ones, as from a bus without a device, if it has none."""
        if not found.valid:
            return b"\xff" * PAGE_SIZE
        return bytes(self.domain.machine.frames.page(found.mfn))


def pages(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Split a range at page boundaries: yield each part's first address and size."""
    end = address + size
    while True:
        count = min(PAGE_SIZE - address % PAGE_SIZE, end - address)
        yield address, count
        address += count
        if address >= end:
            return


def _gfns(address: int, size: int) -> range:
    return range(address // PAGE_SIZE, (address + max(size, 1) - 1) // PAGE_SIZE + 1)


def _cut(pages: bytes, address: int, size: int) -> bytes:
    start = address % PAGE_SIZE
    return pages[start : start + size]
