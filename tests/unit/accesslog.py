# SPDX-License-Identifier: LGPL-2.1-or-later
"""What memory each instruction of a simulated machine uses, as the engine itself tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from xenaltp2m.abi.x86 import Segment
from xenaltp2m.backend.mock.engine import Seen
from xenaltp2m.types import PAGE_SIZE

from .machinecode import Computer

_REPEATED = {0xF2, 0xF3}


@dataclass
class Execution:
    """An instruction, or an event's delivery: where it was, and what it used."""

    rip: int
    uses: list[tuple[str, int, int]] = field(default_factory=list)
    """Kind, guest-physical address, bytes."""
    after: dict[int, bytes] = field(default_factory=dict)
    """Pages of interest behind it, by gfn."""

    def reaches(self, start: int, end: int, *, reads: bool) -> bool:
        """Whether it writes some bytes, or reads them."""
        return any(
            at < end and start < at + size
            for kind, at, size in self.uses
            if kind == "w" or (reads and kind == "r")
        )


class AccessLog:
    """Executes a machine instruction by instruction."""

    def __init__(self, computer: Computer) -> None:
        self._computer, self._cpu = computer, computer.processor
        lookup = computer.model.host.lookup
        self._gfns = {lookup(gfn).mfn: gfn for gfn in range(512) if lookup(gfn).valid}
        self._uses: list[tuple[str, int, int]] = []
        execution, memory, gates = self._cpu._execution, self._cpu._virtual, self._cpu._gates
        step, read, push = execution._step_engine, memory.read, gates._push

        def stepped(resolve: Any, on_access: Callable[[Seen], None] | None = None) -> Any:
            def log(seen: Seen) -> None:
                if on_access is not None:
                    on_access(seen)
                mfn, offset = divmod(seen.address, PAGE_SIZE)
                if mfn in self._gfns and seen.kind != "x":
                    self._note(seen.kind, self._gfns[mfn] * PAGE_SIZE + offset, seen.size)

            return step(resolve, log)

        def reading(va: int, size: int) -> bytes:
            self._note("r", va, size)
            return read(va, size)

        def pushing(frame: list[int], width: int, stack: Segment, top: int) -> int:
            top = push(frame, width, stack, top)
            self._note("w", stack.base + top, len(frame) * width)
            return top

        execution._step_engine = stepped  # type: ignore[method-assign]
        execution.run = lambda limit: stepped(memory.resolve)  # type: ignore[method-assign]
        memory.read = reading  # type: ignore[method-assign]
        gates._push = pushing  # type: ignore[method-assign]

    def _note(self, kind: str, address: int, size: int) -> None:
        """Note an access; paging is off, or maps each page to itself."""
        self._uses.append((kind, address, size))

    def run(self, gfns: range, most: int = 5000) -> list[Execution]:
        """Execute to the end; the iterations of a string instruction are one execution."""
        done: list[Execution] = []
        again = False
        computer, cpu = self._computer, self._cpu
        for _ in range(most):
            if not computer.model.runs(computer.vcpu):
                return done
            rip = computer.register("rip")
            self._uses = []
            cpu.step(1)
            if again and done[-1].rip == rip:
                done[-1].uses += self._uses
            else:
                done.append(Execution(rip, self._uses))
            done[-1].after = {gfn: bytes(computer.page(gfn)) for gfn in gfns}
            prefixes = computer.read(rip, 2)
            again = computer.register("rip") == rip and bool(_REPEATED & {*prefixes})
        raise AssertionError("it does not end")
