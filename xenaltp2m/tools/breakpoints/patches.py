# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages with patches: the guest executes other bytes than it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from xenaltp2m.tools.breakpoints.shadow_pages import NOTHING


class Patched:
    """A page of the guest, with the patches that change what is executed in it."""

    __slots__ = ()

    memory: memoryview
    patches: Mapping[int, bytes]
    """The patches by their offsets."""

    def executed(self, start: int, stop: int) -> bytes:
        """Return a range of its bytes as they are executed."""
        # A copy: a slice of the mapping in a traceback's frame would keep it from being unmapped.
        return self.patched(bytes(self.memory[start:stop]), start)

    def patched(self, content: bytes | bytearray | memoryview, start: int) -> bytes:
        """Apply the patches to the given content of a part of the page."""
        if not self.patches:
            return bytes(content)
        found, stop = bytearray(content), start + len(content)
        for at, code in self.patches.items():
            low, high = max(at, start), min(at + len(code), stop)
            if low < high:
                found[low - start : high - start] = code[low - at : high - at]
        return bytes(found)

    def is_patched(self, start: int, stop: int) -> bool:
        """Return whether any byte of a range is patched."""
        return any(at < stop and start < at + len(code) for at, code in self.patches.items())


class Copy:
    """A copy of a page, in which an instruction of a patch is stepped.

    Attributes:
        gfn: Its gfn.
    """

    __slots__ = ("_memory", "_was", "gfn")

    def __init__(self, gfn: int, memory: memoryview) -> None:
        self.gfn, self._memory = gfn, memory
        self._was: bytes | None = None
        """The content it was filled with; None while it has no content of the page."""

    def fill(self, content: bytes | bytearray) -> None:
        """Set the content that the guest reads in it."""
        self._was = bytes(content)
        self._memory[:] = self._was

    def empty(self) -> None:
        """Make it look like a hole."""
        self._was = None
        self._memory[:] = NOTHING

    def written(self) -> Iterator[tuple[int, bytes]]:
        """Yield each changed range: offset and bytes; repeated unless all are taken."""
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
