# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pages that a command works on, and their representation as text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby

import xenaltp2m as xa
from xenaltp2m.cli.console import Console
from xenaltp2m.tools.symbols import Image, Symbol

_MOST_PAGES_OF_A_SYMBOL = 1 << 16


def pages(image: Image, symbols: Sequence[Symbol]) -> list[int]:
    """Return the gfns of all symbols; raise if an image claims too many for one of them."""
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
    """Warn if the guest's memory differs from the image.

    Returns:
        Whether it is equal; None if the guest may write to it, or the image has only its symbols.
    """
    segment = image.segment(symbol)
    content = image.content(symbol.address, symbol.size)
    if segment.writable or content is None:
        return None
    found = domain.memory.read(image.physical(symbol), symbol.size)
    if found == content:
        return True
    console.warn(f"the memory of {symbol.name} in the guest differs from {image.name}")
    return False


def runs_of_gfns(gfns: Iterable[int]) -> list[str]:
    """Format gfns, which must be sorted; adjacent ones become a range."""
    runs = [
        [gfn for _, gfn in run]
        for _, run in groupby(enumerate(gfns), lambda numbered: numbered[1] - numbered[0])
    ]
    return [run_of_gfns(run[0], len(run)) for run in runs]


def check_gfns(domain: xa.Domain, gfns: Sequence[int]) -> None:
    """Refuse gfns above the domain's highest: these are often addresses.

    Args:
        domain: The domain.
        gfns: The gfns, sorted.

    Raises:
        InvalidArgumentError: There are some.
    """
    highest = domain.maximum_gfn
    beyond = gfns[bisect_right(gfns, highest) :]
    if beyond:
        shown = ", ".join(runs_of_gfns(beyond)[:4])
        raise xa.InvalidArgumentError(
            f"gfn {shown}: the highest gfn of domain {domain.domid} is {highest:#x}",
            domid=domain.domid,
            gfn=xa.Gfn(beyond[0]),
            hint=address_hint(beyond[0]),
        )


def address_hint(gfn: int) -> tuple[str, ...]:
    """Return a hint for a gfn without memory that may be meant as an address."""
    meant = gfn >> xa.PAGE_SHIFT
    return (f"was the address {gfn:#x} meant? its gfn is {meant:#x}",) if meant else ()


def run_of_gfns(first: int, count: int) -> str:
    """Format adjacent gfns."""
    return f"{first:#x}" if count == 1 else f"{first:#x}..{first + count - 1:#x}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Format a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"
