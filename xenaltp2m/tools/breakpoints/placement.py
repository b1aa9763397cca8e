# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check that an instruction begins at a breakpoint: int3 inside one corrupts the guest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from xenaltp2m.errors import InvalidArgumentError, NotMappedError, PlacementWarning
from xenaltp2m.tools.breakpoints.operand_size import decoded

if TYPE_CHECKING:
    from xenaltp2m.tools.symbols import Symbols

_LONGEST_INSTRUCTION = 15
_MOST_BYTES = 1 << 16
"""The most bytes of a function that are decoded."""


def check_placement(
    symbols: Symbols, address: int, read: Callable[[int, int], bytes], size: int
) -> None:
    """Refuse data, and a place inside an instruction, by decoding from the function's start.

    Warns with :class:`PlacementWarning` if the place cannot be checked.

    Args:
        symbols: Give the starts of functions, slide included.
        address: The virtual address.
        read: Reads the guest's memory: virtual address, number of bytes.
        size: Bytes of an address in the code: :attr:`Registers.word_size`.

    Raises:
        InvalidArgumentError: The place is data, or inside an instruction.
    """
    found = symbols.locate(address)
    if found is not None and found.symbol.is_data and found.offset <= max(found.symbol.size - 1, 0):
        raise InvalidArgumentError(
            f"{found} is data: it is never executed, and an int3 would change it",
            hint=("use Breakpoints.watch to see accesses to data",),
        )
    if found is not None and not found.offset:
        return
    unknown = f"{symbols.name} has no symbol there"
    if found is not None:
        code = _code(read, address - found.offset, found.offset)
        instructions = decoded(code, size) if code else []
        for one in instructions or ():
            if one.start == found.offset:
                return
            if found.offset in one:
                raise InvalidArgumentError(
                    f"{found} is inside the instruction at {found.symbol.name}+{one.start:#x}",
                    hint=("an int3 there would change that instruction: name its first byte",),
                )
        unknown = f"the code from {found.symbol.name} to there cannot be read or decoded"
        if instructions is None:
            unknown = "decoding needs the package capstone: pip install 'xenaltp2m[decode]'"
    warnings.warn(
        f"cannot check that an instruction begins at {address:#x}: {unknown}",
        PlacementWarning,
        stacklevel=3,
    )


def _code(read: Callable[[int, int], bytes], start: int, size: int) -> bytes:
    """Read a function up to a place, and the instruction at the place if it can be read."""
    for length in (size + _LONGEST_INSTRUCTION, size):
        with suppress(NotMappedError):
            return read(start, min(length, _MOST_BYTES))
    return b""
