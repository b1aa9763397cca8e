# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages added to a domain above the highest gfn it ever had, for shadow pages."""

from __future__ import annotations

import logging
from array import array
from functools import partial

from xenaltp2m.errors import BusyError, InvalidArgumentError, LeftoverError, XenError
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.journal import Pages
from xenaltp2m.handles.memory import Memory
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.types import GFN_LIMIT, PAGE_SHIFT, PAGE_SIZE
from xenaltp2m.values.arguments import check_kind, check_number

_LOG = logging.getLogger(__name__)
_KIB_PER_PAGE = PAGE_SIZE // 1024
_UNLIMITED = (1 << 32) - 1
"""Pages. Xen clamps a higher limit to this number (``XEN_DOMCTL_max_mem``)."""


class AddedPages:
    """The pages that were added through one handle of a domain; its context lists them."""

    def __init__(self, context: DomainContext) -> None:
        self._context = context
        self._backend = context.backend

    def __repr__(self) -> str:
        return f"<AddedPages of domain {self._context.domid}>"

    @uninterruptible
    def add(self, count: int = 1) -> range:
        """See :meth:`xenaltp2m.handles.domain.Domain.add_pages`."""
        context = self._context
        context.check_open()
        check_number("count", count, least=1, most=GFN_LIMIT)
        first = self._backend.domain_maximum_gpfn(context.domid) + 1
        if first + count > GFN_LIMIT:
            raise InvalidArgumentError(f"{count} pages do not fit below gfn {GFN_LIMIT:#x}")
        gfns = range(first, first + count)
        limit = context.info().max_pages
        raised = min(count, _UNLIMITED - limit)
        undo = UndoList()
        noted = Pages(first, count, raised, limit)
        context.journal.write(pages=(*context.journal.record.pages, noted))
        undo.push("", partial(self._forget, noted), needs_rest=True)
        with undo.rolling_back(heir=context.undo, unless=context.is_gone):
            self._set_limit(limit + raised)
            undo.push(
                f"memory limit of domain {context.domid}, raised for gfns {gfns.start:#x} and up",
                lambda: self._set_limit(context.info().max_pages - raised),
            )
            # Before the call: a call that fails may have added some pages.
            undo.push(
                f"pages {gfns.start:#x}..{gfns.stop - 1:#x} added to domain {context.domid}",
                partial(self._take, list(gfns)),
            )
            self._backend.domain_populate_physmap_exact(context.domid, array("Q", gfns))
        context.added[gfns] = undo
        _LOG.info("%r: pages %#x..%#x added", context, gfns.start, gfns.stop - 1)
        return gfns

    @uninterruptible
    def remove(self, gfns: range) -> None:
        """See :meth:`xenaltp2m.handles.domain.Domain.remove_pages`."""
        context = self._context
        context.check_open()
        check_kind("gfns", gfns, range, "the range that add_pages returned")
        added = context.added.get(gfns)
        if added is None:
            raise InvalidArgumentError(
                f"gfns {gfns.start:#x}..{gfns.stop - 1:#x} are not pages this handle added",
                domid=context.domid,
            )
        self._check_untracked(gfns)
        added.unwind(f"removing pages of {context!r}")
        _LOG.info("%r: pages %#x..%#x removed", context, gfns.start, gfns.stop - 1)
        del context.added[gfns]

    def remove_at_end(self, gfns: range) -> None:
        """Do as :meth:`remove`, while the domain's handle is being closed.

        Raises:
            LeftoverError: They stay, because a view tracks them.
        """
        if gfns not in self._context.added:
            return  # their user removed them when the monitor was closed
        try:
            self.remove(gfns)
        except BusyError as error:
            left = self._context.added[gfns].left
            raise LeftoverError(error.message, left=left, **error.context()) from error

    def _check_untracked(self, gfns: range) -> None:
        for gfn in gfns:
            if views := self._context.tracking(gfn):
                raise BusyError(
                    f"gfn {gfn:#x} lies among the remap targets of {views[0]!r}, which Xen "
                    "would reset: destroy the view first",
                    domid=self._context.domid,
                    gfn=gfn,
                    view=views[0].id,
                )

    def _take(self, gfns: list[int]) -> None:
        """Remove pages from the domain and from ``gfns``; skip those that are gone already."""
        domid = self._context.domid
        self._context.note_page_removed()
        try:
            self._backend.domain_decrease_reservation_exact(domid, array("Q", gfns))
        except XenError:
            for gfn in list(gfns):  # Xen stops at the first page that is gone
                try:
                    self._backend.domain_decrease_reservation_exact(domid, array("Q", [gfn]))
                except XenError:
                    if self._is_memory(gfn):
                        raise
                gfns.remove(gfn)
        gfns.clear()

    def _forget(self, noted: Pages) -> None:
        journal = self._context.journal
        journal.undone(pages=tuple(pages for pages in journal.record.pages if pages != noted))

    def _is_memory(self, gfn: int) -> bool:
        try:
            Memory(self._context).check(gfn << PAGE_SHIFT, 1)
        except InvalidArgumentError:
            return False
        return True

    def _set_limit(self, pages: int) -> None:
        self._backend.domain_setmaxmem(self._context.domid, pages * _KIB_PER_PAGE)
