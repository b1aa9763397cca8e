# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mapping of a modelled guest's memory."""

from __future__ import annotations

from collections.abc import Sequence
from errno import EINVAL

from xenaltp2m.backend.mock.calls import operation
from xenaltp2m.backend.mock.machine import HypercallError
from xenaltp2m.backend.mock.mapped_frames import MappedFrames
from xenaltp2m.backend.mock.p2m import ANY_RAM_TYPES


class MemoryCalls(MappedFrames):
    """Mapping of guest memory."""

    @operation
    def foreignmemory_map(
        self, domid: int, writable: bool, gfns: Sequence[int]
    ) -> list[memoryview]:
        domain = self.machine.controlled(domid)
        frames = []
        if not gfns:
            raise HypercallError(EINVAL)
        for gfn in gfns:
            found = domain.host_lookup(gfn, populate=True, unshare=writable)
            if not found.valid or found.type not in ANY_RAM_TYPES:  # get_page_from_gfn
                raise HypercallError(EINVAL)
            frames.append(found.mfn)
        mapping = self._map(frames, writable=writable)
        self._mappings[id(mapping.pages)] = mapping, domain
        return mapping.pages

    @operation
    def foreignmemory_unmap(self, pages: list[memoryview]) -> None:
        self._unmap("foreignmemory_unmap", pages)
