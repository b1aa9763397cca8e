# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mapping of guest memory into this process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from xenaltp2m.backend.libxc import clib
from xenaltp2m.backend.libxc.checks import as_domid, as_flag
from xenaltp2m.backend.libxc.clib import NULL, checked, ffi, refusal
from xenaltp2m.backend.libxc.mapped_pages import MappedPages
from xenaltp2m.backend.mapping import Mapping
from xenaltp2m.types import PAGE_SIZE

_PROT_READ, _PROT_WRITE = 1, 2  # <sys/mman.h>, Linux


class ForeignMemory(MappedPages):
    """Mapping of guest memory."""

    def foreignmemory_map(
        self, domid: int, writable: bool, gfns: Sequence[int]
    ) -> list[memoryview]:
        """``xenforeignmemory_map``; read-only views where the pages are mapped read-only."""
        as_domid(domid)
        frames = clib.copy_gfns("foreignmemory_map", gfns)
        protection = _PROT_READ | (_PROT_WRITE if as_flag("writable", writable) else 0)
        handle, count = self._foreignmemory_handle(), len(frames)
        # No array for each page's error: all pages, or none and the first one's errno.
        address = self._foreignmemory.xenforeignmemory_map(
            handle, domid, protection, count, frames, NULL
        )
        if address == NULL:
            raise refusal("xenforeignmemory_map", domid=domid)
        function = "xenforeignmemory_unmap"
        call = self._foreignmemory.xenforeignmemory_unmap
        unmap = partial(checked, function, call, handle, address, count)
        mapping = Mapping(ffi.buffer(address, count * PAGE_SIZE), writable=writable, unmap=unmap)
        self._mappings[id(mapping.pages)] = mapping
        return mapping.pages

    def foreignmemory_unmap(self, pages: list[memoryview]) -> None:
        """``xenforeignmemory_unmap``.

        Raises:
            BusyError: Slices of the views are alive; release them and call again.
        """
        self._unmap("foreignmemory_unmap", pages)
