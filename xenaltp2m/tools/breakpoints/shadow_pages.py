# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pool of shadow pages above guest RAM; every view maps their own gfns to the sink page."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from xenaltp2m.errors import InvalidArgumentError, XenError
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.pages import AddedPages
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.handles.view import View
from xenaltp2m.types import PAGE_SIZE, Access

_AT_ONCE = 16
NOTHING = b"\xff" * PAGE_SIZE
"""The content of a hole, as a guest reads it."""


class Shadows:
    """A sink page and shadow pages, hidden in every view."""

    def __init__(self, context: DomainContext, views: Sequence[View], undo: UndoList) -> None:
        self._context = context
        self._pages = AddedPages(context)
        self._backend = context.backend
        self._views = views
        self._undo = undo
        self._free: list[int] = []
        self._memory: dict[int, memoryview] = {}
        self._maps: list[list[memoryview]] = []
        self._sink = 0

    def __contains__(self, gfn: int) -> bool:
        return gfn in self._memory

    def check_not_one(self, gfn: int) -> None:
        """Raise if a gfn is that of a shadow page.

        Raises:
            InvalidArgumentError: It is.
        """
        if gfn in self._memory:
            raise InvalidArgumentError(f"gfn {gfn:#x} is a shadow, not the guest's", gfn=gfn)

    @uninterruptible
    def take(self) -> tuple[int, memoryview]:
        """Take a free shadow page: its gfn and its memory."""
        if not self._free:
            self._grow()
        gfn = self._free.pop()
        return gfn, self._memory[gfn]

    def give_back(self, gfn: int) -> None:
        """Return a shadow page to the pool; it is hidden again already."""
        self._memory[gfn][:] = NOTHING
        self._free.append(gfn)

    @staticmethod
    def show_page(view: View, gfn: int) -> None:
        """Revert a gfn of a view to the page itself, if it is remapped."""
        try:
            view.revert(gfn)
        except InvalidArgumentError:
            if gfn in view.remaps:
                raise

    def show(self, view: View, gfn: int, shadow: int, undo: UndoList) -> None:
        """Remap a gfn of a view to a shadow page, which no vCPU may access yet.

        The remapped gfn gets the rights that the shadow's own gfn has: none for now. Meanwhile that
        gfn maps the shadow page itself, which still looks like a hole.
        """
        undo.push("", partial(self.hide, view, shadow))
        view.revert(shadow)
        view.set_access(shadow, Access.N)
        view.remap(gfn, shadow, access=Access.N)
        undo.push("", partial(self.show_page, view, gfn))
        self.hide(view, shadow)

    def hide(self, view: View, gfn: int) -> None:
        """Map a gfn of a view to the sink."""
        view.remap(gfn, self._sink, access=Access.R)

    def hide_all(self, view: View) -> None:
        """Hide all pages in a new view."""
        if self._sink:
            view.set_access(self._sink, Access.R)
        for gfn in self._memory:
            if gfn != self._sink:
                self.hide(view, gfn)

    def is_hidden(self, gfn: int) -> bool:
        """Return whether every view has the sink's rights at a gfn."""
        return all(view.access(gfn) == Access.R for view in self._views)

    def are_hidden(self) -> bool:
        """Return whether all pages, the sink included, are hidden."""
        return all(self.is_hidden(gfn) for gfn in self._memory)

    def abandon(self) -> None:
        """Unmap the pages after the domain's end."""
        for pages in list(self._maps):
            with suppress(XenError):
                self._unmap(pages)

    @uninterruptible
    def _unmap(self, pages: list[memoryview]) -> None:
        self._backend.foreignmemory_unmap(pages)
        self._maps = [others for others in self._maps if others is not pages]

    def _remove(self, gfns: range) -> None:
        """Remove pages; if they lie between the remap targets of another owner's view, do so later.

        The domain's end frees them, with all others that were added to it.
        """
        if not any(view for gfn in gfns for view in self._context.tracking(gfn)):
            self._pages.remove(gfns)

    def _grow(self) -> None:
        """Add pages, with the domain paused: they are visible until they are hidden."""
        with self._context.paused():
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
        """Add pages that no view lets the guest access; after a later failure they stay so.

        They cannot be removed once one of them is remapped: Xen would reset the view.
        """
        backend, domid = self._backend, int(self._context.domid)
        undo = UndoList()
        try:
            gfns = self._pages.add(_AT_ONCE)
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
