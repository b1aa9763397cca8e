# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages of our own in a guest, above its memory, that no view shows it by their own gfns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from xenaltp2m.errors import InvalidArgumentError, XenError
from xenaltp2m.handle import UndoList
from xenaltp2m.signals import uninterruptible
from xenaltp2m.types import PAGE_SIZE, Access

if TYPE_CHECKING:
    from xenaltp2m.domain import Domain
    from xenaltp2m.view import View

_AT_ONCE = 16
NOTHING = b"\xff" * PAGE_SIZE
"""What a guest reads where there is no memory."""


class Shadows:
    """A sink, and shadows, hidden in every view."""

    def __init__(self, domain: Domain, views: Sequence[View], undo: UndoList) -> None:
        self._domain = domain
        self._backend = domain.xen.backend
        self._views = views
        self._undo = undo
        self._free: list[int] = []
        self._memory: dict[int, memoryview] = {}
        self._maps: list[list[memoryview]] = []
        self._sink = 0

    def __contains__(self, gfn: int) -> bool:
        return gfn in self._memory

    @uninterruptible
    def take(self) -> tuple[int, memoryview]:
        """Return a shadow that nobody uses, and its memory."""
        if not self._free:
            self._grow()
        gfn = self._free.pop()
        return gfn, self._memory[gfn]

    def give_back(self, gfn: int) -> None:
        """Have it for the next one; it is hidden again."""
        self._memory[gfn][:] = NOTHING
        self._free.append(gfn)

    @staticmethod
    def show_page(view: View, gfn: int) -> None:
        """Let a view show a page itself again, if it does not."""
        try:
            view.revert(gfn)
        except InvalidArgumentError:
            if gfn in view.remaps:
                raise

    def show(self, view: View, gfn: int, shadow: int, undo: UndoList) -> None:
        """Let a view show a shadow instead of a page; nobody may use it yet.

        The remapped page gets the rights that its new gfn has: none for now. That gfn has to show
        the shadow meanwhile, which looks like nothing, still.
        """
        undo.push("", partial(self.hide, view, shadow))
        view.revert(shadow)
        view.set_access(shadow, Access.N)
        view.remap(gfn, shadow, access=Access.N)
        undo.push("", partial(self.show_page, view, gfn))
        self.hide(view, shadow)

    def hide(self, view: View, gfn: int) -> None:
        """Let a view show the sink instead."""
        view.remap(gfn, self._sink, access=Access.R)

    def hide_all(self, view: View) -> None:
        """The same in a view that is new."""
        if self._sink:
            view.set_access(self._sink, Access.R)
        for gfn in self._memory:
            if gfn != self._sink:
                self.hide(view, gfn)

    def is_hidden(self, gfn: int) -> bool:
        """Whether every view has the rights there that belong to the sink."""
        return all(view.access(gfn) == Access.R for view in self._views)

    def are_hidden(self) -> bool:
        """The same of all of them and the sink."""
        return all(self.is_hidden(gfn) for gfn in self._memory)

    def abandon(self) -> None:
        """Let go of the mappings: the domain is gone."""
        for pages in list(self._maps):
            with suppress(XenError):
                self._unmap(pages)

    @uninterruptible
    def _unmap(self, pages: list[memoryview]) -> None:
        self._backend.foreignmemory_unmap(pages)
        self._maps = [others for others in self._maps if others is not pages]

    def _remove(self, gfns: range) -> None:
        """Take pages back; where they lie among the remap targets of others' views, later.

        The domain's end takes them back, with all that was added to it.
        """
        if not any(view for gfn in gfns for view in self._domain._tracking(gfn)):
            self._domain.remove_pages(gfns)

    def _grow(self) -> None:
        """Add some. The domain stands still, for until they are hidden they can be seen."""
        with self._domain.paused():
            pages = self._add()
            shadows = list(pages)
            sink = self._sink or shadows[0]
            if not self._sink:
                del shadows[0]
            for view in self._views:
                view.set_access(sink, Access.R)
                for gfn in shadows:
                    view.remap(gfn, sink, access=Access.R)
            self._sink = sink
            self._free += reversed(shadows)

    def _add(self) -> dict[int, memoryview]:
        """Add pages that no view lets a guest touch; what fails after that leaves them so.

        They cannot be taken back any more once one is remapped: Xen would reset the view.
        """
        domain, backend, domid = self._domain, self._backend, int(self._domain.domid)
        undo = UndoList()
        try:
            gfns = domain.add_pages(_AT_ONCE)
            undo.push("", partial(self._remove, gfns))
            pages = backend.foreignmemory_map(domid, True, gfns)
            self._maps.append(pages)
            undo.push(
                f"mapping of gfns {gfns.start:#x}..{gfns.stop - 1:#x} of domain {domid}",
                partial(self._unmap, pages),
            )
            for page in pages:
                page[:] = NOTHING
            for view in self._views:
                view.set_access(gfns, Access.N)
        except BaseException as error:
            undo.roll_back(error, self._undo)
            raise
        self._undo.adopt(undo)
        added = dict(zip(gfns, pages, strict=True))
        self._memory.update(added)
        return added
