# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bound how much is read of a file, whatever its tables refer to."""

from __future__ import annotations

from typing import IO, Any

from xenaltp2m.errors import SymbolError

MAX_STEPS = 1 << 26
"""Reads of a few bytes in one search by pyelftools: a minute or two."""


class Meter:
    """Counts reads of streams, because tables may refer to the same bytes again and again.

    Attributes:
        left: The steps left; below 0 there were too many.
    """

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start counting."""
        self.left = MAX_STEPS

    def on(self, stream: IO[bytes]) -> Any:
        """Return a stream for pyelftools whose reads are counted."""
        return _Metered(stream, self)


class _Metered:
    __slots__ = ("_meter", "_stream", "seek")

    def __init__(self, stream: IO[bytes], meter: Meter) -> None:
        self._stream, self._meter, self.seek = stream, meter, stream.seek

    def tell(self) -> int:
        self._step(1)
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        self._step(1 + (min(size, 64) >> 2))  # names are read 64 bytes at a time, and cached
        return self._stream.read(size)

    def _step(self, steps: int) -> None:
        self._meter.left -= steps
        if self._meter.left < 0:
            raise SymbolError("there is too much to read")
