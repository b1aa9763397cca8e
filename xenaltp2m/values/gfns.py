# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check gfns, and convert them to the arrays that bulk calls take."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.types import GFN_LIMIT

Progress: TypeAlias = Callable[[int, int], None]
"""A progress callback of a long operation: called with (gfns done, gfns in all)."""

BATCH = 1 << 16
"""Gfns per bulk call. Xen preempts itself within a call; progress is reported between calls."""

_BLOCK = 1 << 16


def check_gfn(gfn: int) -> None:
    """Check that a value can be a gfn.

    Raises:
        InvalidArgumentError: It is not an integer in 0..2^36-1, the range of Xen's tables.
    """
    if not isinstance(gfn, int) or isinstance(gfn, bool):
        raise InvalidArgumentError(f"a gfn must be an integer, not {gfn!r}")
    if not 0 <= gfn < GFN_LIMIT:
        raise InvalidArgumentError(
            f"gfn {gfn:#x} is not in 0..{GFN_LIMIT - 1:#x}: a gfn is an address shifted right by 12"
        )


def gfn_array(gfns: Iterable[int]) -> array[int]:
    """Convert gfns to the array that bulk calls take.

    Raises:
        InvalidArgumentError: One of them cannot be a gfn.
    """
    if not isinstance(gfns, Iterable) or isinstance(gfns, str | bytes | bytearray):
        raise InvalidArgumentError(f"gfns must be an integer or an iterable of them, not {gfns!r}")
    if isinstance(gfns, range):
        check_gfns(gfns)
    else:
        gfns = list(gfns)
        if bool in set(map(type, gfns)):
            raise InvalidArgumentError("gfns must be integers, not booleans")
    try:
        found = array("Q", gfns)
    except (TypeError, OverflowError) as error:
        raise InvalidArgumentError(f"gfns must be integers in 0..2^36-1: {error}") from None
    if found and not isinstance(gfns, range):
        check_gfn(max(found))
    return found


def check_gfns(gfns: range) -> None:
    """Check that all numbers of a range can be gfns, before memory is allocated for them.

    Raises:
        InvalidArgumentError: One of them cannot be a gfn.
    """
    for gfn in (*gfns[:1], *gfns[-1:]):
        check_gfn(gfn)


def batches(gfns: range | array[int]) -> Iterator[memoryview]:
    """Yield gfns in arrays for bulk calls, :data:`BATCH` at a time.

    An array is valid until the next one is yielded. The arrays of a long range share one buffer, of
    which only the changing bytes are rewritten: making a million integers takes Python half the
    time that Xen takes to process them.
    """
    if not isinstance(gfns, range) or gfns.step != 1 or len(gfns) < _BLOCK or BATCH != _BLOCK:
        for first in range(0, len(gfns), BATCH):
            yield memoryview(gfn_array(gfns[first : first + BATCH]))
        return
    buffer = bytearray(array("Q", range(256)).tobytes()) * 256
    octets = memoryview(buffer)
    low = bytes(range(256))
    buffer[1::8] = bytearray().join([low[value : value + 1] * 256 for value in low])
    before = bytes(3)
    for base in range(gfns.start & -_BLOCK, gfns.stop, _BLOCK):
        upper = (base >> 16).to_bytes(3, "little")
        for at, value in enumerate(upper):
            if value != before[at]:
                buffer[2 + at :: 8] = bytearray([value]) * _BLOCK
        before = upper
        yield octets.cast("Q")[max(gfns.start - base, 0) : min(gfns.stop - base, _BLOCK)]


def neighbours(gfns: array[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of consecutive gfns as (first, last), in order, each gfn once."""
    first = last = None
    for gfn in sorted(set(gfns)):
        if first is None or last is None:
            first = gfn
        elif gfn != last + 1:
            yield first, last
            first = gfn
        last = gfn
    if first is not None and last is not None:
        yield first, last
