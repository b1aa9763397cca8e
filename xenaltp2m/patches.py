# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages that are executed otherwise than they read: with patches in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from xenaltp2m.shadows import NOTHING


class Patched:
    """A page of the guest's, and what is executed in it."""

    __slots__ = ()

    memory: memoryview
    patches: Mapping[int, bytes]
    """By offset."""

    def executed(self, start: int, stop: int) -> bytes:
        """Return some of its bytes as they are executed."""
        # A copy: what a frame of a traceback holds of a mapping would keep it from being unmapped.
        return self.patched(bytes(self.memory[start:stop]), start)

    def patched(self, content: bytes | bytearray | memoryview, start: int) -> bytes:
        """Put patches into what some of its bytes may be."""
        if not self.patches:
            return bytes(content)
        found, stop = bytearray(content), start + len(content)
        for at, code in self.patches.items():
            low, high = max(at, start), min(at + len(code), stop)
            if low < high:
                found[low - start : high - start] = code[low - at : high - at]
        return bytes(found)

    def is_patched(self, start: int, stop: int) -> bool:
        """Tell whether some of its bytes are."""
        return any(at < stop and start < at + len(code) for at, code in self.patches.items())


class Copy:
    """A copy of a page, in which an instruction of a patch is stepped.

    Attributes:
        gfn: Where it is.
    """

    __slots__ = ("_memory", "_was", "gfn")

    def __init__(self, gfn: int, memory: memoryview) -> None:
        self.gfn, self._memory = gfn, memory
        self._was: bytes | None = None
        """What it was filled with; None where it has nothing of the page."""

    def fill(self, content: bytes | bytearray) -> None:
        """Let it be read so."""
        self._was = bytes(content)
        self._memory[:] = self._was

    def empty(self) -> None:
        """Let it look like nothing."""
        self._was = None
        self._memory[:] = NOTHING

    def written(self) -> Iterator[tuple[int, bytes]]:
        """Yield what was written to it: offsets and bytes; again, unless all were taken."""
        before, now = self._was, bytes(self._memory)
        if before is None or now == before:
            return
        differs = [one != other for one, other in zip(now, before, strict=True)]
        start = 0
        for is_written, some in groupby(differs):
            stop = start + len(list(some))
            if is_written:
                yield start, now[start:stop]
            start = stop
        self._was = now
