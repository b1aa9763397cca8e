# SPDX-License-Identifier: LGPL-2.1-or-later
"""Foreign pages as memoryviews, unmapped only once nothing in Python can touch them any more.

A read through a slice of pages that were unmapped kills the process. ``memoryview.release`` does
not report slices, but the object that lends them all their memory lives as long as the last one.
"""

from __future__ import annotations

import contextlib
import errno
import weakref
from collections.abc import Callable
from pickle import PickleBuffer
from typing import Any

from xenaltp2m.errors import BusyError
from xenaltp2m.types import PAGE_SIZE


class Mapping:
    """Mapped pages.

    Attributes:
        whole: One view of all of them, where they are in one piece.
        pages: A view of each, slices of ``whole``.
    """

    def __init__(self, *memory: Any, writable: bool, unmap: Callable[[], None]) -> None:
        """Take charge of pages that were mapped.

        Args:
            *memory: Objects with the buffer interface over them, that nobody else holds.
            writable: Whether they may be written; a write to pages mapped read-only would fault.
            unmap: Undoes the mapping.
        """
        # A memoryview of a memoryview references what that one views, and not that one.
        views = [memoryview(PickleBuffer(one)) for one in memory]
        pieces = views if writable else [view.toreadonly() for view in views]
        self.whole = pieces[0]
        self.pages = [
            piece[start : start + PAGE_SIZE]
            for piece in pieces
            for start in range(0, piece.nbytes, PAGE_SIZE)
        ]
        self._views = (*self.pages, *pieces)  # a copy: the list of pages is the caller's
        self._memory = [weakref.ref(one) for one in memory]
        self._unmap = unmap

    def release(self) -> bool:
        """Release the views, and tell whether that leaves nothing that could touch the pages."""
        for view in self._views:
            with contextlib.suppress(BufferError):  # an array lies over it: it stays in use
                view.release()
        return all(memory() is None for memory in self._memory)

    def close(self, op: str) -> None:
        """Release the views and unmap the pages.

        Args:
            op: The operation, for the error.

        Raises:
            BusyError: Slices of the views are alive, so the pages stay mapped; again may succeed.
        """
        if not self.release():
            raise BusyError(
                f"{op}: the pages are still in use: slices of their views are alive",
                op=op,
                errno=errno.EBUSY,
                hint=("release() every slice and cast of the views, then unmap again",),
            )
        self._unmap()
