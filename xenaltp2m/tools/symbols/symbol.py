# SPDX-License-Identifier: LGPL-2.1-or-later
"""A symbol's name, address, size and kind, and the loaded segments of an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

MAX_SYMBOLS = 1 << 20
"""A Linux kernel with all its local symbols has about a quarter of this."""

GLOBAL = 2
"""Ranks: 0 a local label, 1 a local function or object, 2 and 3 the same but global or weak."""


class Symbol(NamedTuple):
    """A symbol: a name for a place in the image."""

    name: str
    address: int
    """The virtual address; guest-physical if paging is off."""
    size: int
    """Bytes; 0 if the file does not contain it, as for labels in assembly."""
    is_data: bool = False
    """Whether the file marks it as data (STT_OBJECT; b, d and r in a kernel's list)."""


Found: TypeAlias = tuple[int, int, Symbol] | tuple[int, int, Symbol, str]
"""Address, rank, symbol, and maybe its origin."""


@dataclass(frozen=True, slots=True)
class Location:
    """An address, expressed by the symbol it lies in."""

    symbol: Symbol
    offset: int

    def __str__(self) -> str:
        return f"{self.symbol.name}+{self.offset:#x}" if self.offset else self.symbol.name


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the image that is loaded into memory."""

    address: int
    """The guest-physical load address."""
    virtual: int
    """The virtual address at which the guest's code uses it."""
    size: int
    """Bytes in memory: ``data``, then zeros."""
    data: bytes = field(repr=False)
    writable: bool
    executable: bool

    def holds(self, address: int, size: int = 1) -> bool:
        """Return whether a range of virtual addresses lies within."""
        return self.virtual <= address and address + size <= self.virtual + self.size

    def physical(self, address: int) -> int:
        """Return the guest-physical address of a virtual address."""
        return address - self.virtual + self.address


def text_of(data: bytes) -> str:
    """Decode a string of a file, up to its first NUL."""
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")
