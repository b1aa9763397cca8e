# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of a page that has breakpoints or patches, or that precedes one."""

from __future__ import annotations

from collections.abc import Callable

from xenaltp2m.tools.breakpoints.hooks import Breakpoint
from xenaltp2m.tools.breakpoints.patches import Copy, Patched
from xenaltp2m.types import PAGE_SIZE

INT3 = 0xCC
BEFORE = 14
"""An instruction that begins at most so many bytes before an address may reach it."""


def _nothing_to_do() -> None: ...


class Mapped:
    """A page of the guest, mapped read-only."""

    __slots__ = ("_unmap", "memory")

    def __init__(self, memory: memoryview, unmap: Callable[[], None]) -> None:
        self.memory, self._unmap = memory, unmap

    def unmap(self) -> None:
        """Unmap it; calling it again is harmless."""
        self._unmap()
        self._unmap = _nothing_to_do

    def map_again(self, memory: memoryview, unmap: Callable[[], None]) -> None:
        """Replace the mapping, because the gfn may have another frame now."""
        self.unmap()
        self.memory, self._unmap = memory, unmap


class Page(Mapped, Patched):
    """A page with breakpoints or patches.

    Attributes:
        shadow_gfn: The gfn of its shadow; 0 if it has none.
        shadow: The shadow's memory.
        armed: Whether the shadow is up to date, and may be executed.
        hooks: Its breakpoints, by offset.
        before: The bytes before each breakpoint, in this page, when it was inserted.
        leads: The pages that precede this one, for breakpoints near its start, by gfn.
        guess: The one of them that is only assumed, until a vCPU's page tables are seen.
        inside: Offsets that were found to be inside an instruction.
        patches: Its patches, by offset.
        copy: The copy that the view ``used`` may map, if there are patches.
    """

    __slots__ = (
        "armed", "before", "copy", "guess", "hooks", "inside", "leads", "patches", "shadow",
        "shadow_gfn",
    )  # fmt: skip

    def __init__(
        self, memory: memoryview, shadow_gfn: int, shadow: memoryview, unmap: Callable[[], None]
    ) -> None:
        super().__init__(memory, unmap)
        self.shadow_gfn, self.shadow = shadow_gfn, shadow
        self.armed = False
        self.hooks: dict[int, list[Breakpoint]] = {}
        self.before: dict[int, bytes] = {}
        self.leads: dict[int, Lead] = {}
        self.guess: int | None = None
        self.inside: set[int] = set()
        self.patches: dict[int, bytes] = {}
        self.copy: Copy | None = None

    def take_over(self, other: Page) -> None:
        """Take the breakpoints and patches that the page had before a migration."""
        self.hooks, self.before, self.inside = other.hooks, other.before, other.inside
        self.guess, self.patches = other.guess, other.patches

    def add(self, offset: int, made: Breakpoint) -> bool:
        """Add a breakpoint; return whether it is the first at its offset."""
        if offset in self.hooks:
            self.hooks[offset].append(made)
            return False
        self.hooks[offset] = [made]
        self.before[offset] = bytes(self.memory[start_of(offset) : offset])
        return True

    def discard(self, offset: int, unwanted: Breakpoint) -> bool:
        """Remove a breakpoint; return whether it was the last at its offset."""
        self.hooks[offset].remove(unwanted)
        if self.hooks[offset]:
            return False
        del self.hooks[offset], self.before[offset]
        self.inside.discard(offset)
        return True

    def can_be_armed(self) -> bool:
        """Return whether each breakpoint is where an instruction begins, as far as is known.

        Bytes that are not executed do not count: patches replace them.
        """
        return (
            not self.inside
            and all(
                self.executed(start_of(at), at) == self.patched(before, start_of(at))
                for at, before in self.before.items()
            )
            and all(lead.is_as_it_was() for lead in self.leads.values())
        )

    def fill(self) -> None:
        """Bring the shadow up to date."""
        content = bytearray(self.executed(0, PAGE_SIZE))
        for offset in self.hooks:
            content[offset] = INT3
        self.shadow[:] = content


class Lead(Mapped):
    """The page before one with breakpoints: instructions that begin in it may reach the other.

    Attributes:
        ends: The bytes at its end on insertion, by a breakpoint's offset in the page after it.
    """

    __slots__ = ("ends",)

    def __init__(self, memory: memoryview, unmap: Callable[[], None]) -> None:
        super().__init__(memory, unmap)
        self.ends: dict[int, bytes] = {}

    def note(self, offset: int) -> None:
        """Record the bytes in which an instruction may begin that reaches a breakpoint."""
        self.ends.setdefault(offset, bytes(self.memory[offset - BEFORE :]))

    def is_as_it_was(self) -> bool:
        """Return whether these bytes are unchanged."""
        return all(self.memory[at - BEFORE :] == end for at, end in self.ends.items())


def start_of(offset: int) -> int:
    """Return the first offset at which an instruction may begin that reaches an offset."""
    return max(offset - BEFORE, 0)
