# SPDX-License-Identifier: LGPL-2.1-or-later
"""Breakpoints, patches and watchpoints, and the hits that their callbacks are called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, Unpack

from xenaltp2m.abi.x86 import Fault
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.memory import AddressSpace, Memory
from xenaltp2m.types import PAGE_SHIFT, VcpuId
from xenaltp2m.values.events import Event, Registers
from xenaltp2m.values.responses import RESUME, RegisterValues

_MOST_LOOKS = 16
_IN_REGISTERS = "rdi", "rsi", "rdx", "rcx", "r8", "r9"
_MOST_ARGUMENTS = 256


class Owner(Protocol):
    """What a breakpoint, a patch or a watchpoint needs of its ``Breakpoints``."""

    @property
    def memory(self) -> Memory:
        """The guest's memory."""

    def holds(self, one: Breakpoint | Patch | Watchpoint) -> bool:
        """Return whether a breakpoint, a patch or a watchpoint is inserted."""

    def insert(
        self, address: int, callback: Callback, /, *, each_iteration: bool = ...
    ) -> Breakpoint:
        """Insert a breakpoint."""

    def watch(
        self, address: int, length: int, /, *, after: WatchpointCallback | None = ...
    ) -> Watchpoint:
        """Insert a watchpoint."""

    def remove(self, unwanted: Breakpoint | Patch | Watchpoint, /) -> None:
        """Remove a breakpoint, a patch or a watchpoint."""

    def forget_virtual(self, one: VirtualBreakpoint) -> None:
        """Stop following a removed breakpoint's page tables."""


class WatchedUse(Protocol):
    """An instruction's use of watched bytes; its attributes are those of a hit."""

    watchpoint: Watchpoint
    address: int
    length: int | None
    written: bool
    certain: bool
    start: int
    old: bytes


class _Stop:
    """A vCPU that waits for a response.

    Attributes:
        event: The event from the monitor.
    """

    __slots__ = ("_registers", "event")

    def __init__(self, event: Event, registers: dict[str, int]) -> None:
        self.event = event
        self._registers = registers

    @property
    def vcpu(self) -> VcpuId:
        """The vCPU."""
        return self.event.vcpu

    @property
    def registers(self) -> Registers:
        """The vCPU's registers."""
        return self.event.registers

    def set_registers(self, **values: Unpack[RegisterValues]) -> None:
        """Set registers by name. With ``rip``, the vCPU continues there and skips this instruction.

        Raises:
            InvalidArgumentError: There is no such register, or the value does not fit into it.
        """
        self._registers.update(RESUME.with_registers(**values).registers)

    def stop(self) -> None:
        """End the monitor's loop after this response: see :meth:`Monitor.stop`."""
        if self.event.monitor is not None:
            self.event.monitor.stop()


class Hit(_Stop):
    """A vCPU that is about to execute the instruction of a breakpoint, and waits.

    Attributes:
        breakpoint: The breakpoint.
    """

    __slots__ = ("breakpoint",)

    def __init__(self, hit: Breakpoint, event: Event, registers: dict[str, int]) -> None:
        super().__init__(event, registers)
        self.breakpoint = hit

    def __repr__(self) -> str:
        return f"<Hit of {self.breakpoint!r} by vCPU {self.vcpu}>"

    def argument(self, number: int) -> int:
        """Return an argument of the function that begins at the breakpoint, by the System V ABI.

        In 64-bit code the first six are in rdi, rsi, rdx, rcx, r8 and r9, the others on the stack.
        In other code all are on the stack, each of the size of an address.

        Args:
            number: The argument's number, from 0.

        Raises:
            InvalidArgumentError: The number is not valid.
            NotMappedError: The stack is not mapped.
        """
        if not isinstance(number, int) or not 0 <= number < _MOST_ARGUMENTS:
            raise InvalidArgumentError(f"an argument is 0 to {_MOST_ARGUMENTS - 1}, not {number!r}")
        registers, size = self.registers, self.registers.word_size
        on_stack = number
        if size == 8:
            if number < len(_IN_REGISTERS):
                return int(getattr(registers, _IN_REGISTERS[number]))
            on_stack -= len(_IN_REGISTERS)
        space = self.breakpoint.owner.memory.address_space(registers)
        return space.read_number(registers.rsp_va + (1 + on_stack) * size, size)


class WatchpointHit(_Stop):
    """A vCPU that is about to access watched memory, or just has, and waits.

    Each execution of an instruction is one hit of a watchpoint, however much of it is used.

    Attributes:
        watchpoint: The watchpoint.
        address: The guest-physical address at which the access begins; it may be before the
            watched bytes. Of several accesses, the first write, or the first read if there is none.
        length: The number of bytes of the access; None if unknown.
        written: Whether the access is a write; it may read as well.
        certain: Whether the access is known to reach the watched bytes. It is not if the access
            begins before them and its length is unknown; the package capstone finds the length.
        executed: Whether the instruction has executed. Always true in ``after``; in ``before`` if
            the access was found only afterwards, by comparing memory.
        start: The guest-physical address of the bytes in ``old`` and ``new``.
        old: The watched bytes that the instruction uses, before it executes.
        new: The same bytes after it has executed; None if it has not.
    """

    __slots__ = (
        "address", "certain", "executed", "length", "new", "old", "start", "watchpoint", "written",
    )  # fmt: skip

    def __init__(
        self, use: WatchedUse, event: Event, registers: dict[str, int], new: bytes | None = None
    ) -> None:
        super().__init__(event, registers)
        self.watchpoint = use.watchpoint
        self.address, self.length, self.written = use.address, use.length, use.written
        self.certain, self.executed = use.certain, new is not None
        self.start, self.old, self.new = use.start, use.old, new

    def __repr__(self) -> str:
        return f"<WatchpointHit of {self.watchpoint!r} by vCPU {self.vcpu}>"


Callback: TypeAlias = Callable[[Hit], object]
"""Called with each hit of a breakpoint; its result is ignored."""
WatchpointCallback: TypeAlias = Callable[[WatchpointHit], object]
"""Called with each hit of a watchpoint; its result is ignored."""


class Breakpoint:
    """A breakpoint in the guest's code. Made by :meth:`Breakpoints.insert`.

    Attributes:
        address: The guest-physical address.
        hits: The number of hits.
        each_iteration: Whether each iteration of a repeated string instruction is a hit.
    """

    def __init__(
        self, owner: Owner, address: int, callback: Callback, each_iteration: bool = False
    ) -> None:
        self.owner = owner
        self.address = address
        self.callback = callback
        self.each_iteration = each_iteration
        self.hits = 0

    def __repr__(self) -> str:
        return f"<Breakpoint at {self.address:#x}>"

    @property
    def inserted(self) -> bool:
        """Whether it is still inserted."""
        return self.owner.holds(self)

    def remove(self) -> None:
        """Remove it; calling it again is harmless."""
        self.owner.remove(self)


class Patch:
    """Code that the guest executes but does not read. Made by :meth:`Breakpoints.patch`.

    Attributes:
        address: The guest-physical address of the first byte.
        code: The bytes that are executed.
        pieces: The code split at page boundaries, each piece with its guest-physical address.
    """

    def __init__(self, owner: Owner, pieces: Sequence[tuple[int, bytes]]) -> None:
        self.owner = owner
        self.address = pieces[0][0]
        self.pieces = tuple(pieces)
        self.code = b"".join(code for _, code in pieces)

    def __repr__(self) -> str:
        return f"<Patch of {len(self.code)} bytes at {self.address:#x}>"

    def overlaps(self, address: int, length: int) -> bool:
        """Return whether a range of guest-physical memory overlaps the bytes it replaces."""
        return any(at < address + length and address < at + len(code) for at, code in self.pieces)

    @property
    def inserted(self) -> bool:
        """Whether it is still inserted."""
        return self.owner.holds(self)

    def remove(self) -> None:
        """Remove it: the guest executes its own code again; calling it again is harmless."""
        self.owner.remove(self)


class Watchpoint:
    """A watched range of the guest's memory. Made by :meth:`Breakpoints.watch`.

    Attributes:
        address: The guest-physical address.
        length: The number of bytes.
        reads: Whether reads are reported, too.
        each_iteration: Whether each iteration of a repeated string instruction is reported.
        hits: The number of accesses to the bytes.
        passed: The number of accesses of the same kind to other bytes of their pages.
    """

    def __init__(
        self,
        owner: Owner,
        address: int,
        length: int,
        reads: bool,
        before: WatchpointCallback | None,
        after: WatchpointCallback | None,
        each_iteration: bool,
    ) -> None:
        self.owner = owner
        self.address, self.length, self.reads = address, length, reads
        self.each_iteration = each_iteration
        self.before, self.after = before, after
        self.hits = self.passed = 0

    def __repr__(self) -> str:
        return f"<Watchpoint of {self.length} bytes at {self.address:#x}>"

    @property
    def end(self) -> int:
        """The address after its last byte."""
        return self.address + self.length

    @property
    def gfns(self) -> range:
        """The gfns of the pages that it is in."""
        return range(self.address >> PAGE_SHIFT, (self.end - 1 >> PAGE_SHIFT) + 1)

    @property
    def inserted(self) -> bool:
        """Whether it is still inserted."""
        return self.owner.holds(self)

    def read(self) -> bytes:
        """Read the current content of the bytes."""
        return self.owner.memory.read(self.address, self.length)

    def remove(self) -> None:
        """Remove it; calling it again is harmless."""
        self.owner.remove(self)


class VirtualBreakpoint:
    """A breakpoint at a virtual address. Made by :meth:`Breakpoints.insert_va`.

    Attributes:
        address: The virtual address.
        space: The page tables that map it.
        physical: Its current guest-physical address; None while it is not mapped.
        hits: The number of hits.
        moves: The number of times that its mapping changed or was removed.
    """

    def __init__(
        self,
        owner: Owner,
        space: AddressSpace,
        address: int,
        callback: Callback,
        each_iteration: bool = False,
    ) -> None:
        self.owner = owner
        self.space, self.address, self.callback = space, address, callback
        self.each_iteration = each_iteration
        self.physical: int | None = None
        self.hits = self.moves = 0
        self._there: Breakpoint | None = None
        self._watches: dict[int, Watchpoint] = {}
        """The watchpoints of the page-table entries that map it, by their addresses."""

    def __repr__(self) -> str:
        return f"<VirtualBreakpoint at {self.address:#x} by cr3 {self.space.paging.cr3:#x}>"

    def remove(self) -> None:
        """Remove it, and its page-table watchpoints; calling it again is harmless."""
        undo = UndoList()
        for watch in self._watches.values():
            undo.push("", watch.remove)
        if self._there is not None:
            undo.push("", self._there.remove)
        undo.unwind(f"removing {self!r}")
        self.owner.forget_virtual(self)
        self._watches.clear()
        self._there = self.physical = None

    def _hit(self, hit: Hit) -> None:
        self.hits += 1
        self.callback(hit)

    def follow(self, _touch: WatchpointHit | None = None) -> None:
        """Move to the current translation and watch the page-table entries leading there.

        Entries may be written while others are read, so the walk is repeated until all entries that
        were read are watched.
        """
        for _ in range(_MOST_LOOKS):
            entries, physical = self._look()
            new = entries.keys() - self._watches.keys()
            for entry in new:
                self._watches[entry] = self.owner.watch(entry, entries[entry], after=self.follow)
            if not new:
                break
        for entry in self._watches.keys() - entries.keys():
            self._watches.pop(entry).remove()
        if physical == self.physical:
            return
        before, self._there = self._there, None
        if before is not None:
            before.remove()
        self.moves += 1
        self.physical = None
        if physical is not None:
            self._there = self.owner.insert(physical, self._hit, each_iteration=self.each_iteration)
            self.physical = physical  # last: if the insertion fails, the next call retries

    def _look(self) -> tuple[dict[int, int], int | None]:
        """Walk the page tables; return the entries read, as sizes by address, and the result."""
        memory = self.owner.memory
        entries: dict[int, int] = {}

        def load(physical: int, size: int) -> int:
            value = int.from_bytes(memory.read(physical, size), "little")
            entries[physical] = size
            return value

        try:
            physical = self.space.paging.walk(self.address, load).physical
            memory.read(physical, 1)
        except (Fault, InvalidArgumentError):
            return entries, None
        return entries, physical
