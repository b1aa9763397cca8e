# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session of breakpoints: the parts that live from the views' creation to their end."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from xenaltp2m.errors import AlreadyError, InvalidArgumentError, XenError
from xenaltp2m.handles.altp2m import Altp2m
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.memory import MappedPages, Memory
from xenaltp2m.handles.monitor import Monitor
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.tools.breakpoints.answering import Answering
from xenaltp2m.tools.breakpoints.fetching import Fetching
from xenaltp2m.tools.breakpoints.guarded_pages import GuardedPages
from xenaltp2m.tools.breakpoints.patches import Copy
from xenaltp2m.tools.breakpoints.patching import Patching
from xenaltp2m.tools.breakpoints.repetitions import Repetitions
from xenaltp2m.tools.breakpoints.shadow_pages import Shadows
from xenaltp2m.tools.breakpoints.views import HookViews
from xenaltp2m.tools.breakpoints.watching import Watching
from xenaltp2m.values.events import Event, MemAccess, SoftwareBreakpoint


class Session:
    """Views, shadows and guarded pages; a migration ends one session, and another follows.

    Attributes:
        undo: Steps that failed to be undone before the end, which retries them.
        mapped: Pages that stay mapped because they are read often.
        views: The views.
        shadows: The shadow pages.
        guarded: The pages that the views restrict.
        watching: The watchpoints.
        patching: The patches.
        answering: Answers the events.
    """

    def __init__(
        self,
        altp2m: Altp2m,
        monitor: Monitor,
        repetitions: Repetitions,
        *,
        fast: bool,
        int3: bool,
    ) -> None:
        """Connect the parts, without changing the domain; :meth:`open` creates the views."""
        self._altp2m, self._monitor, self._repetitions = altp2m, monitor, repetitions
        self._fast, self._int3 = fast, int3
        self._context = context = altp2m.context
        self._domid = int(context.domid)
        self.undo, self._added = UndoList(), UndoList()
        memory, self.mapped = Memory(context), MappedPages(context)
        self.views = views = HookViews(altp2m, monitor)
        self.shadows = shadows = Shadows(context, views.every, self._added)
        self.guarded = guarded = GuardedPages(context, views, shadows, self.undo, int3=int3)
        fetching = Fetching(memory, guarded)
        self.watching = Watching(views, guarded, fetching, memory, self.mapped)
        self.patching = Patching(context, views, shadows, guarded, fetching, self.undo)
        self.answering = Answering(
            context,
            views,
            shadows,
            guarded,
            fetching,
            self.watching,
            self.patching,
            repetitions,
            fast=fast,
        )
        self._subscribed: list[type[Event]] = []
        """The events that were not enabled before, and are disabled at the end."""

    def anew(self) -> Session:
        """Return a new session for the same handles, not opened yet."""
        return Session(
            self._altp2m, self._monitor, self._repetitions, fast=self._fast, int3=self._int3
        )

    def open(self, before: Session | None) -> None:
        """Create the views, and move the vCPUs into them.

        Args:
            before: The session before a migration, whose breakpoints, watchpoints and patches
                this one takes over.
        """
        for kind in (MemAccess, SoftwareBreakpoint):
            with suppress(AlreadyError):
                self._monitor.enable(kind)
                self._subscribed.append(kind)
        self.views.open()
        guarded = self.guarded
        if before is not None:
            guarded.watched = before.guarded.watched
            self.patching.patches = before.patching.patches
            for gfn, page in before.guarded.pages.items():
                again = guarded.take(gfn)
                again.take_over(page)
                if again.patches:
                    again.copy = Copy(*self.shadows.take())
                for gfn_before, lead in page.leads.items():
                    guarded.lead(gfn, gfn_before).ends = lead.ends
        if guarded.watched or self.patching.patches:
            self.create_used_view()
            guarded.set_rights(guarded.watched)
            self.watching.count_afters()
        self._altp2m.switch_to_view(self.views.hooks)

    @uninterruptible
    def create_used_view(self) -> None:
        """Create ``used``, with the pages that are guarded already."""
        views, guarded, undo = self.views, self.guarded, UndoList()
        try:
            with self._context.paused():
                view = views.create("used")
                undo.push("", partial(views.destroy, view))
                self.shadows.hide_all(view)
                views.used = view
                guarded.set_rights(guarded.pages.keys() | guarded.leads.keys())
        except BaseException as error:
            views.used = None
            undo.roll_back(error, self.undo, unless=self._context.is_gone)
            raise

    # Closing.

    def close(self, owner: str) -> None:
        """Undo everything: the vCPUs leave the views, then the views and then the shadows go.

        In any other order Xen would reset views.

        Args:
            owner: The name of the owner, for messages.
        """
        undo, what = UndoList(), f"shadows of domain {self._domid}"
        undo.push("", self.mapped.close)
        undo.push(what, lambda: self._added.unwind(f"closing {owner}"), needs_rest=True)
        undo.push("", partial(self._destroy_views, owner))
        undo.unwind(f"closing {owner}")

    def detach(self, owner: str, later: UndoList) -> None:
        """Undo everything except what the next session takes over.

        Args:
            owner: As for :meth:`close`.
            later: Receives the step that frees the shadows, once all views are gone.
        """
        pages = dict(self.guarded.pages)
        self._destroy_views(owner)
        self.guarded.pages = pages
        self.mapped.close()
        later.adopt(self._added)

    def abandon(self) -> None:
        """Free this process's own mappings after the domain's end."""
        for gfn in list(self.guarded.pages):
            with suppress(XenError):
                self.guarded.unmap(gfn)
        self.mapped.abandon()
        self.shadows.abandon()

    def _destroy_views(self, owner: str) -> None:
        domid, undo = self._domid, UndoList()
        for kind in self._subscribed:
            what = f"events of {kind.__name__} of domain {domid}"
            undo.push(what, partial(self._unsubscribe, kind), needs_rest=True)
        for view in self.views.every:
            undo.push("", view.close)
        undo.push("", lambda: self.undo.unwind(f"closing {owner}"))
        for gfn in self.guarded.pages:
            what = f"mapping of gfn {gfn:#x} of domain {domid}"
            undo.push(what, partial(self.guarded.unmap, gfn))
        undo.push("", self.patching.write_all_through)
        undo.push(f"vCPUs of domain {domid} in our views", self._leave)
        undo.unwind(f"closing {owner}")

    def _unsubscribe(self, kind: type[Event]) -> None:
        if not self._monitor.closed:
            with suppress(InvalidArgumentError):  # it has been disabled already
                self._monitor.disable(kind)

    def _leave(self) -> None:
        if not self._altp2m.closed:
            self._altp2m.move_vcpus_back()
