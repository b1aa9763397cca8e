# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pages a command is about: as its arguments name them, and as they are shown."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence

import xenaltp2m as xa
from xenaltp2m.cli.console import Console
from xenaltp2m.symbols import Image, Segment, Symbol

MOST_PAGES_OF_A_SYMBOL = 1 << 16

_ACCESSES = {
    name: xa.Access[name.upper()]
    for name in ("n", "r", "x", "rw", "rx", "rwx", "rx2rw", "n2rwx", "r_pw")
}


def access_among(names: Iterable[str]) -> Callable[[str], xa.Access]:
    """Return what turns an argument into one of these accesses."""
    known = list(names)

    def access(text: str) -> xa.Access:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return _ACCESSES[text]

    return access


def seconds(text: str) -> float:
    """Turn an argument into a time."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return found


def number_among(text: str, among: range, what: str) -> int:
    """Turn an argument into one of these numbers."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if number not in among:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def pages(image: Image, symbols: Sequence[Symbol]) -> list[int]:
    """The gfns of all symbols, few enough to count: sizes are whatever the image says."""
    gfns: set[int] = set()
    for symbol in symbols:
        own = image.gfns(symbol.name)
        if len(own) > MOST_PAGES_OF_A_SYMBOL:
            raise xa.SymbolError(
                f"{image.name}: {symbol.name!r} has {len(own)} pages; "
                f"at most {MOST_PAGES_OF_A_SYMBOL} can be protected"
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
