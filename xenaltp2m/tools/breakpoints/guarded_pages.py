# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pages that the views restrict, and their access rights in each view."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial

from xenaltp2m.errors import InvalidArgumentError, NotMappedError, XenError
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.handles.view import View
from xenaltp2m.tools.breakpoints.hooks import Watchpoint
from xenaltp2m.tools.breakpoints.pages import BEFORE, Lead, Page
from xenaltp2m.tools.breakpoints.shadow_pages import Shadows
from xenaltp2m.tools.breakpoints.views import HookViews
from xenaltp2m.types import PAGE_SIZE, Access

_MOST_LEADS = 8
"""The most pages known to precede one: if the guest maps it after more, it is stepped there."""


class GuardedPages:
    """Pages with breakpoints or patches, pages that precede those, and pages with watchpoints.

    Attributes:
        pages: The pages with breakpoints or patches, by gfn.
        leads: The pages that precede one with breakpoints: by gfn, the gfns of those after it.
        watched: The watchpoints of each page, by gfn.
        opened: The rights of pages that ``used`` allows more than ``step``.
    """

    def __init__(
        self,
        context: DomainContext,
        views: HookViews,
        shadows: Shadows,
        heir: UndoList,
        *,
        int3: bool,
    ) -> None:
        self._context, self._views, self._shadows = context, views, shadows
        self._heir, self._int3 = heir, int3
        self._backend, self._domid = context.backend, int(context.domid)
        self.pages: dict[int, Page] = {}
        self.leads: dict[int, set[int]] = {}
        self.watched: dict[int, list[Watchpoint]] = {}
        self.opened: dict[int, Access] = {}

    def __repr__(self) -> str:
        return f"<GuardedPages of domain {self._domid}>"

    def every(self) -> set[int]:
        """List the gfns of all restricted pages."""
        return self.pages.keys() | self.watched.keys() | self.leads.keys()

    def written_with(self, gfn: int) -> set[int]:
        """List the pages with breakpoints that a write to a page affects."""
        return {gfn} & self.pages.keys() | self.leads.get(gfn, set())

    def map(self, gfn: int) -> tuple[memoryview, Callable[[], None]]:
        """Map a page read-only; return its memory, and a function that unmaps it."""
        pages = self._backend.foreignmemory_map(self._domid, False, [gfn])
        return pages[0], partial(self._backend.foreignmemory_unmap, pages)

    def map_again(self) -> list[XenError]:
        """Map each page again, because it may have another frame now; list the failures."""
        failures = []
        for gfn, page in self.pages.items():
            try:
                self.invalidate_shadow(gfn)
                page.map_again(*self.map(gfn))
                for before, lead in page.leads.items():
                    lead.map_again(*self.map(before))
            except XenError as failure:
                failures.append(failure)
        return failures

    # Rights.

    def rights(self, gfn: int) -> dict[View, Access]:
        """Return a page's access rights in each view; RWX in ``write`` by default."""
        page, watches, views = self.pages.get(gfn), self.watched.get(gfn, ()), self._views
        guarded = gfn in self.leads or (page is not None and page.shadow_gfn)
        hooks = step = Access.RX if guarded else Access.RWX
        write = Access.RWX
        if page is not None:
            hooks = Access.RW
            if page.shadow_gfn:
                hooks = Access.X if page.armed else Access.N
        if watches:
            unheard = Access.X if any(watch.reads for watch in watches) else Access.RX
            hooks, step, write = hooks & unheard, step & unheard, unheard
        rights = {views.hooks: hooks, views.step: step}
        if views.used is not None:
            rights[views.write] = write
            rights[views.used] = self.opened.get(gfn, step)
        return rights

    def set_rights(self, gfns: Collection[int]) -> None:
        """Set the access rights of pages in each view, as few calls as possible."""
        wanted: dict[tuple[View, Access], list[int]] = {}
        for gfn in gfns:
            for right in self.rights(gfn).items():
                wanted.setdefault(right, []).append(gfn)
        for (view, access), some in wanted.items():
            if len(some) == 1:
                view.set_access(some[0], access)
            else:
                view.set_access(gfns if len(some) == len(gfns) else some, access)

    @uninterruptible
    def open_in_used(self, wanted: dict[int, Access]) -> None:
        """Allow more than ``step`` for exactly these pages in ``used``."""
        used = self._views.used
        assert used is not None
        for gfn in self.opened.keys() | wanted.keys():
            if self.opened.get(gfn) == wanted.get(gfn):
                continue
            if gfn in wanted:
                used.set_access(gfn, wanted[gfn])
                self.opened[gfn] = wanted[gfn]
            else:
                access = self.opened.pop(gfn)
                try:
                    used.set_access(gfn, self.rights(gfn)[used])
                except BaseException:
                    self.opened[gfn] = access
                    raise

    def lost(self, *, altp2m_is_on: bool) -> set[int]:
        """List the pages whose rights or remaps Xen has reset in a view."""
        found: set[int] = set()
        for gfn in self.every():
            page = self.pages.get(gfn)
            rights = self.rights(gfn)
            as_it_was = altp2m_is_on and all(
                view.effective_access(gfn) == rights[view] for view in rights
            )
            if as_it_was and page is not None and page.shadow_gfn:
                as_it_was = self._shadows.is_hidden(page.shadow_gfn)
            if as_it_was and page is not None and page.copy is not None:
                as_it_was = self._shadows.is_hidden(page.copy.gfn)
            if not as_it_was:
                has_some = page is not None or gfn in self.watched
                found |= {gfn} if has_some else self.leads[gfn]
        return found

    # Pages with breakpoints.

    def take(self, gfn: int) -> Page:
        """Begin to shadow a page; its shadow is stale at first, which keeps the order simple."""
        undo = UndoList()
        with undo.rolling_back(heir=self._heir, unless=self._context.is_gone):
            memory, unmap = self.map(gfn)
            undo.push(f"mapping of gfn {gfn:#x} of domain {self._domid}", unmap)
            shadow_gfn, shadow = 0, memoryview(b"")
            if self._int3:
                shadow_gfn, shadow = self._shadows.take()
                undo.push("", partial(self._shadows.give_back, shadow_gfn), needs_rest=True)
            undo.push("", partial(self.set_rights, [gfn]), needs_rest=True)
            page = self.pages[gfn] = Page(memory, shadow_gfn, shadow, unmap)
            undo.push("", partial(self.pages.__delitem__, gfn))
            if self._int3:
                self._shadows.show(self._views.hooks, gfn, shadow_gfn, undo)
            self.set_rights([gfn])
        return page

    @uninterruptible
    def release(self, gfn: int) -> None:
        """Map a page itself again."""
        page = self.pages[gfn]
        self.drop_leads(gfn)
        undo = UndoList()
        undo.push("", page.unmap)
        if page.shadow_gfn:
            undo.push("", partial(self._shadows.give_back, page.shadow_gfn), needs_rest=True)
        undo.push("", partial(self.set_rights, [gfn]), needs_rest=True)
        if page.shadow_gfn:
            undo.push("", partial(self._shadows.show_page, self._views.hooks, gfn))
        del self.pages[gfn]
        undo.unwind(f"removing the breakpoints of gfn {gfn:#x}", heir=self._heir)

    @uninterruptible
    def invalidate_shadow(self, gfn: int) -> None:
        """Mark a page's shadow as stale: it is copied again before its next execution."""
        page = self.pages[gfn]
        if page.armed:
            self._views.hooks.set_access(gfn, Access.N)
            page.armed = False

    @uninterruptible
    def arm(self, gfn: int) -> None:
        """Update a page's shadow and allow its execution."""
        page = self.pages[gfn]
        page.fill()
        page.armed = True
        try:
            self._views.hooks.set_access(gfn, Access.X)
        except BaseException:
            page.armed = False  # the next fetch tries again
            raise

    def unmap(self, gfn: int) -> None:
        """Unmap a page and those that precede it, and forget it; calling it again is harmless."""
        if gfn in self.pages:
            page = self.pages[gfn]
            for one in (page, *page.leads.values()):
                one.unmap()
            del self.pages[gfn]

    # Pages that precede those with breakpoints.

    def note_ends(self, gfn: int, offset: int) -> None:
        """Record the bytes before a breakpoint that are in the preceding page."""
        page = self.pages[gfn]
        if not page.leads and gfn:
            with suppress(InvalidArgumentError, NotMappedError):  # a hole is not executed
                self.lead(gfn, gfn - 1)
                page.guess = gfn - 1
        for lead in page.leads.values():
            lead.note(offset)

    @uninterruptible
    def lead(self, gfn: int, before: int) -> Lead:
        """Watch for writes to the page that precedes one with breakpoints."""
        page = self.pages[gfn]
        lead = page.leads[before] = Lead(*self.map(before))
        self.leads.setdefault(before, set()).add(gfn)
        undo = UndoList()
        undo.push("", partial(self._lead_no_more, gfn, before))
        with undo.rolling_back(heir=self._heir, unless=self._context.is_gone):
            self.set_rights([before])
        return lead

    @uninterruptible
    def _lead_no_more(self, gfn: int, before: int) -> None:
        """Stop watching for writes to it."""
        lead = self.pages[gfn].leads.pop(before)
        undo = UndoList()
        undo.push(f"mapping of gfn {before:#x} of domain {self._domid}", lead.unmap)
        self.leads[before].remove(gfn)
        if not self.leads[before]:
            del self.leads[before]
        undo.push("", partial(self.set_rights, [before]))
        undo.unwind(f"removing the breakpoints of gfn {gfn:#x}")

    def drop_leads(self, gfn: int) -> None:
        """Stop watching for writes to all pages that precede one."""
        page = self.pages[gfn]
        page.guess = None
        for before in list(page.leads):
            self._lead_no_more(gfn, before)

    def knows_lead(self, gfn: int, before: int) -> bool:
        """Note that a page precedes another; return whether a shadow of that one may be executed.

        Args:
            gfn: The gfn of the page with breakpoints.
            before: The gfn of the page before it, by the current page tables.
        """
        page = self.pages[gfn]
        if before in page.leads:
            page.guess = None
            return True
        if page.guess is not None:
            self._lead_no_more(gfn, page.guess)
            page.guess = None
        if len(page.leads) >= _MOST_LEADS or before in self._shadows:
            return False
        try:
            lead = self.lead(gfn, before)
        except (InvalidArgumentError, NotMappedError):
            return True  # a hole is not executed
        for offset in page.hooks:
            if offset < BEFORE:
                lead.note(offset)
        return True

    def first_hook(self, gfn: int) -> int:
        """Return the offset of a page's first breakpoint; the page size if it has none."""
        return min(self.pages[gfn].hooks, default=PAGE_SIZE)
