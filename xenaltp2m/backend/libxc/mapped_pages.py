# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages of Xen's and of guests that this process has mapped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from xenaltp2m.backend import arguments
from xenaltp2m.backend.libxc.connection import Connection
from xenaltp2m.backend.libxc.loader import Loader
from xenaltp2m.backend.mapping import Mapping
from xenaltp2m.errors import ClosedError


class MappedPages(Connection):
    """The mapped pages that the caller has not unmapped."""

    def __init__(self, loader: Loader | None = None) -> None:
        self._mappings: dict[int, Mapping] = {}
        super().__init__(loader)

    def _held(self) -> list[Callable[[], object]]:
        return [*super()._held(), *(partial(m.close, "close") for m in self._mappings.values())]

    def _release_pages(self) -> None:
        super()._release_pages()
        for mapping in self._mappings.values():
            mapping.release()

    def _forget(self) -> None:
        super()._forget()
        self._mappings.clear()

    def _unmap(self, op: str, handed: object) -> None:
        if self._closed is not None:
            raise ClosedError(self._closed, op=op)
        mapping = self._mappings.get(id(handed))
        if mapping is None:
            raise arguments.unknown_mapping(op)
        mapping.close(op)
        del self._mappings[id(handed)]
