# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pages a command is about, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence

import xenaltp2m as xa
from xenaltp2m.cli.console import Console
from xenaltp2m.symbols import Image, Segment, Symbol

_MOST_PAGES_OF_A_SYMBOL = 1 << 16


def pages(image: Image, symbols: Sequence[Symbol]) -> list[int]:
    """The gfns of all symbols, few enough to count: sizes are whatever the image says."""
    gfns: set[int] = set()
    for symbol in symbols:
        own = image.gfns(symbol.name)
        if len(own) > _MOST_PAGES_OF_A_SYMBOL:
            raise xa.SymbolError(
                f"{image.name}: {symbol.name!r} has {len(own)} pages; "
                f"at most {_MOST_PAGES_OF_A_SYMBOL} can be protected"
            )
        gfns.update(own)
    return sorted(gfns)


def check_loaded(domain: xa.Domain, image: Image, symbol: Symbol, console: Console) -> bool | None:
    """Warn where the guest's memory is not what the image says.

    Returns:
        Whether it is; None where the guest may write to it.
    """
    segment = image.segment(symbol)
    if segment.writable:
        return None
    found = domain.memory.read(image.physical(symbol), symbol.size)
    if found == _content(segment, symbol):
        return True
    console.warn(f"the memory of {symbol.name} in the guest is not what {image.name} has")
    return False


def _content(segment: Segment, symbol: Symbol) -> bytes:
    start = symbol.address - segment.virtual
    return segment.data[start : start + symbol.size].ljust(symbol.size, b"\0")


def run_of_gfns(first: int, count: int) -> str:
    """Show neighbouring gfns."""
    return f"{first:#x}" if count == 1 else f"{first:#x}..{first + count - 1:#x}"


def counted(number: int, noun: str) -> str:
    """Show how many there are of something."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
