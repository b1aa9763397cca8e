# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the guest-physical address of a symbol, once the symbols are known to match the guest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xenaltp2m.abi.x86 import CR0_PG
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.memory import Memory
from xenaltp2m.handles.vcpu import registers_of
from xenaltp2m.tools.breakpoints.placement import check_placement
from xenaltp2m.values.arguments import check_number

if TYPE_CHECKING:
    from xenaltp2m.tools.symbols import Symbol, Symbols


def physical_place(
    context: DomainContext, place: int | str | Symbol, symbols: Symbols | None, *, trust: bool
) -> Callable[[int], int]:
    """Find the guest-physical address of a place; a name is resolved by the current page tables.

    Args:
        context: The domain.
        place: A guest-physical address; or a name in ``symbols``; or a symbol.
        symbols: Resolves names.
        trust: Whether to skip comparing the symbols with the guest's memory.

    Returns:
        A function from an offset, counted from the first byte, to a guest-physical address.
    """
    if isinstance(place, int):
        check_number("address", place)
        return place.__add__
    from xenaltp2m.tools.symbols import (
        Image,
        Symbol,
        fingerprint,  # imported late: most programs have no symbols
    )

    if isinstance(place, Symbol):
        va = place.address + (symbols.slide if symbols is not None else 0)
        place = f"{place.address:#x}"
    elif not isinstance(place, str):
        raise InvalidArgumentError(
            f"an address is a number, a Symbol, or with symbols= a name; not {place!r}"
        )
    elif symbols is None:
        raise InvalidArgumentError(
            f"{place!r} is a name, and no symbols are given to resolve it",
            hint=("pass symbols=Symbols.open(FILE)",),
        )
    else:
        va = symbols.address(place)
    memory, registers = Memory(context), registers_of(context)
    to_physical: Callable[[int], int] = int
    if registers.cr0 & CR0_PG:
        space = memory.kernel_space(registers)

        def to_physical(address: int) -> int:
            return space.translate(address).physical

    elif isinstance(symbols, Image):
        to_physical = symbols.physical_of
    to_physical(va)  # raises if nothing is mapped
    if symbols is not None and not trust:
        fingerprint.check(memory, symbols, [place], registers)
        read = fingerprint.reader(memory, symbols, registers)
        check_placement(symbols, va, read, registers.word_size)
    return lambda offset: to_physical(va + offset)
