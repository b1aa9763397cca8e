# SPDX-License-Identifier: LGPL-2.1-or-later
"""Frames of the modelled host that the caller has mapped."""

from __future__ import annotations

from xenaltp2m.backend import arguments
from xenaltp2m.backend.mapping import Mapping
from xenaltp2m.backend.mock.machine import Domain, Machine
from xenaltp2m.backend.mock.scheduler import Scheduler


class MappedFrames(Scheduler):
    """The mappings that the caller has not unmapped; they keep a dead domain's memory."""

    def __init__(self, machine: Machine, seed: int) -> None:
        super().__init__(machine, seed)
        self._mappings: dict[int, tuple[Mapping, Domain]] = {}

    def _map(self, frames: list[int], *, writable: bool) -> Mapping:
        pool = self.machine.frames
        for frame in frames:
            pool.pin(frame)

        def unmap() -> None:
            for frame in frames:
                pool.unpin(frame)

        return Mapping(*map(pool.page, frames), writable=writable, unmap=unmap)

    def _unmap(self, op: str, handed: object) -> None:
        if id(handed) not in self._mappings:
            raise arguments.unknown_mapping(op)
        self._give_back(op, id(handed))

    def _give_back(self, op: str, key: int) -> None:
        mapping, domain = self._mappings[key]
        mapping.close(op)
        del self._mappings[key]
        self._bury(domain)

    def _bury(self, domain: Domain) -> None:
        """Forget a dead domain once nobody maps its frames."""
        held = any(owner is domain for _, owner in self._mappings.values())
        if domain.dying and not held and self.machine.domains.get(domain.domid) is domain:
            for table in (self.machine.domains, self._monitors):
                table.pop(domain.domid, None)
            for processor in self._processors.pop(domain.domid, []):
                processor.close()
