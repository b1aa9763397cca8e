# SPDX-License-Identifier: LGPL-2.1-or-later
"""Breakpoints, patches and watches themselves, and what their callbacks are called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias, Unpack

from xenaltp2m.abi.x86 import Fault
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.events import Event, Registers
from xenaltp2m.handle import UndoList
from xenaltp2m.responses import RESUME, RegisterValues
from xenaltp2m.types import PAGE_SHIFT, VcpuId

if TYPE_CHECKING:
    from xenaltp2m.breakpoints import Breakpoints
    from xenaltp2m.executions import Use
    from xenaltp2m.memory import AddressSpace

_MOST_LOOKS = 16
_IN_REGISTERS = "rdi", "rsi", "rdx", "rcx", "r8", "r9"
_MOST_ARGUMENTS = 256


class _Stop:
    """A vCPU that waits.

    Attributes:
        event: What the monitor told.
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
        """Its registers."""
        return self.event.registers

    def set_registers(self, **values: Unpack[RegisterValues]) -> None:
        """Set registers by name. With ``rip`` the instruction there is the next, not this one.

        Raises:
            InvalidArgumentError: There is no such register, or the value does not fit into it.
        """
        self._registers.update(RESUME.with_registers(**values).registers)

    def stop(self) -> None:
        """End the monitor's loop once this is answered: see :meth:`Monitor.stop`."""
        if self.event._monitor is not None:
            self.event._monitor.stop()


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
        """Return an argument of the function that begins here, by the System V ABI.

        In 64-bit code the first six are in rdi, rsi, rdx, rcx, r8 and r9, the others on the stack;
        in other code all are on the stack, each of the size of an address.

        Args:
            number: Which; 0 is the first.

        Raises:
            InvalidArgumentError: That is no number of an argument.
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
        space = self.breakpoint._owner._domain.memory.address_space(registers)
        return space.read_number(registers.linear_rsp + (1 + on_stack) * size, size)


class Touch(_Stop):
    """A vCPU that is about to use memory that is watched, or just has, and waits.

    Each execution of an instruction is one touch of a watch, however much of it is used.

    Attributes:
        watch: The watch.
        address: Where the access begins, guest-physical: it may be before what is watched. Of
            several, that of the first write, or of the first read where there is none.
        length: How many bytes it has; None where that is not known.
        written: Whether it writes; it may read as well.
        certain: Whether it is known to reach what is watched. It is not where it begins before
            that, and nothing tells how long it is: the package capstone does.
        executed: Whether the instruction has executed. Always so in ``after``; in ``before`` where
            the access was found only afterwards, by comparing memory.
        start: Where the bytes of ``old`` and ``new`` are, guest-physical.
        old: The watched bytes that it uses, before the instruction.
        new: The same bytes after it; None if it has not executed.
    """

    __slots__ = (
        "address", "certain", "executed", "length", "new", "old", "start", "watch", "written",
    )  # fmt: skip

    def __init__(
        self, use: Use, event: Event, registers: dict[str, int], new: bytes | None = None
    ) -> None:
        super().__init__(event, registers)
        self.watch = use.watch
        self.address, self.length, self.written = use.address, use.length, use.written
        self.certain, self.executed = use.certain, new is not None
        self.start, self.old, self.new = use.start, use.old, new

    def __repr__(self) -> str:
        return f"<Touch of {self.watch!r} by vCPU {self.vcpu}>"


Callback: TypeAlias = Callable[[Hit], object]
"""Called with each hit of a breakpoint; what it returns says nothing."""
TouchCallback: TypeAlias = Callable[[Touch], object]
"""Called with each touch of what is watched; what it returns says nothing."""


class Breakpoint:
    """A place in the guest's code. Made by :meth:`Breakpoints.insert`.

    Attributes:
        address: Guest-physical.
        hits: How often it was hit.
        each_iteration: Whether each iteration of a repeated string instruction is a hit.
    """

    def __init__(
        self, owner: Breakpoints, address: int, callback: Callback, each_iteration: bool = False
    ) -> None:
        self._owner = owner
        self.address = address
        self.callback = callback
        self.each_iteration = each_iteration
        self.hits = 0

    def __repr__(self) -> str:
        return f"<Breakpoint at {self.address:#x}>"

    @property
    def inserted(self) -> bool:
        """Whether it is, still."""
        return self._owner._has(self)

    def remove(self) -> None:
        """Take it out; again is harmless."""
        self._owner.remove(self)


class Patch:
    """Code that the guest executes and does not read. Made by :meth:`Breakpoints.patch`.

    Attributes:
        address: Guest-physical, of the first byte.
        code: The bytes that are executed.
        pieces: The same, as they lie in pages: the guest-physical address of each piece.
    """

    def __init__(self, owner: Breakpoints, pieces: Sequence[tuple[int, bytes]]) -> None:
        self._owner = owner
        self.address = pieces[0][0]
        self.pieces = tuple(pieces)
        self.code = b"".join(code for _, code in pieces)

    def __repr__(self) -> str:
        return f"<Patch of {len(self.code)} bytes at {self.address:#x}>"

    def overlaps(self, address: int, length: int) -> bool:
        """Return whether some bytes of guest-physical memory are among those it replaces."""
        return any(at < address + length and address < at + len(code) for at, code in self.pieces)

    @property
    def inserted(self) -> bool:
        """Whether it is executed, still."""
        return self._owner._has_patch(self)

    def remove(self) -> None:
        """Have the guest's own code executed again; again is harmless."""
        self._owner.remove(self)


class Watch:
    """A range of bytes in the guest's memory. Made by :meth:`Breakpoints.watch`.

    Attributes:
        address: Guest-physical.
        length: Bytes.
        reads: Whether reads are told, too.
        each_iteration: Whether each iteration of a repeated string instruction is told.
        hits: How often it was used.
        passed: How often something else in its pages was, in the same way.
    """

    def __init__(
        self,
        owner: Breakpoints,
        address: int,
        length: int,
        reads: bool,
        before: TouchCallback | None,
        after: TouchCallback | None,
        each_iteration: bool,
    ) -> None:
        self._owner = owner
        self.address, self.length, self.reads = address, length, reads
        self.each_iteration = each_iteration
        self.before, self.after = before, after
        self.hits = self.passed = 0

    def __repr__(self) -> str:
        return f"<Watch of {self.length} bytes at {self.address:#x}>"

    @property
    def end(self) -> int:
        """The address behind its last byte."""
        return self.address + self.length

    @property
    def gfns(self) -> range:
        """The pages it is in."""
        return range(self.address >> PAGE_SHIFT, (self.end - 1 >> PAGE_SHIFT) + 1)

    @property
    def inserted(self) -> bool:
        """Whether it is, still."""
        return self._owner._watches(self)

    def read(self) -> bytes:
        """Read what is there now."""
        return self._owner._domain.memory.read(self.address, self.length)

    def remove(self) -> None:
        """Take it out; again is harmless."""
        self._owner.remove(self)


class LinearBreakpoint:
    """A breakpoint at a linear address. Made by :meth:`Breakpoints.insert_linear`.

    Attributes:
        address: Linear.
        space: The page tables it is meant in.
        physical: Where it is now; None while the tables lead nowhere.
        hits: How often it was hit.
        moves: How often the tables came to lead elsewhere, or nowhere.
    """

    def __init__(
        self,
        owner: Breakpoints,
        space: AddressSpace,
        address: int,
        callback: Callback,
        each_iteration: bool = False,
    ) -> None:
        self._owner = owner
        self.space, self.address, self.callback = space, address, callback
        self.each_iteration = each_iteration
        self.physical: int | None = None
        self.hits = self.moves = 0
        self._there: Breakpoint | None = None
        self._watches: dict[int, Watch] = {}
        """Of the entries that lead there, by their addresses."""

    def __repr__(self) -> str:
        return f"<LinearBreakpoint at {self.address:#x} by cr3 {self.space.paging.cr3:#x}>"

    def remove(self) -> None:
        """Take it out, and what watches the page tables for it; again is harmless."""
        undo = UndoList()
        for watch in self._watches.values():
            undo.push("", watch.remove)
        if self._there is not None:
            undo.push("", self._there.remove)
        undo.unwind(f"removing {self!r}")
        with suppress(ValueError):  # it was never followed, or is removed again
            self._owner._linear.remove(self)
        self._watches.clear()
        self._there = self.physical = None

    def _hit(self, hit: Hit) -> None:
        self.hits += 1
        self.callback(hit)

    def _follow(self, _touch: Touch | None = None) -> None:
        """Go where the tables lead now, and hear of it when they lead elsewhere.

        Entries may be written while their neighbours are looked at; so it is looked again until
        all that were read are watched.
        """
        for _ in range(_MOST_LOOKS):
            entries, physical = self._look()
            new = entries.keys() - self._watches.keys()
            for entry in new:
                self._watches[entry] = self._owner.watch(entry, entries[entry], after=self._follow)
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
            self._there = self._owner.insert(
                physical, self._hit, each_iteration=self.each_iteration
            )
            self.physical = physical  # not before: if that fails, it is tried again

    def _look(self) -> tuple[dict[int, int], int | None]:
        """Walk: the entries that were read, address and size, and where they lead."""
        memory = self._owner._domain.memory
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
