# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether an instruction begins where a breakpoint is wanted: int3 elsewhere corrupts the guest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from xenaltp2m.errors import InvalidArgumentError, NotMappedError, PlacementWarning
from xenaltp2m.instructions import decoded

if TYPE_CHECKING:
    from xenaltp2m.symbols import Symbols

_LONGEST_INSTRUCTION = 15
_MOST_BYTES = 1 << 16
"""Of a function, so many are decoded."""


def check_placement(
    symbols: Symbols, address: int, read: Callable[[int, int], bytes], size: int
) -> None:
    """Refuse data, and a place inside an instruction, by decoding from the function's start.

    Warns with :class:`PlacementWarning` where that is not known.

    Args:
        symbols: Where functions begin, slide included.
        address: Linear.
        read: Reads the guest's memory: linear address, bytes.
        size: Bytes of an address in the code: :attr:`Registers.word_size`.

    Raises:
        InvalidArgumentError: It is data, or inside an instruction.
    """
    found = symbols.locate(address)
    if found is not None and found.symbol.is_data and found.offset <= max(found.symbol.size - 1, 0):
        raise InvalidArgumentError(
            f"{found} is data: nothing executes it, and an int3 would change it",
            hint=("Breakpoints.watch tells who uses data",),
        )
    if found is not None and not found.offset:
        return
    unknown = f"{symbols.name} has nothing there"
    if found is not None:
        code = _code(read, address - found.offset, found.offset)
        instructions = decoded(code, size) if code else []
        for one in instructions or ():
            if one.start == found.offset:
                return
            if found.offset in one:
                raise InvalidArgumentError(
                    f"{found} is inside the instruction at {found.symbol.name}+{one.start:#x}",
                    hint=("an int3 there would be part of that instruction: name its beginning",),
                )
        unknown = f"the code from {found.symbol.name} on cannot be decoded or read to there"
        if instructions is None:
            unknown = "the package capstone would tell: pip install 'xenaltp2m[decode]'"
    warnings.warn(
        f"an instruction has to begin at {address:#x}, which is not known: {unknown}",
        PlacementWarning,
        stacklevel=3,
    )


def _code(read: Callable[[int, int], bytes], start: int, size: int) -> bytes:
    """Read a function up to a place, and the instruction there if it can be read."""
    for length in (size + _LONGEST_INSTRUCTION, size):
        with suppress(NotMappedError):
            return read(start, min(length, _MOST_BYTES))
    return b""
