# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program of the mock's guest in ``watch``: access what is watched, for ever."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import count, islice

import xenaltp2m as xa
from xenaltp2m.backend.mock import (
    Access,
    Cpuid,
    Instruction,
    WriteControlRegister,
    WriteMsr,
)
from xenaltp2m.tools.symbols import Image, Segment

_MOST_TOUCHED = 8
_FIRST_HOME = 0x10
_LENGTH = 4
_WORD = bytes(4)


def program(
    pages: int, gfns: Collection[int], msrs: Sequence[int], image: Image | None
) -> list[Instruction]:
    """Make a program that fetches from, reads and writes pages, as the image allows, and registers.

    Args:
        pages: The number of the guest's pages.
        gfns: The watched gfns; the first few are accessed.
        msrs: The watched MSRs.
        image: The loaded image.
    """
    made = []
    addresses = count(_home(pages, gfns, image) * xa.PAGE_SIZE, _LENGTH)
    for gfn in islice((gfn for gfn in gfns if gfn < pages), _MOST_TOUCHED):
        start = gfn * xa.PAGE_SIZE
        segment = _segment(start, image)
        if segment is None or segment.executable:
            made.append(Instruction(start, _LENGTH))
        kinds = "rw" if segment is None or segment.writable else "r"
        made += [
            Instruction(next(addresses), _LENGTH, [Access(kind, start, _WORD)]) for kind in kinds
        ]
    made += [Instruction(next(addresses), _LENGTH, effect=effect) for effect in _effects(msrs)]
    return made


def _effects(msrs: Sequence[int]) -> Iterator[WriteControlRegister | WriteMsr | Cpuid]:
    for value in (0x1000, 0x2000):
        yield WriteControlRegister(int(xa.ControlRegister.CR3), value)
        for msr in msrs:
            yield WriteMsr(msr, value)
    yield Cpuid()


def _home(pages: int, gfns: Collection[int], image: Image | None) -> int:
    """Return the page of most instructions: the image's first, or else one not watched."""
    for segment in image.segments if image else ():
        if segment.executable:
            return segment.address // xa.PAGE_SIZE
    watched = frozenset(gfns)
    return next((gfn for gfn in range(_FIRST_HOME, pages) if gfn not in watched), _FIRST_HOME)


def _segment(address: int, image: Image | None) -> Segment | None:
    for segment in image.segments if image else ():
        if segment.address < address + xa.PAGE_SIZE and address < segment.address + segment.size:
            return segment
    return None
